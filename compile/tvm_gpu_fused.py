"""The fused graph on GPUs: few kernels for each layer, with what surrounds a product in the product's own.

Nodes are walked in order, and what a later kernel can do on its way is not computed yet: a normalisation in front of
products, the sum behind one, the gate of a SwiGLU, the rotation of queries and keys. A layer of a GPT is five kernels
then, and so is one of a LLaMA. What portlm has no kernel for is written in standard operators, whose kernels are TVM's.
"""

import functools
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec
import onnx
from onnx import helper, numpy_helper

from portlm.compile import tvm_gpu_attention, tvm_gpu_linear, tvm_gpu_rows
from portlm.compile.tvm_build import Graph, dimensions
from portlm.compile.tvm_expand import expanded
from portlm.compile.tvm_gpu import NAME
from portlm.compile.tvm_gpu_linear import Matrix
from portlm.compile.tvm_standard import STRUCTURAL, emitters
from portlm.errors import EngineUnavailableError, FormatError
from portlm.ops.quantized import Layout
from portlm.ops.registry import nodes
from portlm.ops.spec import DOMAIN
from portlm.tvm_support import BITS, Panels, import_tvm

if TYPE_CHECKING:
    import tvm


def lower(graph: Graph) -> "tvm.IRModule":
    """The graph as a Relax module whose function main takes the graph's inputs, weights, small matrices and panels.

    Raises:
        EngineUnavailableError: it holds what there is no form for.
        FormatError: a node lacks an attribute.
    """
    import_tvm()
    return _Lowering(expanded(graph, _Lowering(graph).emitters)).run()


@dataclass(eq=False)
class Rows:
    """A tensor (..., C) as its rows (M, C)."""

    flat: Any
    shape: list[Any]


@dataclass(eq=False)
class Normed:
    """A normalisation of a tensor, which the products behind it compute."""

    source: Any
    norm: str
    parameters: list[Any]
    epsilon: float


@dataclass(eq=False)
class Mapped:
    """A product that is not computed yet: activation(x W^T + bias)."""

    x: Any  # a tensor or Normed
    weight: str
    bias: str
    activation: str


@dataclass(eq=False)
class Rotated:
    """Heads that are not rotated yet."""

    source: Any
    positions: str
    tables: tuple[str, str]
    heads: int


@dataclass(frozen=True)
class Columns:
    """Columns [first, first + width) of a tensor: a part of a Split."""

    source: Any
    first: int
    width: int


class _Lowering:
    """Walks the nodes of a graph."""

    def __init__(self, graph: Graph):
        from tvm import relax, tirx

        self.relax, self.tirx, self.graph = relax, tirx, graph
        self.bb = relax.BlockBuilder()
        self.extents: dict[str, Any] = {}
        self.values: dict[str, Any] = {}
        self.uses = Counter(name for node in graph.proto.graph.node for name in node.input)
        self.uses.update(graph.outputs)
        self.matrices: dict[str, tuple[list[Any], Matrix]] = {}
        self.shapes = {weight.name: weight.shape for weight in graph.weights}
        inside = {part.name for matrix in graph.packed for part in matrix.parts()}
        inside.update(self.shapes, (matrix.weight.name for matrix in graph.panels))
        tensors = (t for t in graph.proto.graph.initializer if t.name not in inside)
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors}
        self.emitters: Mapping[tuple[str, str], Callable[..., Sequence[Any]]] = {
            **{("", op_type): self._standard for op_type in emitters()},
            ("", "Add"): self._add,
            ("", "Gather"): self._gather,
            ("", "Reshape"): self._reshape,
            ("", "Split"): self._split,
            (DOMAIN, "AddLayerNorm"): self._added_norm,
            (DOMAIN, "AddRmsNorm"): self._added_norm,
            (DOMAIN, "CachedAttention"): self._attention,
            (DOMAIN, "Embedding"): self._embedding,
            (DOMAIN, "GeluMlp"): self._mlp,
            (DOMAIN, "HalfEmbedding"): self._embedding,
            (DOMAIN, "HalfLinear"): self._linear,
            (DOMAIN, "LayerNorm"): self._norm,
            (DOMAIN, "Linear"): self._linear,
            (DOMAIN, "QuantizedEmbedding"): self._embedding,
            (DOMAIN, "QuantizedLinear"): self._linear,
            (DOMAIN, "ReluSquaredMlp"): self._mlp,
            (DOMAIN, "RmsNorm"): self._norm,
            (DOMAIN, "Rotary"): self._rotary,
            (DOMAIN, "SwiGlu"): self._swiglu,
        }

    def run(self) -> "tvm.IRModule":
        relax, graph = self.relax, self.graph
        for value in graph.proto.graph.input:
            dtype = str(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
            shape = [self._extent(d) if isinstance(d, str) else d for d in dimensions(value)]
            self.values[value.name] = relax.Var(value.name, relax.TensorType(shape, dtype))
        for weight in graph.weights:
            self.values[weight.name] = relax.Var(weight.name, relax.TensorType(weight.shape, "float32"))
        parameters = [self.values[name] for name in (*graph.inputs, *self.shapes)]
        for packed in graph.packed:
            N, K, group, bits, zeros = Layout.of(packed.weight.shape, packed.bits, packed.zero is not None)
            parameters += self._parameters(
                packed.name, packed.weight.name, Matrix(N, K, bits, group, bool(zeros))
            )
        for panels in graph.panels:
            parameters += self._parameters(
                panels.name, panels.weight.name, Matrix(panels.rows, panels.columns)
            )
        with self.bb.function("main", parameters):
            with self.bb.dataflow():
                for node in graph.proto.graph.node:
                    self._emit(node)
                result = self.bb.emit_output(relax.Tuple([self._tensor(name) for name in graph.outputs]))
            self.bb.emit_func_output(result)
        return self.bb.get()

    def _parameters(self, name: str, weight: str, matrix: Matrix) -> list[Any]:
        types = [self.relax.TensorType(shape, dtype) for shape, dtype in matrix.parts()]
        parts = [self.relax.Var(f"{name}.{i}", ty) for i, ty in enumerate(types)]
        self.matrices[weight] = parts, matrix
        return parts

    def _extent(self, text: str) -> Any:
        """A symbolic extent of the graph: "batch", or a sum, "past + sequence"."""
        names = [name.strip() for name in text.split("+")]
        for name in names:
            self.extents.setdefault(name, self.tirx.Var(name, "int64"))
        return functools.reduce(operator.add, (self.extents[name] for name in names))

    def _emit(self, node: onnx.NodeProto) -> None:
        emitter = self.emitters.get((node.domain, node.op_type))
        if emitter is None:
            raise EngineUnavailableError(
                f"tvm: node {node.name!r} ({node.op_type}) has no form in the fused profile for GPUs: "
                "use the portable one"
            )
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        try:
            results = emitter(node, attributes)
        except KeyError as error:
            raise FormatError(f"{node.name}: {node.op_type} lacks {error}") from error
        self.values.update(zip(node.output, results, strict=True))
        self.uses.subtract(node.input)

    # --- values ----------------------------------------------------------------------------------------------

    def _alone(self, name: str, kind: type) -> Any:
        """A value that is not computed yet and that only the node at hand reads, or None."""
        value = self.values.get(name)
        return value if isinstance(value, kind) and self.uses[name] == 1 else None

    def _tensor(self, name: str) -> Any:
        """A value as a tensor of its own shape."""
        if name in self.constants:
            return self.relax.const(self.constants[name])
        value = self.values[name] = self._computed(self.values[name])
        if isinstance(value, Columns):
            last, end = len(self._shape_of(value.source)) - 1, value.first + value.width
            return self.bb.emit(
                self.relax.op.strided_slice(self._whole(value.source), [last], [value.first], [end])
            )
        return self._whole(value)

    def _whole(self, value: Any) -> Any:
        return (
            self.bb.emit(self.relax.op.reshape(value.flat, value.shape)) if isinstance(value, Rows) else value
        )

    def _rows(self, value: Any) -> Any:
        """A computed value as rows (M, C)."""
        if isinstance(value, Rows):
            return value.flat
        shape = list(value.ty.shape)
        if len(shape) == 2:
            return value
        return self.bb.emit(self.relax.op.reshape(value, [_product(shape[:-1]), shape[-1]]))

    def _shape_of(self, value: Any) -> list[Any]:
        if isinstance(value, Rows):
            return value.shape
        if isinstance(value, Normed | Rotated):
            return self._shape_of(value.source)
        if isinstance(value, Mapped):
            return [*self._shape_of(value.x)[:-1], self.matrices[value.weight][1].rows]
        if isinstance(value, Columns):
            return [*self._shape_of(value.source)[:-1], value.width]
        return list(value.ty.shape)

    def _computed(self, value: Any) -> Any:
        """A value that kernels have computed: a tensor, Rows or Columns of one."""
        if isinstance(value, Mapped):
            return self._products([value])
        if isinstance(value, Normed):
            return self._norm_of(value, None)[0]
        if isinstance(value, Rotated):
            source = self._whole(self._computed(self._without_columns(value.source)))
            width = int(source.ty.shape[2])
            cos, sin = (self._tensor(name) for name in value.tables)
            function = tvm_gpu_rows.define_rotary(value.heads, width // value.heads, int(cos.ty.shape[0]))
            return self._call(function, [source, self._tensor(value.positions), cos, sin], source.ty.shape)
        return value

    def _without_columns(self, value: Any) -> Any:
        if not isinstance(value, Columns):
            return value
        last, end = len(self._shape_of(value.source)) - 1, value.first + value.width
        return self.bb.emit(
            self.relax.op.strided_slice(self._whole(value.source), [last], [value.first], [end])
        )

    def _call(self, function: Any, inputs: Sequence[Any], *shapes: Sequence[Any]) -> Any:
        """One result of a function of tvm_gpu, or several."""
        relax = self.relax
        types = [relax.TensorType(list(shape), "float32") for shape in shapes]
        place = self.bb.add_func(function, str(function.attrs[NAME]))
        result = self.bb.emit(relax.call_tir(place, list(inputs), types[0] if len(types) == 1 else types))
        return result if len(types) == 1 else [self.bb.emit(result[i]) for i in range(len(types))]

    # --- products --------------------------------------------------------------------------------------------

    def _products(self, maps: Sequence[Mapped], activation: str = "", residual: Any = None) -> Rows:
        """Products of one x in one kernel."""
        x = maps[0].x
        normed = x if isinstance(x, Normed) else None
        source = self._computed(x.source if isinstance(x, Normed) else x)
        parts = [self.matrices[each.weight] for each in maps]
        product = tvm_gpu_linear.Product(
            matrices=tuple(matrix for _, matrix in parts),
            biases=tuple(bool(each.bias) for each in maps),
            norm=normed.norm if normed else "none",
            epsilon=normed.epsilon if normed else 0.0,
            activation=activation or maps[0].activation,
            residual=residual is not None,
        )
        inputs = [self._rows(source), *(normed.parameters if normed else [])]
        inputs += [variable for variables, _ in parts for variable in variables]
        inputs += [self._tensor(each.bias) for each in maps if each.bias]
        inputs += [] if residual is None else [self._rows(residual)]
        shape = [*self._shape_of(source)[:-1], product.width]
        return Rows(
            self._call(tvm_gpu_linear.define(product), inputs, [inputs[0].ty.shape[0], product.width]), shape
        )

    def _joins(self, maps: Sequence[Any]) -> bool:
        """Whether values are products of one x that one kernel can compute."""
        if not all(isinstance(each, Mapped) and each.activation == "none" for each in maps):
            return False
        matrices = [self.matrices[each.weight][1] for each in maps]
        kinds = {(matrix.bits, matrix.group) for matrix in matrices}
        return len(kinds) == 1 and all(each.x is maps[0].x for each in maps)

    def _linear(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Sequence[Any]:
        if node.op_type == "QuantizedLinear":
            x, weight, _, _, bias = (*node.input, "", "")[:5]
        else:
            x, weight, bias = (*node.input, "")[:3]
        value = self._input(x)
        if weight in self.matrices:
            return [Mapped(value, weight, bias, attributes.get("activation", b"none").decode())]
        matrix = self._tensor(weight)
        if attributes.get("transposed"):
            matrix = self.relax.op.permute_dims(matrix)
        result = self.bb.emit(self.relax.op.matmul(self._tensor(x), matrix))
        return [self.bb.emit(self.relax.op.add(result, self._tensor(bias))) if bias else result]

    def _input(self, name: str) -> Any:
        """What products read: a normalisation as it is, and anything else computed."""
        value = self.values.get(name)
        if isinstance(value, Normed):
            return value
        value = (
            self._tensor(name)
            if name in self.constants or isinstance(value, Columns)
            else self._computed(value)
        )
        if name in self.values and not isinstance(self.values[name], Columns):
            self.values[name] = value
        return value

    def _mlp(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Sequence[Any]:
        x, w1, b1, w2, b2 = node.input
        if w1 not in self.matrices or w2 not in self.matrices:
            raise EngineUnavailableError(
                f"tvm: others read the matrices of node {node.name!r} ({node.op_type}), too, which has no form in the "
                "fused profile for GPUs: use the portable one"
            )
        tanh = attributes.get("approximate", b"none") == b"tanh"
        gelu = "gelu_tanh" if tanh else "gelu"
        inner = "relu_squared" if node.op_type == "ReluSquaredMlp" else gelu
        hidden = self._products([Mapped(self._input(x), w1, b1, inner)])
        return [Mapped(hidden, w2, b2, "none")]

    def _swiglu(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Sequence[Any]:
        gate, up = (self._alone(name, Mapped) for name in node.input)
        if gate and up and self._joins([gate, up]) and self._same_size(gate, up):
            return [self._products([gate, up], "swiglu")]
        gate, up = (self._tensor(name) for name in node.input)
        return [self.bb.emit(self.relax.op.multiply(self.bb.emit(self.relax.op.nn.silu(gate)), up))]

    def _same_size(self, first: Mapped, second: Mapped) -> bool:
        one, other = (self.matrices[each.weight][1].rows for each in (first, second))
        return one == other

    # --- sums and normalisations -----------------------------------------------------------------------------

    def _add(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Sequence[Any]:
        """A sum in the kernel of a product, where one of the two is one."""
        for name, other in (node.input, reversed(node.input)):
            product = self._alone(name, Mapped)
            if product is None or product.activation != "none" or other not in self.values or other == name:
                continue
            added = self.values[other]
            if _equal(self._shape_of(product), self._shape_of(added)):
                return [self._products([product], residual=self._plain(other))]
        return self._standard(node, attributes)

    def _plain(self, name: str) -> Any:
        """A value as a tensor or Rows."""
        value = self.values[name] = self._computed(self.values[name])
        return self._tensor(name) if isinstance(value, Columns) else value

    def _norm(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Sequence[Any]:
        x, *parameters = node.input
        return [self._normed(node, self._plain(x), parameters, attributes)]

    def _added_norm(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Sequence[Any]:
        """A sum, and its normalisation."""
        x, residual, *parameters = node.input
        product = self._alone(x, Mapped)
        if product is not None and product.activation == "none":
            total: Any = self._products([product], residual=self._plain(residual))
            return [self._normed(node, total, parameters, attributes), total]
        normed = self._normed(node, self._plain(x), parameters, attributes)
        return self._norm_of(normed, self._plain(residual))

    def _normed(
        self, node: onnx.NodeProto, source: Any, parameters: Sequence[str], attributes: Mapping[str, Any]
    ) -> Normed:
        norm = "layer" if node.op_type.endswith("LayerNorm") else "rms"
        default = next(a.default for a in nodes()[node.op_type].attributes if a.name == "epsilon")
        epsilon = float(attributes.get("epsilon", default))
        return Normed(source, norm, [self._tensor(name) for name in parameters], epsilon)

    def _norm_of(self, value: Normed, added: Any) -> list[Any]:
        shape = self._shape_of(value.source)
        x = self._rows(value.source)
        function = tvm_gpu_rows.define_norm(value.norm, int(shape[-1]), value.epsilon, added is not None)
        inputs = [x, *([] if added is None else [self._rows(added)]), *value.parameters]
        results = self._call(function, inputs, *[x.ty.shape] * (1 if added is None else 2))
        return [Rows(flat, shape) for flat in ([results] if added is None else results)]

    # --- attention and tables --------------------------------------------------------------------------------

    def _rotary(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Sequence[Any]:
        x, positions, cos, sin = node.input
        value = self.values[x]
        if not isinstance(value, Columns) and self._alone(x, Mapped) is None:
            value = self._plain(x)
        if len(self._shape_of(value)) == 4:  # (B, T, H, D) as (B, T, H D)
            shape = self._shape_of(value)
            flat = self.bb.emit(
                self.relax.op.reshape(self._whole(self._without_columns(value)), [*shape[:2], -1])
            )
            turned = self._computed(Rotated(flat, positions, (cos, sin), int(shape[2])))
            return [self.bb.emit(self.relax.op.reshape(turned, shape))]
        return [Rotated(value, positions, (cos, sin), int(attributes["num_heads"]))]

    def _attention(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Sequence[Any]:
        names = node.input[:3]
        past_key, past_value, mask = (self._tensor(name) for name in node.input[3:])
        batch, kv_heads, past, width = past_key.ty.shape
        heads = int(attributes["num_heads"])
        values = [self.values[name] for name in names]
        alone = all(self.uses[name] == 1 for name in names)
        turns = [value for value in values[:2] if isinstance(value, Rotated)]
        rotation = turns[0] if alone and len(turns) == 2 and _same_tables(*turns) else None
        if rotation is not None:
            values = [*(turn.source for turn in turns), values[2]]
        if alone and self._joins(values):
            joined = self._products(values)
            ends = [self.matrices[each.weight][1].rows for each in values]
            values = [Columns(joined, sum(ends[:i]), end) for i, end in enumerate(ends)]
        parts = [self._computed(value) for value in values]
        parts = [
            part if isinstance(part, Columns) else Columns(part, 0, int(self._shape_of(part)[-1]))
            for part in parts
        ]
        sources = tuple((int(self._shape_of(part.source)[-1]), part.first) for part in parts)
        tables = [] if rotation is None else [self._tensor(name) for name in rotation.tables]
        function = tvm_gpu_attention.define(
            tvm_gpu_attention.Attention(
                heads,
                int(kv_heads),
                int(width),
                float(attributes["scale"]),
                int(attributes.get("window", 0)),
                float(attributes.get("softcap", 0.0)),
                sources,  # type: ignore[arg-type]
                int(tables[0].ty.shape[0]) if tables else 0,
            )
        )
        inputs = [*(self._rows(part.source) for part in parts), past_key, past_value, mask]
        inputs += [] if rotation is None else [self._tensor(rotation.positions), *tables]
        sequence = self._shape_of(parts[0].source)[1]
        grown = [batch, kv_heads, past + sequence, width]
        out = [batch, sequence, heads * int(width)]
        results: Sequence[Any] = self._call(function, inputs, out, grown, grown)
        return results

    def _embedding(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Sequence[Any]:
        ids, weight = self._tensor(node.input[0]), node.input[1]
        shape = list(ids.ty.shape)
        if weight not in self.matrices:
            return [self.bb.emit(self.relax.op.take(self._tensor(weight), ids, axis=0, mode="clip"))]
        parts, matrix = self.matrices[weight]
        flat = self.bb.emit(self.relax.op.reshape(ids, [_product(shape)]))
        rows = self._call(
            tvm_gpu_linear.define_rows(matrix), [flat, *parts], [flat.ty.shape[0], matrix.columns]
        )
        return [Rows(rows, [*shape, matrix.columns])]

    # --- standard operators ----------------------------------------------------------------------------------

    def _standard(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> Sequence[Any]:
        structural = STRUCTURAL.get(node.op_type, ())
        inputs = [
            self.constants[name] if i in structural else self._tensor(name)
            for i, name in enumerate(node.input)
        ]
        return [self.bb.emit(emitters()[node.op_type](inputs, attributes))]

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
        source, axis = self._plain(node.input[0]), int(attributes["axis"])
        if len(node.input) > 1:
            ends = self.constants[node.input[1]].cumsum().tolist()
        else:
            part = int(self._shape_of(source)[axis]) // len(node.output)
            ends = [part * (place + 1) for place in range(len(node.output))]
        if axis in (-1, len(self._shape_of(source)) - 1):
            return [Columns(source, first, end - first) for first, end in zip([0, *ends], ends, strict=False)]
        parts = self.bb.emit(self.relax.op.split(self._whole(source), ends[:-1], axis))
        return [self.bb.emit(self.relax.TupleGetItem(parts, place)) for place in range(len(ends))]


def _product(sizes: Sequence[Any]) -> Any:
    return functools.reduce(operator.mul, sizes, 1)


def _equal(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Whether two shapes are the same, whatever the symbols in them stand for."""
    return len(first) == len(second) and all(
        str(one) == str(other) for one, other in zip(first, second, strict=True)
    )


def _same_tables(first: Rotated, second: Rotated) -> bool:
    return (first.positions, first.tables) == (second.positions, second.tables)


def in_panels(graph: Graph) -> Graph:
    """The graph with matrices in the form that kernels for GPUs read: numbers in panels, 16 bits as float32."""
    halves = [matrix for matrix in graph.packed if matrix.bits == BITS]
    numbers = tuple(
        msgspec.structs.replace(matrix, panels=True) for matrix in graph.packed if matrix.bits != BITS
    )
    panels = tuple(Panels(matrix.name, matrix.weight, turned=False) for matrix in halves)
    return replace(graph, packed=numbers, panels=(*graph.panels, *panels))
