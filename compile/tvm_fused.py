"""The fused graph as calls from TVM's virtual machine into portlm's own kernels.

Each node of domain ai.portlm becomes one call of a native function "portlm.<op>" (csrc/tvm), found by name when the
library is loaded; what is left to TVM is the schedule of calls, the memory of the intermediates and the few standard
operators. Weights are passed as opaque objects: the functions check their shapes themselves, so the virtual machine
need not check every one of them again at every step.
"""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx
from onnx import helper, numpy_helper

from portlm.compile.tvm_build import Graph, Lowering, dimensions, kernel_passes
from portlm.compile.tvm_standard import STRUCTURAL, emitters
from portlm.errors import FormatError
from portlm.ops.quantized import Layout
from portlm.ops.registry import nodes
from portlm.ops.spec import DOMAIN, Attribute
from portlm.tvm_support import Packed, import_tvm

if TYPE_CHECKING:
    import tvm
    from tvm import relax


def lower(graph: Graph) -> "tvm.IRModule":
    """The graph as a Relax module whose function main takes the graph's inputs and then its weights."""
    import_tvm()
    return _Lowering(graph).run()


class _Lowering:
    """Walks the nodes in order and emits one Relax binding or two for each."""

    def __init__(self, graph: Graph):
        from tvm import relax, tirx

        self.relax, self.tirx = relax, tirx
        self.graph = graph
        self.bb = relax.BlockBuilder()
        self.extents: dict[str, Any] = {}
        self.values: dict[str, Any] = {}
        self.matrices: dict[str, tuple[Any, Packed]] = {}
        self.shapes = {weight.name: weight.shape for weight in graph.weights}
        names = {*self.shapes, *(part.name for matrix in graph.packed for part in matrix.parts())}
        tensors = (t for t in graph.proto.graph.initializer if t.name not in names)
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors}
        self.emitters: Mapping[tuple[str, str], Callable[[onnx.NodeProto, dict[str, Any]], Sequence[Any]]] = {
            **{(DOMAIN, op_type): self._plain for op_type, spec in nodes().items() if spec.tvm},
            (DOMAIN, "CachedAttention"): self._cached_attention,
            **{("", op_type): self._standard for op_type in emitters()},
            (DOMAIN, "QuantizedLinear"): self._packed_linear,
            (DOMAIN, "QuantizedEmbedding"): self._packed_rows,
            (DOMAIN, "HalfLinear"): self._half_linear,
            (DOMAIN, "HalfEmbedding"): self._half_rows,
            ("", "Gather"): self._gather,
            ("", "Reshape"): self._reshape,
            ("", "Split"): self._split,
        }

    def run(self) -> "tvm.IRModule":
        relax, proto = self.relax, self.graph.proto.graph
        for value in proto.input:
            dtype = "int64" if value.type.tensor_type.elem_type == onnx.TensorProto.INT64 else "float32"
            shape = [self._extent(d) if isinstance(d, str) else d for d in dimensions(value)]
            self.values[value.name] = relax.Var(value.name, relax.TensorType(shape, dtype))
        for weight in self.graph.weights:
            self.values[weight.name] = relax.Var(weight.name, relax.ObjectType())
        for matrix in self.graph.packed:
            self.matrices[matrix.weight.name] = relax.Var(matrix.name, relax.ObjectType()), matrix
        parameters = [self.values[name] for name in (*self.graph.inputs, *self.shapes)]
        parameters += [parameter for parameter, _ in self.matrices.values()]
        with self.bb.function("main", parameters):
            with self.bb.dataflow():
                for node in proto.node:
                    self._emit(node)
                outputs = relax.Tuple([self._whole(self.values[name]) for name in self.graph.outputs])
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
        try:
            results = emitter(node, attributes)
        except KeyError as error:
            raise FormatError(f"{node.name}: {node.op_type} lacks {error}") from error
        for name, value in zip(node.output, results, strict=True):
            self.values[name] = value

    def _call(self, op: str, inputs: Sequence[Any], *shapes: Sequence[Any]) -> Sequence["relax.Expr"]:
        """One native call that writes float32 outputs of these shapes; plain numbers pass as numbers."""
        relax = self.relax
        arguments = [self._number(value) if isinstance(value, int | float) else value for value in inputs]
        types = [relax.TensorType(list(shape), "float32") for shape in shapes]
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
        if not isinstance(value, _Columns):
            return value
        end = value.first + value.width
        last = len(value.source.ty.shape) - 1
        return self.bb.emit(self.relax.op.strided_slice(value.source, [last], [value.first], [end]))

    def _shape(self, name: str) -> list[Any]:
        value = self.values[name]
        if name in self.shapes:
            return list(self.shapes[name])
        if isinstance(value, _Columns):
            return [*value.source.ty.shape[:-1], value.width]
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

    def _packed(self, name: str) -> tuple[Any, Layout]:
        """The parameter for a quantized matrix, and its sizes."""
        parameter, matrix = self.matrices[name]
        return parameter, Layout.of(matrix.weight.shape, matrix.bits, matrix.zero is not None)

    def _packed_linear(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Sequence[Any]:
        x, weight, _, _, bias = (*node.input, "", "")[:5]
        matrix, layout = self._packed(weight)
        return self._map("packed_linear", node, x, matrix, bias, layout, attributes)

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
        q, k, v = (self._columns(name) for name in node.input[:3])
        past_key, past_value, mask = (self.values[name] for name in node.input[3:])
        batch, kv_heads, past, width = past_key.ty.shape
        sequence = q.source.ty.shape[1]
        heads = int(attributes["num_heads"])
        sizes = [heads, int(attributes["num_kv_heads"]), float(attributes["scale"])]
        grown = self.relax.TensorType([batch, kv_heads, past + sequence, width], "float32")
        present_key, present_value = (
            self.bb.emit(
                self.relax.op.call_pure_packed(
                    "portlm.append_cache", cache, new.source, self._number(new.first), ty_args=[grown]
                )
            )
            for cache, new in ((past_key, k), (past_value, v))
        )
        inputs = [q.source, q.first, present_key, present_value, mask, *sizes]
        (out,) = self._call("cached_attention", inputs, [batch, sequence, heads * width])
        return out, present_key, present_value

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
        return self._whole(self.values[name])

    def _gather(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Sequence[Any]:
        """Indices are clamped: the kernel would read wherever a wrong one points to."""
        values, indices = (self._tensor(name) for name in node.input)
        axis = int(attributes.get("axis", 0))
        return [self.bb.emit(self.relax.op.take(values, indices, axis=axis, mode="clip"))]

    def _reshape(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Sequence[Any]:
        value, shape = self._tensor(node.input[0]), self.constants[node.input[1]].tolist()
        wanted = [value.ty.shape[axis] if size == 0 else size for axis, size in enumerate(shape)]
        return [self.bb.emit(self.relax.op.reshape(value, wanted))]

    def _split(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Sequence[Any]:
        source = self._whole(self.values[node.input[0]])
        if int(attributes["axis"]) not in (-1, len(source.ty.shape) - 1):
            raise FormatError(f"{node.name}: only the last axis can be split")
        ends = self.constants[node.input[1]].cumsum().tolist()
        return [_Columns(source, first, end - first) for first, end in zip([0, *ends], ends, strict=False)]

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
