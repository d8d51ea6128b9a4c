"""From what a model computes, as recorded by compile/trace.py, to a graph in one of the two profiles.

Each op of portlm is written from its description: in the fused profile as its node, in the portable one by its
portable form. The few operators of PyTorch between them are in a small table, compile/aten.py. What has no form is one
error that says where in the model it is.

A view costs nothing here: a value remembers how it is stored and how the model sees it, and only a node that needs the
second gets a Reshape in front. So the heads that PyTorch splits off and joins again leave no trace in the fused
profile, whose nodes take them side by side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any

import onnx
from torch import fx

from portlm.compile import aten
from portlm.compile.forms import PROFILES
from portlm.compile.graph import GraphBuilder, WeightFile
from portlm.compile.module_weights import Weights
from portlm.compile.quantized_cache import kept_states, write_attention
from portlm.compile.quantized_graph import SmallWeights
from portlm.compile.recorder import source_line
from portlm.compile.trace import Recording, alive, arguments_of, output_nodes
from portlm.errors import FormatError
from portlm.models.roles import Role
from portlm.ops.registry import captured
from portlm.ops.spec import DOMAIN, Input, Node, module_of
from portlm.roles import StateSpec, TensorSpec

Shape = tuple[Any, ...]


@dataclass(frozen=True)
class Value:
    """A value of the graph.

    Attributes:
        name: in the graph.
        stored: its shape there.
        shape: its shape in the model: the same elements in the same order.
        dtype: "float32" or "int64".
    """

    name: str
    stored: Shape
    shape: Shape
    dtype: str = "float32"


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer that no node has read yet, or some of its rows.

    Attributes:
        path: in the module.
        rows: from where to where; None for all.
        plus: what is added to each of its numbers.
    """

    path: str
    rows: tuple[int, int] | None = None
    plus: float = 0.0


@dataclass
class Rows:
    """Rows of a table that may never be written: an op may take the table and the ids instead."""

    node: fx.Node
    ids: fx.Node
    table: Weight
    value: Value | None = None


def build_graph(
    role: Role,
    recording: Recording,
    weights: Weights,
    file: WeightFile,
    *,
    profile: str,
    name: str,
    family: str,
    context_length: int,
    small: SmallWeights | None = None,
    byte_cache: bool = False,
) -> onnx.ModelProto:
    """Write the graph of one role in one profile; its initializers point into the weight file.

    Args:
        role: what the graph takes and gives.
        recording: what it computes.
        weights: of the module.
        file: where the weights that the graph mentions are collected.
        profile: one of PROFILES.
        name: of the role.
        family: for the metadata.
        context_length: positions are below it.
        small: what stands for weights; None leaves all of them as they are.
        byte_cache: keep keys and values in 8 bits, see compile/quantized_cache.py.

    Raises:
        FormatError: an operator has no form in a graph, or a weight is not float32.
    """
    arrays = {**weights.arrays, **(small.arrays if small else {})}
    g = GraphBuilder(name, arrays, file, PROFILES[profile], context_length)
    emitter = Emitter(g, recording, weights, profile, small, byte_cache)
    declared: list[TensorSpec | StateSpec] = [*role.inputs, *role.state]
    for key, spec in zip(recording.inputs, declared, strict=True):
        parts: Sequence[TensorSpec | StateSpec] = (spec,)
        if byte_cache and isinstance(spec, StateSpec):
            parts = kept_states(spec)
        for part in parts:
            g.input(part.name, part.dtype, part.shape)
        emitter.declare(key, spec.name, parts[0].dtype)
    grown = [spec for spec in role.state if spec.output]
    names = [spec.name for spec in role.outputs] + [spec.output for spec in grown]
    g.reserve(*names)
    emitter.run(names)
    made: list[tuple[TensorSpec | StateSpec, ...]] = [(spec,) for spec in role.outputs]
    made += [kept_states(spec) if byte_cache else (spec,) for spec in grown]
    for node, specs in zip(output_nodes(recording.graph), made, strict=True):
        shape = [d if isinstance(d, int) else str(d) for d in node.meta["val"].shape]
        for spec in specs:
            width = shape[-1:] if spec is specs[0] else [1]  # of numbers, or of their scales
            g.output(
                spec.output if isinstance(spec, StateSpec) else spec.name, spec.dtype, [*shape[:-1], *width]
            )
    return g.model({"portlm.profile": profile, "portlm.family": family})


class Emitter:
    """Walks the recorded operators in order and writes each. aten.py uses its public methods."""

    def __init__(
        self,
        g: GraphBuilder,
        recording: Recording,
        weights: Weights,
        profile: str,
        small: SmallWeights | None = None,
        byte_cache: bool = False,
    ):
        self.small, self.byte_cache = small, byte_cache
        self.g, self.recording, self.weights, self.profile = g, recording, weights, profile
        self.values: dict[fx.Node, Any] = {}
        self._wanted: dict[tuple[fx.Node, int], str] = {}
        self._by_name = {node.name: node for node in recording.graph.nodes}

    def declare(self, key: str, name: str, dtype: str) -> None:
        """Note that a placeholder is an input of the graph."""
        node = self._by_name[key]
        shape = self.shape(node)
        self.values[node] = Value(name, shape, shape, dtype)

    def run(self, outputs: Sequence[str]) -> None:
        """Write every operator that an output depends on, and name the outputs."""
        results = output_nodes(self.recording.graph)
        for node, name in zip(results, outputs, strict=True):
            self._wanted.setdefault(_origin(node), name)
        living = alive(results)
        for node in self.recording.graph.nodes:
            if node in living and node not in self.values:
                self.values[node] = self._placeholder(node) if node.op == "placeholder" else self._write(node)
        for node, name in zip(results, outputs, strict=True):
            value = self.read(node)
            if value.name != name or value.stored != value.shape:
                self.reshape(value, value.shape, name)

    # What aten.py uses.

    def shape(self, node: fx.Node) -> Shape:
        """The shape that the model sees."""
        shape: Shape = node.meta["val"].shape
        return shape

    def read(self, node: Any) -> Value:
        """The value of an operand, written if it was not yet."""
        value = self.values[node]
        if isinstance(value, Rows):
            if value.value is None:
                value.value = self._spec_node(value.node, captured()["portlm::embedding"])
            return value.value
        if isinstance(value, Weight):
            return Value(self._mention(value), self.shape(node), self.shape(node))
        if not isinstance(value, Value):
            raise self.refuse(node, "it gives several tensors")
        return value

    def whole(self, node: Any) -> str:
        """The name of an operand, stored as the model sees it."""
        value = self.read(node)
        return self.reshape(value, value.shape)

    def reshape(self, value: Value, wanted: Shape, name: str = "") -> str:
        """The name of a value stored with another shape; without a name of its own it is written once."""
        if value.stored == wanted and not name:
            return value.name
        target, free = [], 0
        for axis, size in enumerate(wanted):
            if isinstance(size, int):
                target.append(size)
            elif axis < len(value.stored) and value.stored[axis] == size:
                target.append(0)
            else:
                target.append(-1)
                free += 1
        if free > 1:
            raise FormatError(
                f"{value.name}: changing its shape from {_text(value.stored)} to {_text(wanted)} moves more than one "
                "extent that is only known when it runs: keep batch and time as the first two axes"
            )
        make = lambda: self.g.op(  # noqa: E731
            "Reshape", (value.name, self.g.ints(*target)), name or self.g.unique(f"{value.name}.heads")
        )
        return make() if name else self.g.shared(f"{value.name} as {_text(wanted)}", make)

    def name(self, node: fx.Node, kind: str, output: int = 0) -> str:
        """A name for what a node gives: that of the graph's output, or the module's path and the kind of operator."""
        return self._wanted.get((node, output)) or self.g.unique(self._in_module(node, kind))

    def result(self, node: fx.Node, name: str) -> Value:
        """A value that is stored as the model sees it."""
        shape = self.shape(node)
        return Value(name, shape, shape, node.meta["val"].kind)

    def refuse(self, node: fx.Node, why: str, instead: str = "") -> FormatError:
        """The error for an operator without a form."""
        target = node.target._schema.name if hasattr(node.target, "_schema") else str(node.target)
        place = self._module(node) or "the model itself"
        line = source_line(node)
        advice = instead or aten.INSTEAD.get(target, "write it with the operators of portlm.ops")
        return FormatError(f"{target} in {place}{line} has no form in a graph, {why}: {advice}")

    def is_table(self, node: Any) -> bool:
        """Whether a value is looked up in a table of whole numbers, which a graph keeps in float32."""
        while isinstance(node, fx.Node) and node.op == "call_function":
            schema = getattr(node.target, "_schema", None)
            if schema is None or schema.name not in ("aten::index_select", *aten.RESHAPED):
                return False
            node = node.args[0]
        return self._weight(node) is not None

    def weight_rows(self, node: Any, begin: Any, end: Any) -> Weight | None:
        """Rows of a parameter, None for its ends; None if it is no parameter, or these are no numbers."""
        weight, count = self._weight(node), self.shape(node)[0]
        begin, end = 0 if begin is None else begin, count if end is None else end
        if (
            weight is None
            or weight.rows
            or weight.plus
            or not all(isinstance(place, int) for place in (begin, end))
        ):
            return None
        begin, end, _ = slice(begin, end).indices(count)
        return Weight(weight.path, (begin, end)) if begin < end else None

    def weight_plus(self, node: Any, number: Any) -> Weight | None:
        """A vector that is a parameter with a number added to it; None if it is no such sum."""
        weight = self._weight(node)
        if weight is None or weight.rows or len(self.shape(node)) != 1 or not isinstance(number, int | float):
            return None
        return Weight(weight.path, plus=weight.plus + number)

    # The rest is how an op's description becomes a node.

    def _mention(self, weight: Weight) -> str:
        """The name of a parameter or of some of its rows, which the graph then has."""
        name = self.weights.name(weight.path)
        if weight.plus:
            return self.g.weight_plus(f"{name}.plus{weight.plus:g}", name, weight.plus)
        if not weight.rows:
            return self.g.weight(name)
        begin, end = weight.rows
        return self.g.weight_part(f"{name}.rows{begin}", name, begin, end)

    def _placeholder(self, node: fx.Node) -> Any:
        if node.name in self.recording.weights:
            return Weight(self.recording.weights[node.name])
        user = next(iter(node.users), node)
        raise FormatError(
            f"a tensor that the model makes while it runs{source_line(user)} has no place in a graph: register it as a "
            "buffer"
        )

    def _write(self, node: fx.Node) -> Any:
        if node.target is getitem:
            source, place = node.args
            parts = self.values[source]  # type: ignore[index]
            if not isinstance(parts, tuple) or place >= len(parts):  # type: ignore[operator]
                raise self.refuse(source, "this result of it is for gradients only")  # type: ignore[arg-type]
            return parts[place]  # type: ignore[index]
        schema = getattr(node.target, "_schema", None)
        operator = schema.name if schema is not None else str(node.target)
        given = node.meta["val"]
        for result in given if isinstance(given, tuple) else (given,):
            if result.dtype.is_complex:
                raise self.refuse(node, "it is complex", "keep the real and imaginary part as two tensors")
        if (extents := node.meta["extents"]) and operator not in aten.SIZED:
            raise self.refuse(node, f"its argument {extents[0]} is only known when it runs")
        if spec := captured().get(operator):
            if operator == "portlm::embedding" and (table := self._weight(node.args[1])):
                return Rows(node, node.args[0], table)  # type: ignore[arg-type]
            return self._spec_node(node, spec)
        rule = aten.RULES.get(operator)
        if rule is None:
            raise self.refuse(node, "none of the operators that every engine has")
        return rule(self, node)

    def _spec_node(self, node: fx.Node, spec: Node) -> Any:
        arguments = arguments_of(node)
        known = {
            key: value.meta["val"] if isinstance(value, fx.Node) else value
            for key, value in arguments.items()
        }
        try:
            attributes = dict(spec.read(known))
        except ValueError as error:
            raise self.refuse(node, str(error)) from error
        fused = self.profile == "fused"
        rows = self._common_rows(spec, arguments) if spec.rowwise else False
        names, shapes = [], []
        for wanted in spec.inputs:
            name, shape = self._input(node, spec, wanted, arguments, attributes, apart=not fused, rows=rows)
            names.append(name)
            shapes.append(shape)
        stored = [tuple(shape) for shape in spec.shapes(shapes, self._with_defaults(spec, attributes))]
        given = node.meta["val"]
        logical = [one.shape for one in (given if isinstance(given, tuple) else (given,))]
        outputs = self._outputs(node, spec, names)
        if self.byte_cache and spec.op_type == "CachedAttention":
            write_attention(self.g, fused, names, outputs, attributes)
        elif self.small and not self.small.names.isdisjoint(names):
            complete = self._with_defaults(spec, attributes)
            self.small.write(self.g, fused, spec, names, outputs[0], complete)
        elif fused:
            written = {
                key: value
                for key, value in attributes.items()
                if value != next(a for a in spec.attributes if a.name == key).default
            }
            while names and not names[-1]:
                names.pop()
            self.g.split_op(spec.op_type, names, outputs[0], outputs, domain=DOMAIN, **written)
        else:
            spec.portable(self.g, names, outputs, self._with_defaults(spec, attributes))
            if spec.output_heads:
                stored[0] = logical[0]
        values = tuple(
            Value(output, kept, seen) for output, kept, seen in zip(outputs, stored, logical, strict=False)
        )
        return values if isinstance(given, tuple) else values[0]

    def _with_defaults(self, spec: Node, attributes: Mapping[str, Any]) -> dict[str, Any]:
        return {a.name: attributes.get(a.name, a.default) for a in spec.attributes}

    def _common_rows(self, spec: Node, arguments: Mapping[str, Any]) -> bool:
        """Whether an op that works row by row can take its operands as they are stored."""
        values = [
            self.read(arguments[i.name])
            for i in spec.inputs
            if isinstance(arguments.get(i.name), fx.Node) and not self._weight(arguments[i.name])
        ]
        first = values[0]
        return all(v.stored == first.stored for v in values) and first.stored[-1] == first.shape[-1]

    def _weight(self, node: Any) -> Weight | None:
        value = self.values.get(node)
        return value if isinstance(value, Weight) else None

    def _input(
        self,
        node: fx.Node,
        spec: Node,
        wanted: Input,
        arguments: Mapping[str, Any],
        attributes: dict[str, Any],
        *,
        apart: bool,
        rows: bool,
    ) -> tuple[str, Any]:
        """The name of one input of a node, and its shape with heads side by side; "" and None if it is absent."""
        table = next((i for i in spec.inputs if i.rows_at == wanted.name), None)
        if table is not None:  # the ids of a table's rows, which the PyTorch op does not have
            ids = self.read(self._rows(node, arguments[table.name], table.name).ids)
            return self.reshape(ids, ids.shape), ids.shape
        operand = arguments[wanted.name]
        if operand is None:
            return "", None
        if wanted.rows_at:
            found = self._rows(node, operand, wanted.name)
            first = next(i.name for i in spec.inputs if i.rows_at == wanted.rows_at)
            if self._rows(node, arguments[first], first).ids is not found.ids:
                raise self.refuse(node, f"{first} and {wanted.name} are not rows at the same positions")
            name = self._mention(found.table)
            return name, self.g.weight_shape(name)
        if (weight := self._weight(operand)) and (weight.rows or weight.plus):
            name = self._mention(weight)
            return name, self.g.weight_shape(name)
        if weight:
            name = self.weights.name(weight.path)
            if self.small and name in self.small.names:
                shape = self.weights.arrays[name].shape
                return name, shape if not wanted.matrix or self.weights.is_turned(weight.path) else shape[
                    ::-1
                ]
            self.g.weight(name)
            if wanted.matrix and not self.weights.is_turned(weight.path):
                if "transposed" not in [a.name for a in spec.attributes]:
                    raise self.refuse(
                        node, f"{weight.path} is also used otherwise than as its matrix", "copy it"
                    )
                attributes["transposed"] = 1
            return name, self.weights.arrays[name].shape
        if wanted.matrix:
            raise self.refuse(node, f"its {wanted.name} is computed and not a parameter", "use torch.matmul")
        value = self.read(operand)
        shape = value.stored if rows else value.shape
        flat = (*shape[:-2], shape[-2] * shape[-1]) if wanted.heads else shape
        return self.reshape(value, shape if apart else flat), flat

    def _rows(self, node: fx.Node, operand: Any, name: str) -> Rows:
        value = self.values.get(operand)
        if not isinstance(value, Rows):
            raise self.refuse(
                node, f"its {name} is computed", f"take rows of a table: embedding(position_ids, {name})"
            )
        return value

    def _outputs(self, node: fx.Node, spec: Node, names: Sequence[str]) -> list[str]:
        if self._wanted.get((node, 0)):
            first = self._wanted[node, 0]
        else:
            owners = [
                name
                for name, i in zip(names, spec.inputs, strict=True)
                if name in self.weights.arrays and not i.rows_at
            ]
            matrices = [
                name
                for name, i in zip(names, spec.inputs, strict=True)
                if name in self.weights.arrays and i.matrix
            ]
            if owners:
                base = module_of((matrices or owners[:1])[-1]) or spec.op_type.lower()
            elif spec.named_after:
                place = [i.name for i in spec.inputs].index(spec.named_after)
                base = f"{names[place].removesuffix('.heads')}.{spec.suffix}"
            elif self._module(node):
                base = self._in_module(node, spec.suffix)
            else:
                base = self._in_module(node, spec.suffix or spec.op_type.lower())
            first = self.g.unique(base)
        rest = [
            self._wanted.get((node, place)) or self.g.unique(f"{first}.{output}")
            for place, output in enumerate(spec.outputs)
            if place
        ]
        return [first, *rest]

    def _module(self, node: fx.Node) -> str:
        """The path of the module in which a node was computed, "" for the model itself."""
        return str(node.meta["module"])

    def _in_module(self, node: fx.Node, kind: str) -> str:
        return self.weights.rename(".".join(part for part in (self._module(node), kind) if part))


def _origin(node: fx.Node) -> tuple[fx.Node, int]:
    """The operator that gives a value, and which of its results it is, looking through what changes nothing."""
    place = 0
    while True:
        if node.target is getitem:
            node, place = node.args  # type: ignore[assignment]
            return node, place
        operator = getattr(getattr(node.target, "_schema", None), "name", "")
        if operator not in aten.IDENTITIES:
            return node, place
        node = node.args[0]  # type: ignore[assignment]


def _text(shape: Sequence[Any]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


def seen_as(value: Value, shape: Shape) -> Value:
    """The same value with another shape in the model."""
    return replace(value, shape=shape)
