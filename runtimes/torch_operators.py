"""The operators that a plan may use, in PyTorch: a closed table. A name from a file is looked up here and nowhere else.

Standard operators are those of compile/forms.py, with the meaning that ONNX gives them. Operators of ai.portlm call the
functions of portlm.ops, so they run its kernels.
"""

import functools
import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from portlm.ops import half, quantized, spec
from portlm.ops.registry import specs
from portlm.plan import MAX_RANK

REQUIRED = object()


class RefusedError(Exception):
    """A node that no graph of ours has; the message says what is wrong with it."""


class Attribute(NamedTuple):
    """One attribute: its exact type (int, float, str, or tuple for a list of int), its values, and its default."""

    kind: type
    default: Any = REQUIRED
    choices: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Call:
    """A node, as far as it is known before anything is computed.

    Attributes:
        attributes: with defaults filled in.
        static: values of those inputs that must be known, by position.
        inputs: how many there are, absent ones at the end not counted.
        outputs: how many there are.
    """

    attributes: Mapping[str, Any]
    static: Mapping[int, tuple[int, ...]]
    inputs: int
    outputs: int


Function = Callable[..., Any]  # of tensors, None for an absent one; returns a tensor, or a tuple of several
Shape = tuple[int, ...]
Shapes = Callable[[Any, Sequence[Shape]], Sequence[Shape]]
Derived = Mapping[int, tuple[Function, Shapes, tuple[int, ...]]]


@dataclass(frozen=True)
class Operator:
    """How a node becomes a function of tensors.

    Attributes:
        least: number of inputs.
        most: number of inputs.
        bind: makes the function, which takes the inputs that are not static.
        shapes: of the outputs, from those of the same inputs; it may trust that they fit, the function checks it.
        dtypes: of the inputs in order, the last one for all that follow; "" for any, several as "uint8|int8".
        kinds: of the outputs; () if all are float32, or of the first input's type where `dtypes` begins with "".
        casts: for an operator whose types depend on its attributes: both of these.
        attributes: what it may have.
        static: inputs, by position, that must be int64 constants.
        outputs: how many; 0 for any number.
        derive: what an input is replaced by: a function of the inputs at these positions, and its shape rule. It is
            computed once for all nodes that need the same, and if it depends on weights alone, once for all calls. At
            the position `most` it is an input more, which the node does not have.
    """

    least: int
    most: int
    bind: Callable[[Call], Function]
    shapes: Callable[[Call, Sequence[Shape]], Sequence[Shape]]
    dtypes: tuple[str, ...] = ("float32",)
    kinds: tuple[str, ...] = ()
    casts: Callable[[Call], tuple[tuple[str, ...], tuple[str, ...]]] | None = None
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    static: tuple[int, ...] = ()
    outputs: int = 1
    derive: Callable[[Call], Derived] = lambda call: {}

    def taken(self, call: Call) -> tuple[str, ...]:
        """Return the types of the inputs."""
        return self.casts(call)[0] if self.casts else self.dtypes

    def given(self, call: Call) -> tuple[str, ...]:
        """Return the types of the outputs, "" for that of the first input."""
        if self.casts:
            return self.casts(call)[1]
        return self.kinds or ("float32" if self.dtypes[0] else "",) * call.outputs

    def call(
        self, attributes: Mapping[str, Any], static: Mapping[int, tuple[int, ...]], inputs: int, outputs: int
    ) -> Call:
        """Check a node's form.

        Raises:
            RefusedError: a wrong number of inputs or outputs, or an attribute that is unknown, missing, or not of its
                type.
        """
        if not self.least <= inputs <= self.most:
            raise RefusedError(f"has {inputs} inputs and takes {self.least} to {self.most}")
        if self.outputs and outputs != self.outputs:
            raise RefusedError(f"has {outputs} outputs and gives {self.outputs}")
        if unknown := attributes.keys() - self.attributes.keys():
            raise RefusedError(f"has no attribute {min(unknown)!r}")
        values = {}
        for name, wanted in self.attributes.items():
            value = attributes.get(name, wanted.default)
            if value is REQUIRED:
                raise RefusedError(f"lacks the attribute {name}")
            if name in attributes and not _fits(value, wanted):
                raise RefusedError(f"has {name} = {str(value)[:40]}, which it cannot be")
            values[name] = value
        return Call(values, static, inputs, outputs)


def _fits(value: Any, wanted: Attribute) -> bool:
    if type(value) is not wanted.kind:
        return False
    return not wanted.choices or value in wanted.choices


# --- standard operators ------------------------------------------------------------------------------------

_AXIS = Attribute(int, choices=tuple(range(-MAX_RANK, MAX_RANK)))


def _plain(function: Function) -> Callable[[Call], Function]:
    return lambda call: function


def _axis_of(default: int | object) -> Attribute:
    return _AXIS._replace(default=default)


_CASTS = {  # by ONNX's number of the type
    1: (("uint8|int8|float16|bfloat16",), ("float32",)),
    3: (("float32",), ("int8",)),
    6: (("float32",), ("int32",)),
}


def _cast(call: Call) -> Function:
    kinds = {1: torch.float32, 3: torch.int8, 6: torch.int32}
    kind = kinds[call.attributes["to"]]
    return lambda x: x.to(kind)


def _concat(call: Call) -> Function:
    axis = call.attributes["axis"]
    return lambda *values: torch.cat(values, axis)


def _cumulative_sum(call: Call) -> Function:
    (axis,) = _some(call.static[1], 1)
    return lambda x: torch.cumsum(x, axis)


def _gather(call: Call) -> Function:
    axis = call.attributes["axis"]

    def gather(x: Tensor, index: Tensor) -> Tensor:
        place = axis % x.dim()
        found = x.index_select(place, index.reshape(-1))
        return found.reshape(*x.shape[:place], *index.shape, *x.shape[place + 1 :])

    return gather


def _gelu(call: Call) -> Function:
    return functools.partial(F.gelu, approximate=call.attributes["approximate"])


def _layer_normalization(call: Call) -> Function:
    axis, epsilon = call.attributes["axis"], call.attributes["epsilon"]

    def layer_normalization(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.layer_norm(x, x.shape[axis:], weight, bias, epsilon)

    return layer_normalization


def _largest(call: Call) -> Function:
    axes, keep = list(call.static.get(1, ())), bool(call.attributes["keepdims"])
    return lambda x: torch.amax(x, axes or list(range(x.dim())), keepdim=keep)


def _mean(call: Call) -> Function:
    axes, keep = list(call.static.get(1, ())), bool(call.attributes["keepdims"])
    return lambda x: torch.mean(x, axes or list(range(x.dim())), keepdim=keep)


def _reshape(call: Call) -> Function:
    target = call.static[1]
    if len(target) > MAX_RANK or min(target, default=0) < -1:
        raise RefusedError(f"asks for the shape {str(target)[:40]}")

    def reshape(x: Tensor) -> Tensor:
        return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(target)])

    return reshape


def _softmax(call: Call) -> Function:
    axis = call.attributes["axis"]
    return lambda x: torch.softmax(x, axis)


def _split(call: Call) -> Function:
    axis, count, sizes = call.attributes["axis"], call.attributes["num_outputs"], call.static.get(1)
    if (sizes is None) == (count == 0) or (len(sizes) if sizes is not None else count) != call.outputs:
        raise RefusedError(f"does not say once what its {call.outputs} outputs are")
    if sizes is not None:
        parts = list(sizes)
        return lambda x: torch.split(x, parts, axis)
    return lambda x: torch.split(x, -(-x.shape[axis] // count), axis)


def _transpose(call: Call) -> Function:
    order = call.attributes["perm"]
    return lambda x: x.permute(order)


def _unsqueeze(call: Call) -> Function:
    axes = call.static[1]

    def unsqueeze(x: Tensor) -> Tensor:
        rank = x.dim() + len(axes)
        for axis in sorted(axis % rank if -rank <= axis < rank else rank for axis in axes):
            x = x.unsqueeze(axis)
        return x

    return unsqueeze


def _some(values: Sequence[int], count: int) -> Sequence[int]:
    if len(values) != count:
        raise RefusedError(f"needs {count} whole number, got {len(values)}")
    return values


def _broadcast(call: Call, shapes: Sequence[Shape]) -> Sequence[Shape]:
    return [np.broadcast_shapes(*shapes)]


def _same(call: Call, shapes: Sequence[Shape]) -> Sequence[Shape]:
    return [shapes[0]]


def _shape_of_concat(call: Call, shapes: Sequence[Shape]) -> Sequence[Shape]:
    place = _place(call.attributes["axis"], shapes[0])
    return [_with(shapes[0], place, sum(shape[place] for shape in shapes))]


def _shape_of_gather(call: Call, shapes: Sequence[Shape]) -> Sequence[Shape]:
    place = _place(call.attributes["axis"], shapes[0])
    return [(*shapes[0][:place], *shapes[1], *shapes[0][place + 1 :])]


def _shape_of_matmul(call: Call, shapes: Sequence[Shape]) -> Sequence[Shape]:
    x, y = shapes
    if min(len(x), len(y)) < 2:
        raise RefusedError("multiplies what is no matrix")
    return [(*np.broadcast_shapes(x[:-2], y[:-2]), x[-2], y[-1])]


def _shape_of_mean(call: Call, shapes: Sequence[Shape]) -> Sequence[Shape]:
    (x,) = shapes
    places = {_place(axis, x) for axis in call.static.get(1) or range(len(x))}
    if call.attributes["keepdims"]:
        return [tuple(1 if i in places else size for i, size in enumerate(x))]
    return [tuple(size for i, size in enumerate(x) if i not in places)]


def _shape_of_reshape(call: Call, shapes: Sequence[Shape]) -> Sequence[Shape]:
    target = [shapes[0][i] if size == 0 else size for i, size in enumerate(call.static[1])]
    known = math.prod(size for size in target if size != -1)
    if -1 in target:
        target[target.index(-1)] = math.prod(shapes[0]) // known
    return [tuple(target)]


def _shape_of_split(call: Call, shapes: Sequence[Shape]) -> Sequence[Shape]:
    place, count = _place(call.attributes["axis"], shapes[0]), call.outputs
    if 1 in call.static:
        return [_with(shapes[0], place, size) for size in call.static[1]]
    whole = shapes[0][place]
    each = -(-whole // count)
    return [_with(shapes[0], place, min(each, whole - i * each)) for i in range(count)]


def _shape_of_transpose(call: Call, shapes: Sequence[Shape]) -> Sequence[Shape]:
    return [tuple(shapes[0][i] for i in call.attributes["perm"])]


def _shape_of_unsqueeze(call: Call, shapes: Sequence[Shape]) -> Sequence[Shape]:
    rank = len(shapes[0]) + len(call.static[1])
    sizes = list(shapes[0])
    for axis in sorted(axis % rank for axis in call.static[1]):
        sizes.insert(axis, 1)
    return [tuple(sizes)]


def _shape_of_turned(call: Call | None, shapes: Sequence[Shape]) -> Sequence[Shape]:
    return [shapes[0][::-1]]


def _shape_of_rows(call: Call | None, shapes: Sequence[Shape]) -> Sequence[Shape]:
    return [(*shapes[0], shapes[1][1])]


def _place(axis: int, shape: Shape) -> int:
    if not -len(shape) <= axis < len(shape):
        raise RefusedError(f"has no axis {axis} of the shape {shape}")
    return axis % len(shape)


def _with(shape: Shape, place: int, size: int) -> Shape:
    return (*shape[:place], size, *shape[place + 1 :])


_STANDARD = {
    "Abs": Operator(1, 1, _plain(torch.abs), _same),
    "Add": Operator(2, 2, _plain(torch.add), _broadcast),
    "Cast": Operator(
        1, 1, _cast, _same, attributes={"to": Attribute(int, choices=tuple(_CASTS))},
        casts=lambda call: _CASTS[call.attributes["to"]],
    ),
    "Concat": Operator(1, 64, _concat, _shape_of_concat, ("",), attributes={"axis": _AXIS}),
    "CumSum": Operator(2, 2, _cumulative_sum, _same, static=(1,)),
    "Div": Operator(2, 2, _plain(torch.div), _broadcast),
    "Exp": Operator(1, 1, _plain(torch.exp), _same),
    "Floor": Operator(1, 1, _plain(torch.floor), _same),
    "Gather": Operator(2, 2, _gather, _shape_of_gather, ("", "int64|int32"), attributes={"axis": _axis_of(0)}),
    "Gelu": Operator(1, 1, _gelu, _same, attributes={"approximate": Attribute(str, "none", ("none", "tanh"))}),
    "LayerNormalization": Operator(
        2, 3, _layer_normalization, _same,
        attributes={"axis": _axis_of(-1), "epsilon": Attribute(float, 1e-5)},
    ),
    "MatMul": Operator(2, 2, _plain(torch.matmul), _shape_of_matmul),
    "Max": Operator(2, 2, _plain(torch.maximum), _broadcast),
    "Mul": Operator(2, 2, _plain(torch.mul), _broadcast),
    "ReduceMax": Operator(
        1, 2, _largest, _shape_of_mean, attributes={"keepdims": Attribute(int, 1, (0, 1))}, static=(1,)
    ),
    "ReduceMean": Operator(
        1, 2, _mean, _shape_of_mean, attributes={"keepdims": Attribute(int, 1, (0, 1))}, static=(1,)
    ),
    "Relu": Operator(1, 1, _plain(torch.relu), _same),
    "Reshape": Operator(2, 2, _reshape, _shape_of_reshape, ("",), static=(1,)),
    "Round": Operator(1, 1, _plain(torch.round), _same),
    "Sigmoid": Operator(1, 1, _plain(torch.sigmoid), _same),
    "Softmax": Operator(1, 1, _softmax, _same, attributes={"axis": _axis_of(-1)}),
    "Split": Operator(
        1, 2, _split, _shape_of_split, ("",),
        attributes={"axis": _axis_of(0), "num_outputs": Attribute(int, 0, tuple(range(1, 65)))}, static=(1,), outputs=0,
    ),
    "Sqrt": Operator(1, 1, _plain(torch.sqrt), _same),
    "Sub": Operator(2, 2, _plain(torch.sub), _broadcast),
    "Tanh": Operator(1, 1, _plain(torch.tanh), _same),
    "Transpose": Operator(1, 1, _transpose, _shape_of_transpose, ("",), attributes={"perm": Attribute(tuple)}),
    "Unsqueeze": Operator(2, 2, _unsqueeze, _shape_of_unsqueeze, ("",), static=(1,)),
}  # fmt: skip


# --- operators of ai.portlm: from their descriptions ---------------------------------------------------------

_ARGUMENTS = {"epsilon": "eps"}  # attributes that the function calls otherwise


def _turned(matrix: Tensor) -> Tensor:
    return matrix.t().contiguous()


@functools.cache
def _packer(bits: int) -> tuple[Function, Shapes]:
    """What makes the kernels' form of a small weight, the same object each time, and its shape rule."""
    if bits == half.BITS:
        return half.pack, lambda call, shapes: [half.packed_shape(shapes[0])]
    return (
        functools.partial(quantized.pack, bits=bits),
        lambda call, shapes: [quantized.packed_shape(shapes[0], bits, shapes[2] is not None)],
    )


def _function(name: str) -> Function:
    function: Function = getattr(importlib.import_module(f"portlm.ops.{name}"), name)
    return function


def _portlm(function: Function, node: spec.Node) -> Operator:
    """Return the operator that calls a function of portlm.ops, whose arguments are called like the node's inputs."""
    names = [i.name for i in node.inputs]
    counts = {i.heads for i in node.inputs} | {node.output_heads}
    looked_up = {i.rows_at for i in node.inputs}  # ids that only serve to look rows up
    # Other attributes are sizes, for engines that need to be told.
    known = inspect.signature(function).parameters
    names_of = {a.name: _ARGUMENTS.get(a.name, a.name) for a in node.attributes}
    options = [name for name, argument in names_of.items() if name not in counts and argument in known]
    # An attribute that is not written means what the function does by itself: no window is None there, and 0 in a node.
    defaults = {a.name: a.default for a in node.attributes if a.default is not None}
    rows = _function("embedding")

    def derive(call: Call) -> Derived:
        found: dict[int, tuple[Function, Shapes, tuple[int, ...]]] = {}
        for place, i in enumerate(node.inputs[: call.inputs]):
            if i.matrix and not call.attributes.get("transposed"):
                found[place] = _turned, _shape_of_turned, (place,)
            if i.rows_at:
                found[place] = rows, _shape_of_rows, (names.index(i.rows_at), place)
        if node.packed:
            packed, shape = _packer(call.attributes.get("bits", half.BITS))
            found[len(names)] = packed, shape, tuple(names.index(name) for name in node.packed)
        return found

    def bind(call: Call) -> Function:
        taken = [
            (i.name, call.attributes[i.heads] if i.heads else 0, i.name in looked_up) for i in node.inputs
        ]
        if node.packed:
            taken.append(("packed", 0, False))
        said = {name: call.attributes[name] for name in options}
        given = {
            _ARGUMENTS.get(name, name): value
            for name, value in said.items()
            if name not in defaults or value != defaults[name]
        }
        apart, single = bool(node.inputs[0].heads), len(node.outputs) == 1

        def run(*values: Tensor | None) -> Any:
            arguments = dict(given)
            for (name, heads, skipped), x in zip(taken, values, strict=False):
                if not skipped:
                    arguments[name] = x.reshape(*x.shape[:-1], heads, -1) if heads and x is not None else x
            result = function(**arguments)
            if not apart:
                return result
            return result.flatten(-2) if single else (result[0].flatten(-2), *result[1:])

        return run

    def shapes(call: Call, given: Sequence[Shape]) -> Sequence[Shape]:
        padded: list[Any] = [*given, *[None] * (len(names) - len(given))]
        for place, i in enumerate(node.inputs):
            if i.matrix and not call.attributes.get("transposed"):
                padded[place] = padded[place][::-1]  # turned by now, and the rule is that of the graph
        return [tuple(shape) for shape in node.shapes(padded, call.attributes)]

    required = [place for place, i in enumerate(node.inputs) if not i.optional]
    attributes = {
        a.name: Attribute(a.kind, REQUIRED if a.default is None else a.default, a.choices)
        for a in node.attributes
    }
    return Operator(
        max(required) + 1,
        len(node.inputs),
        bind,
        shapes,
        tuple(i.dtype for i in node.inputs),
        node.kinds,
        attributes=attributes,
        outputs=len(node.outputs),
        derive=derive,
    )


@functools.cache
def operators() -> Mapping[str, Operator]:
    """Return the table, by the names that plans use."""
    own = {
        f"{spec.DOMAIN}.{node.op_type}": _portlm(_function(op.name), node)
        for op in specs(in_graph=True)
        for node in op.nodes
    }
    return {**_STANDARD, **own}
