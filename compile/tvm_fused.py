"""The fused graph as calls from TVM's virtual machine into portlm's own kernels.

Each node of domain ai.portlm becomes a call of a native function "portlm.<op>" (csrc/tvm), found by name when the
library is loaded. Those that follow each other, a layer of a decoder for example, are one call of the virtual machine
(compile/tvm_chain.py); what is left to TVM is the order of these calls, the memory between them and the few standard
operators. Weights are passed as opaque objects: the functions check their shapes themselves, so the virtual machine
need not check every one of them again at every step.
"""

import functools
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import onnx
from onnx import helper, numpy_helper

from portlm.compile.tvm_build import Graph, Lowering, dimensions, kernel_passes
from portlm.compile.tvm_chain import Chain, Pending
from portlm.compile.tvm_expand import expanded
from portlm.compile.tvm_standard import STRUCTURAL, emitters
from portlm.errors import FormatError
from portlm.ops.narrow import ACTIVATIONS
from portlm.ops.quantized import Layout
from portlm.ops.registry import nodes
from portlm.ops.spec import DOMAIN, Attribute
from portlm.quantization import BYTES, activations
from portlm.tvm_support import Packed, Panels, import_tvm

if TYPE_CHECKING:
    import tvm
    from tvm import relax


def lower(graph: Graph) -> "tvm.IRModule":
    """The graph as a Relax module whose function main takes the graph's inputs and then its weights."""
    import_tvm()
    return _Lowering(expanded(graph, _Lowering(graph).emitters)).run()


class _Lowering:
    """Walks the nodes in order and emits one Relax binding or two for each."""

    def __init__(self, graph: Graph):
        from tvm import relax, tirx

        self.relax, self.tirx = relax, tirx
        self.graph = graph
        self.bb = relax.BlockBuilder()
        self.extents: dict[str, Any] = {}
        self.values: dict[str, Any] = {}
        self.chain = Chain(self.bb)
        self.attends = False  # whether the chain has an attention
        self.fresh: list[Pending] = []  # of the node that is looked at, and not among the values yet
        self.uses = Counter(name for node in graph.proto.graph.node for name in node.input)
        self.uses.update(graph.outputs)
        self.matrices: dict[str, tuple[Any, Packed]] = {}
        self.panels: dict[str, tuple[Any, Panels]] = {}
        self.shapes = {weight.name: weight.shape for weight in graph.weights}
        names = {*self.shapes, *(part.name for matrix in graph.packed for part in matrix.parts())}
        names.update(matrix.weight.name for matrix in graph.panels)
        tensors = (t for t in graph.proto.graph.initializer if t.name not in names)
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors}
        self.emitters: Mapping[tuple[str, str], Callable[[onnx.NodeProto, dict[str, Any]], Sequence[Any]]] = {
            **{(DOMAIN, op_type): self._plain for op_type, spec in nodes().items() if spec.tvm},
            (DOMAIN, "CachedAttention"): self._cached_attention,
            (DOMAIN, "QuantizedAttention"): self._quantized_attention,
            **{("", op_type): self._standard for op_type in emitters()},
            (DOMAIN, "Linear"): self._linear,
            (DOMAIN, "Embedding"): self._embedding,
            (DOMAIN, "GeluMlp"): self._mlp,
            (DOMAIN, "ReluSquaredMlp"): self._mlp,
            (DOMAIN, "QuantizedLinear"): self._packed_linear,
            (DOMAIN, "QuantizedEmbedding"): self._packed_rows,
            (DOMAIN, "HalfLinear"): self._half_linear,
            (DOMAIN, "HalfEmbedding"): self._half_rows,
            ("", "Concat"): self._concat,
            ("", "Gather"): self._gather,
            ("", "Reshape"): self._reshape,
            ("", "Split"): self._split,
        }

    def run(self) -> "tvm.IRModule":
        relax, proto = self.relax, self.graph.proto.graph
        for value in proto.input:
            dtype = str(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
            shape = [self._extent(d) if isinstance(d, str) else d for d in dimensions(value)]
            self.values[value.name] = relax.Var(value.name, relax.TensorType(shape, dtype))
        for weight in self.graph.weights:
            self.values[weight.name] = relax.Var(weight.name, relax.ObjectType())
        for matrix in self.graph.packed:
            self.matrices[matrix.weight.name] = relax.Var(matrix.name, relax.ObjectType()), matrix
        parameters = [self.values[name] for name in (*self.graph.inputs, *self.shapes)]
        parameters += [parameter for parameter, _ in self.matrices.values()]
        for wide in self.graph.panels:
            self.panels[wide.weight.name] = relax.Var(wide.name, relax.ObjectType()), wide
        parameters += [parameter for parameter, _ in self.panels.values()]
        with self.bb.function("main", parameters):
            with self.bb.dataflow():
                for node in proto.node:
                    self._emit(node)
                outputs = relax.Tuple([self._real(self._whole(self.values[n])) for n in self.graph.outputs])
                result = self.bb.emit_output(outputs)
            self.bb.emit_func_output(result)
        return self.bb.get()

    def _extent(self, text: str) -> Any:
        """A symbolic extent of the graph: "batch", or a sum, "past + sequence"."""
        names = [name.strip() for name in text.split("+")]
        for name in names:
            self.extents.setdefault(name, self.tirx.Var(name, "int64"))
        return functools.reduce(operator.add, (self.extents[name] for name in names))

    def _emit(self, node: onnx.NodeProto) -> None:
        emitter = self.emitters.get((node.domain, node.op_type))
        if emitter is None:
            raise FormatError(
                f"{node.name}: {node.domain or 'ai.onnx'}.{node.op_type} is not of the fused profile"
            )
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        self.fresh = []
        try:
            results = emitter(node, attributes)
        except KeyError as error:
            raise FormatError(f"{node.name}: {node.op_type} lacks {error}") from error
        for name, value in zip(node.output, results, strict=True):
            self.values[name] = value
        self.uses.subtract(node.input)

    def _real(self, value: Any) -> Any:
        """A value for Relax itself; one that is pending is computed now, and with it all that is."""
        if isinstance(value, Pending) and value.expr is None:
            self._flush()
        return value.expr if isinstance(value, Pending) else value

    def _flush(self) -> None:
        """Call the kernels that were gathered."""
        if self.chain.steps:
            later = (value for name, value in self.values.items() if self.uses[name] > 0)
            wanted = {id(getattr(value, "source", value)) for value in later}
            wanted.update(map(id, self.fresh))
            self.chain.call(lambda value: id(value) in wanted)
            self.attends = False

    def _call(self, op: str, inputs: Sequence[Any], *shapes: Sequence[Any]) -> Sequence["relax.Expr"]:
        """One native call that writes float32 outputs of these shapes; plain numbers pass as numbers."""
        relax = self.relax
        types = [relax.TensorType(list(shape), "float32") for shape in shapes]
        if not self.chain.takes(inputs, shapes):
            self._flush()
        if self.chain.takes(inputs, shapes):
            outputs = [Pending(ty) for ty in types]
            self.chain.add(op, inputs, outputs)
            self.fresh += outputs
            return outputs
        arguments = [
            self._number(value) if isinstance(value, int | float) else self._real(value) for value in inputs
        ]
        call = relax.op.call_dps_packed(
            f"portlm.{op}", relax.Tuple(arguments), types[0] if len(types) == 1 else types
        )
        result = self.bb.emit(call)
        return [result] if len(types) == 1 else [self.bb.emit(result[i]) for i in range(len(types))]

    def _number(self, value: int | float) -> Any:
        tirx = self.tirx
        real = isinstance(value, float)
        return self.relax.prim_value(tirx.FloatImm("float64", value) if real else tirx.IntImm("int64", value))

    def _inputs(self, node: onnx.NodeProto) -> list[Any]:
        return [self._whole(self.values[name]) for name in node.input if name]

    def _whole(self, value: Any) -> Any:
        """A value as a tensor of its own; the part of a Split is copied out of what it is part of."""
        if isinstance(value, _Heads):
            whole = self.bb.emit(
                self.relax.op.reshape(self._real(value.source), [*value.shape[:3], value.period])
            )
            if value.width == value.period:
                return whole
            end = value.first + value.width
            return self.bb.emit(self.relax.op.strided_slice(whole, [3], [value.first], [end]))
        if not isinstance(value, _Columns):
            return value
        end, source = value.first + value.width, self._real(value.source)
        last = len(source.ty.shape) - 1
        return self.bb.emit(self.relax.op.strided_slice(source, [last], [value.first], [end]))

    def _shape(self, name: str) -> list[Any]:
        value = self.values[name]
        if name in self.shapes:
            return list(self.shapes[name])
        if isinstance(value, _Columns):
            return [*list(value.source.ty.shape)[:-1], value.width]
        if isinstance(value, _Heads):
            return value.shape
        return list(value.ty.shape)

    def _plain(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Sequence[Any]:
        """A node that is one call: its inputs, its attributes as numbers, its outputs."""
        spec = nodes()[node.op_type]
        names = [*node.input, *[""] * (len(spec.inputs) - len(node.input))]
        absent = [i.name for i, name in zip(spec.inputs, names, strict=True) if not name]
        shapes = [self._shape(name) if name else None for name in names]
        values = {a.name: _value(node, a, attributes) for a in spec.attributes}
        numbers = [
            a.choices.index(values[a.name]) if a.choices else a.kind(values[a.name]) for a in spec.attributes
        ]
        function = "_no_".join([spec.tvm, *absent])
        return self._call(function, [*self._inputs(node), *numbers], *spec.shapes(shapes, values))

    def _linear(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Sequence[Any]:
        x, weight, bias = (*node.input, "")[:3]
        if weight not in self.panels:
            return self._plain(node, attributes)
        return self._panel_linear(self._whole(self.values[x]), weight, bias, "none")

    def _mlp(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Sequence[Any]:
        x, w1, b1, w2, b2 = node.input
        if w1 not in self.panels or w2 not in self.panels:
            return self._plain(node, attributes)
        tanh = node.op_type == "GeluMlp" and attributes.get("approximate", b"none") == b"tanh"
        activation = "gelu_tanh" if tanh else "gelu" if node.op_type == "GeluMlp" else "relu_squared"
        (hidden,) = self._panel_linear(self._whole(self.values[x]), w1, b1, activation)
        return self._panel_linear(hidden, w2, b2, "none")

    def _panel_linear(self, x: Any, weight: str, bias: str, activation: str) -> Sequence[Any]:
        parameter, matrix = self.panels[weight]
        biases = [self.values[bias]] if bias else []
        function = "panel_linear" if bias else "panel_linear_no_bias"
        inputs = [x, parameter, *biases, matrix.rows, matrix.columns, ACTIVATIONS.index(activation)]
        return self._call(function, inputs, [*list(x.ty.shape)[:-1], matrix.rows])

    def _embedding(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Sequence[Any]:
        if node.input[1] not in self.panels:
            ids = self.values[node.input[0]]
            return self._plain(node, attributes) if len(ids.ty.shape) == 2 else self._rows_of_words(node)
        ids, (parameter, matrix) = self.values[node.input[0]], self.panels[node.input[1]]
        return self._call(
            "panel_rows", [ids, parameter, matrix.rows, matrix.columns], [*ids.ty.shape, matrix.columns]
        )

    def _rows_of_words(self, node: onnx.NodeProto) -> Sequence[Any]:
        """Rows at ids (B, T, W), which the kernel reads as (B T, W)."""
        ids, width = self._tensor(node.input[0]), self._shape(node.input[1])[1]
        *leading, last = ids.ty.shape
        flat = self.bb.emit(self.relax.op.reshape(ids, [functools.reduce(operator.mul, leading), last]))
        (rows,) = self._call("embedding", [flat, self.values[node.input[1]]], [*flat.ty.shape, width])
        return [self.bb.emit(self.relax.op.reshape(self._real(rows), [*leading, last, width]))]

    def _packed(self, name: str) -> tuple[Any, Layout]:
        """The parameter for a quantized matrix, and its sizes."""
        parameter, matrix = self.matrices[name]
        return parameter, Layout.of(matrix.weight.shape, matrix.bits, matrix.zero is not None)

    def _packed_linear(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Sequence[Any]:
        x, weight, _, _, bias = (*node.input, "", "")[:5]
        matrix, layout = self._packed(weight)
        function = "packed_linear_a8" if activations() == BYTES else "packed_linear"
        return self._map(function, node, x, matrix, bias, layout, attributes)

    def _map(
        self,
        function: str,
        node: onnx.NodeProto,
        x: str,
        matrix: Any,
        bias: str,
        sizes: Sequence[int],
        attributes: dict[str, Any],
    ) -> Sequence[Any]:
        """A linear map with an activation; the sizes of its matrix begin with the number of rows."""
        choice = next(a for a in nodes()[node.op_type].attributes if a.name == "activation")
        activation = choice.choices.index(_value(node, choice, attributes))
        value = self._whole(self.values[x])
        biases = [self.values[bias]] if bias else []
        shape = [*list(value.ty.shape)[:-1], sizes[0]]
        name = function if bias else f"{function}_no_bias"
        return self._call(name, [value, matrix, *biases, *sizes, activation], shape)

    def _half(self, name: str) -> tuple[Any, tuple[int, int, int]]:
        """The parameter for a matrix of 16 bits; its rows, its columns, and whether it is bfloat16."""
        parameter, matrix = self.matrices[name]
        N, K = matrix.weight.shape
        return parameter, (N, K, int(matrix.weight.dtype == "bfloat16"))

    def _half_linear(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Sequence[Any]:
        x, weight, bias = (*node.input, "")[:3]
        matrix, sizes = self._half(weight)
        return self._map("half_linear", node, x, matrix, bias, sizes, attributes)

    def _half_rows(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Sequence[Any]:
        ids, (table, sizes) = self.values[node.input[0]], self._half(node.input[1])
        return self._call("half_rows", [ids, table, *sizes], [*ids.ty.shape, sizes[1]])

    def _packed_rows(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Sequence[Any]:
        ids, weight = self.values[node.input[0]], node.input[1]
        matrix, layout = self._packed(weight)
        return self._call("packed_rows", [ids, matrix, *layout], [*ids.ty.shape, layout.K])

    def _cached_attention(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Sequence[Any]:
        if self.attends:  # a chain is a layer, so that a look at the compiled module shows where it is
            self._flush()
        self.attends = True
        q, k, v = (self._columns(name) for name in node.input[:3])
        past_key, past_value, mask = (self.values[name] for name in node.input[3:])
        batch, _, _, width = past_key.ty.shape
        sequence = q.source.ty.shape[1]
        heads = int(attributes["num_heads"])
        sizes = [heads, int(attributes["num_kv_heads"]), float(attributes["scale"]), *_bounds(attributes)]
        present_key, present_value = (
            self._append("append_cache", cache, new) for cache, new in ((past_key, k), (past_value, v))
        )
        inputs = [q.source, q.first, present_key, present_value, mask, *sizes]
        (out,) = self._call("cached_attention", inputs, [batch, sequence, heads * width])
        return out, present_key, present_value

    def _append(self, function: str, cache: Any, new: "_Columns", *more: Any) -> Any:
        """A cache (B, K, P, D) grown by the tokens of a value, in place where there is room."""
        batch, heads, past, width = cache.ty.shape
        tokens = new.source.ty.shape[1]
        grown = self.relax.TensorType([batch, heads, past + tokens, width], cache.ty.dtype)
        inputs = [self._real(cache), new.source, new.first, *more]
        if self.chain.takes(inputs, [[batch, tokens, 1]]):
            present = Pending(grown, returned=True)
            self.chain.add(function, inputs, [present])
            return present
        source, *numbers = self._real(new.source), *map(self._number, inputs[2:])
        call = self.relax.op.call_pure_packed(
            f"portlm.{function}", inputs[0], source, *numbers, ty_args=[grown]
        )
        return self.bb.emit(call)

    def _quantized_attention(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Sequence[Any]:
        q, k, v = (self._columns(name) for name in node.input[:3])
        *cache, mask = (self.values[name] for name in node.input[3:])
        batch, _, _, width = cache[0].ty.shape
        heads = int(attributes["num_heads"])
        sizes = [heads, int(attributes["num_kv_heads"]), float(attributes["scale"]), *_bounds(attributes)]
        present = []
        for new, numbers, scales in ((k, *cache[:2]), (v, *cache[2:])):
            present.append(self._append("append_bytes", numbers, new))
            present.append(self._append("append_byte_scales", scales, new, width))
        inputs = [q.source, q.first, *present, mask, *sizes]
        (out,) = self._call("quantized_attention", inputs, [batch, q.source.ty.shape[1], heads * width])
        return out, *present

    def _standard(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Sequence[Any]:
        structural = STRUCTURAL.get(node.op_type, ())
        inputs = [
            self.constants[name] if i in structural else self._tensor(name)
            for i, name in enumerate(node.input)
        ]
        return [self.bb.emit(emitters()[node.op_type](inputs, attributes))]

    def _tensor(self, name: str) -> Any:
        """A value that Relax's own operators read: they need to know the shape of weights, too."""
        if name in self.constants:
            return self.relax.const(self.constants[name])
        if name in self.shapes:
            return self.bb.match_cast(self.values[name], self.relax.TensorType(self.shapes[name], "float32"))
        return self._real(self._whole(self.values[name]))

    def _gather(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Sequence[Any]:
        """Indices are clamped: the kernel would read wherever a wrong one points to."""
        values, indices = (self._tensor(name) for name in node.input)
        axis = int(attributes.get("axis", 0))
        return [self.bb.emit(self.relax.op.take(values, indices, axis=axis, mode="clip"))]

    def _reshape(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Sequence[Any]:
        value, shape = self.values.get(node.input[0]), self.constants[node.input[1]].tolist()
        if isinstance(value, _Heads) and shape == [0, 0, value.heads * value.width]:
            if value.width == value.period:
                return [value.source]
            inputs = [value.source, value.period, value.first, value.width]
            return self._call("columns", inputs, [*value.shape[:2], shape[2]])
        heads = len(shape) == 4 and shape[:2] == [0, 0] and min(shape[2:]) > 0
        if isinstance(value, Pending) and heads and int(value.ty.shape[2]) == shape[2] * shape[3]:
            return [_Heads(value, shape[2], shape[3], 0, shape[3])]
        value = self._tensor(node.input[0])
        wanted = [value.ty.shape[axis] if size == 0 else size for axis, size in enumerate(shape)]
        return [self.bb.emit(self.relax.op.reshape(value, wanted))]

    def _split(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Sequence[Any]:
        source, axis = self.values[node.input[0]], int(attributes["axis"])
        ends = self.constants[node.input[1]].cumsum().tolist()
        if isinstance(source, _Heads) and axis in (-1, 3):
            return [
                replace(source, first=source.first + first, width=end - first)
                for first, end in zip([0, *ends], ends, strict=False)
            ]
        source = self._whole(source)
        if axis not in (-1, len(source.ty.shape) - 1):
            parts = self.bb.emit(self.relax.op.split(self._real(source), ends[:-1], axis))
            return [self.bb.emit(self.relax.TupleGetItem(parts, place)) for place in range(len(ends))]
        return [_Columns(source, first, end - first) for first, end in zip([0, *ends], ends, strict=False)]

    def _concat(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Sequence[Any]:
        parts = [self.values.get(name) for name in node.input]
        if len(parts) != 2 or int(attributes["axis"]) not in (-1, 3):
            return self._standard(node, attributes)
        a, b = parts
        if not isinstance(a, _Heads) or not isinstance(b, _Heads) or a.heads != b.heads:
            return self._standard(node, attributes)
        inputs = [number for part in (a, b) for number in (part.source, part.period, part.first, part.width)]
        width = a.width + b.width
        (joined,) = self._call("join_columns", inputs, [*a.shape[:2], a.heads * width])
        return [_Heads(joined, a.heads, width, 0, width)]

    def _columns(self, name: str) -> "_Columns":
        """A value as columns of itself or of what it was split from."""
        value = self.values[name]
        return value if isinstance(value, _Columns) else _Columns(value, 0, value.ty.shape[2])


@dataclass(frozen=True)
class _Columns:
    """Columns [first, first + width) of a value: a part of a Split, which the kernels read where it lies."""

    source: Any
    first: int
    width: Any


@dataclass(frozen=True)
class _Heads:
    """Columns [first, first + width) of each of the heads, `period` columns each, of a value (B, T, heads * period)."""

    source: Any
    heads: int
    period: int
    first: int
    width: int

    @property
    def shape(self) -> list[Any]:
        """Its sizes, (B, T, heads, width)."""
        return [*(self.source.ty.shape[i] for i in range(2)), self.heads, self.width]


def _bounds(attributes: Mapping[str, Any]) -> list[Any]:
    """What an attention's function takes behind the scale: a window and a soft cap, if it has one of them."""
    window, softcap = int(attributes.get("window", 0)), float(attributes.get("softcap", 0.0))
    return [window, softcap] if window or softcap else []


def _value(node: onnx.NodeProto, attribute: Attribute, given: Mapping[str, Any]) -> Any:
    """One attribute of a node, its default if it is not written.

    Raises:
        KeyError: it has none.
        FormatError: it is not one of the choices.
    """
    value = (
        given[attribute.name] if attribute.default is None else given.get(attribute.name, attribute.default)
    )
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if attribute.choices and value not in attribute.choices:
        raise FormatError(
            f"{node.name}: {attribute.name} must be {' or '.join(attribute.choices)}, got {value!r}"
        )
    return value


LOWERING = Lowering("fused", [("CallKernels", lower)], kernel_passes, "compiled")
