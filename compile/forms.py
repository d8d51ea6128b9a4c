"""The two profiles of a graph, and the operators that each may hold: what each takes, gives and says.

`portable` is standard ONNX of opset 20, `fused` one node of domain ai.portlm per op, which each engine's lowering
replaces by its best. Both are written by compile/capture.py from the ops' descriptions (core/ops/spec.py), which say
what the nodes of ai.portlm take and give. compile/check.py refuses a graph with anything that is not in the tables
below: they say what export and lowering write, which is less than what an engine would take.

Inputs    input_ids (B, T), attention_mask (B, P+T), position_ids (B, T), logits_to_keep (kept) int64,
          past_key_values.N.key and .value (B, K, P, D) float32, or int8 beside .key.scale and .value.scale (B, K, P, 1)
Outputs   logits (B, kept, V), present.N.key and .value (B, K, P+T, D) float32, or as they came in
Weights   of linear layers are stored (in, out); a table that is also the head is stored (V, C).
Padding   is on the left: mask 0, and position_ids = max(cumsum(mask) - 1, 0). Logits of padded positions are
          finite and mean nothing.

What the portable profile avoids, each for a measured reason:
- int64 arithmetic and Cast from int64: the WebGPU provider has neither, so masks and positions become float32 by
  Gather from a small table, which it has;
- booleans and infinities: TVM's WGSL cannot pass the first between kernels nor spell the second, so the causal
  mask is arithmetic, -1e30 * relu(key position - query position);
- places in a table that are computed, as those of a search, are float32, exact up to 2^24, until Gather takes them;
- whole numbers of quantized weights: they are cast to float32 as they come out of the file, and 4 bits are taken
  apart by Floor; weights of 16 bits are cast there, too, and nothing is computed in less than float32;
- CumSum over the last axis: wrong on TVM's WebGPU target, right over the first, so the mask is transposed around it;
- Shape and Slice: TVM needs to know shapes, so head splits are Reshape to (0, 0, H, D), which copies B and T.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from portlm.ops import spec
from portlm.ops.registry import nodes
from portlm.ops.spec import DOMAIN, DOMAIN_VERSION
from portlm.plan import MAX_RANK
from portlm.roles import MAX_DIMENSION

OPSET = 20  # Gelu is standard from 20 on; ONNX Runtime and TVM's importer both read it
IR_VERSION = 9  # the oldest container that carries opset 20, so that older engines open the file
ALIGNMENT = 64  # bytes, of weights in their file: one cache line, and the widest vector register

# Profile -> operator set versions besides the standard one.
PROFILES: dict[str, dict[str, int]] = {"portable": {}, "fused": {DOMAIN: DOMAIN_VERSION}}


@dataclass(frozen=True)
class Operand:
    """One input or output of an operator.

    Attributes:
        kind: "float32", "int64", "int32", "uint8", "int8", several with "|" between them, or "" for the one type that
            all operands of the node without a kind have.
        constant: the least and the greatest element, if it must be an int64 constant in the graph.
        optional: may be left out.
        absent: is never there; "" keeps the places of those behind it.
        many: stands for one or more, the last of its list.
        small: may be uint8, int8, float16 or bfloat16 as well, where it has no kind.
    """

    kind: str = ""
    constant: tuple[int, int] | None = None
    optional: bool = False
    absent: bool = False
    many: bool = False
    small: bool = False


@dataclass(frozen=True)
class Setting:
    """One attribute of an operator.

    Attributes:
        kind: int, float (finite), str, or tuple for a permutation of the axes.
        values: the least and the greatest of an int, all those of a str.
        required: must be written.
    """

    kind: type
    values: tuple[int, int] | tuple[str, ...] = ()
    required: bool = True


@dataclass(frozen=True)
class Form:
    """How an operator is written: its inputs and outputs in order, and its attributes by name."""

    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...] = (Operand(),)
    attributes: Mapping[str, Setting] = field(default_factory=dict)


ANY, FLOAT, INDEX, INT32 = Operand(), Operand("float32"), Operand("int64"), Operand("int32")
PLACE = Operand(
    "place"
)  # an int32 that is looked up by and nothing else: no other operator takes it for its int32
SMALL, BYTES, SIGNED = Operand(small=True), Operand("uint8"), Operand("int8")
OPTIONAL, OPTIONAL_BYTES = Operand("float32", optional=True), Operand("uint8", optional=True)
ABSENT, MANY = Operand(absent=True), Operand(many=True)
NEITHER = Operand(absent=True, optional=True)  # never there, and its place need not be kept
MANY_SMALL = Operand(many=True, small=True)
AXES = Operand("int64", constant=(-MAX_RANK, MAX_RANK - 1))
SHAPE = Operand("int64", constant=(-1, MAX_DIMENSION))

AXIS = Setting(int, (-MAX_RANK, MAX_RANK - 1))
COUNT = Setting(int, (1, MAX_DIMENSION))
FLAG = Setting(int, (0, 1))
BITS = Setting(int, (4, 8))
ROWS = Setting(int, (0, 0))
NUMBER = Setting(float)
GELU = Setting(str, ("none", "tanh"))

_UNARY, _BINARY = Form((FLOAT,), (FLOAT,)), Form((FLOAT, FLOAT), (FLOAT,))

# What a Cast takes and gives, by its attribute: small weights or a cache of bytes to float32, what such a cache keeps
# to int8, and a place that was computed to int32, by which Gather looks up a table.
CASTS: dict[int, Form] = {
    1: Form((Operand("uint8|int8|float16|bfloat16"),), (FLOAT,)),
    3: Form((FLOAT,), (SIGNED,)),
    6: Form((FLOAT,), (PLACE,)),
}

PORTABLE_OPS: dict[str, Form] = {
    "Abs": _UNARY,
    "Add": _BINARY,
    "Cast": Form((SMALL,), (SMALL,), {"to": Setting(int, (1, 6))}),  # see CASTS
    "Concat": Form((MANY_SMALL,), (SMALL,), {"axis": AXIS}),
    "CumSum": Form((FLOAT, AXES), (FLOAT,)),
    "Div": _BINARY,
    "Exp": _UNARY,
    "Floor": _UNARY,
    "Gather": Form((SMALL, Operand("int64|place")), (SMALL,), attributes={"axis": AXIS}),
    "Gelu": Form((FLOAT,), (FLOAT,), {"approximate": GELU}),
    "LayerNormalization": Form((FLOAT,) * 3, (FLOAT,), {"axis": AXIS, "epsilon": NUMBER}),
    "MatMul": _BINARY,
    "Max": _BINARY,
    "Mul": _BINARY,
    "ReduceMax": Form((FLOAT, AXES), (FLOAT,), {"keepdims": FLAG}),
    "ReduceMean": Form((FLOAT, AXES), (FLOAT,), {"keepdims": FLAG}),
    "Relu": _UNARY,
    "Reshape": Form((SMALL, SHAPE), (SMALL,)),
    "Round": _UNARY,
    "Sigmoid": _UNARY,
    "Softmax": Form((FLOAT,), (FLOAT,), {"axis": AXIS}),
    # Either says the sizes of its parts or, where they are equal, their number: check.py sees to it.
    "Split": Form(
        (ANY, Operand("int64", constant=(0, MAX_DIMENSION), optional=True)),
        (MANY,),
        {"axis": AXIS, "num_outputs": Setting(int, (1, MAX_DIMENSION), required=False)},
    ),
    "Sqrt": _UNARY,
    "Sub": _BINARY,
    "Tanh": _UNARY,
    "Transpose": Form((ANY,), attributes={"perm": Setting(tuple)}),
    "Unsqueeze": Form((ANY, AXES)),
}

WHOLE_OPS: dict[
    str, Form
] = {  # on int64, in graphs lowered for ONNX Runtime: how many slots GroupQueryAttention sees
    "Cast": Form((INDEX,), (INT32,), {"to": Setting(int, (6, 6))}),
    "Shape": Form((INDEX,), (INDEX,), {"start": Setting(int, (1, 1)), "end": Setting(int, (2, 2))}),
    "Sub": Form((INDEX, INDEX), (INDEX,)),
}

# Which inputs GroupQueryAttention has, 1 for each that is there, by its attribute do_rotary: with a bias for calls with
# padding, and without for others, where queries, keys and values may be one.
GROUPED: dict[int | None, tuple[str, ...]] = {
    None: ("11111110001",),
    0: ("1111111", "1001111"),
    1: ("111111111", "100111111"),
}

_SUM_AND_NORM = (FLOAT, ABSENT, ABSENT, FLOAT)  # without the mean and the deviation
CONTRIB_OPS: dict[str, Form] = {  # of domain com.microsoft, in graphs lowered for ONNX Runtime
    "BiasGelu": _BINARY,
    "FastGelu": _BINARY,
    "FusedMatMul": Form((FLOAT, FLOAT), (FLOAT,), {"transB": FLAG}),
    # data, indices, scales, zero points
    "GatherBlockQuantized": Form(
        (BYTES, INDEX, FLOAT, OPTIONAL_BYTES),
        (FLOAT,),
        {"bits": BITS, "block_size": COUNT, "gather_axis": ROWS, "quantize_axis": Setting(int, (1, 1))},
    ),
    # query, key, value, past key and value, slots of each row less one, slots, no rotation, attention bias
    # query, key, value or all three as one, past key and value, last slots, slots, cos, sin, no positions, bias
    "GroupQueryAttention": Form(
        (FLOAT, OPTIONAL, OPTIONAL, FLOAT, FLOAT, INT32, INT32, OPTIONAL, OPTIONAL, NEITHER, OPTIONAL),
        (FLOAT,) * 3,
        {
            "do_rotary": Setting(int, (0, 1), required=False),
            "kv_num_heads": COUNT,
            "local_window_size": Setting(int, (1, MAX_DIMENSION), required=False),
            "num_heads": COUNT,
            "scale": NUMBER,
            "softcap": Setting(float, required=False),
        },
    ),
    # input, weight, scales, zero points, no order of the groups, bias
    "MatMulNBits": Form(
        (FLOAT, BYTES, FLOAT, OPTIONAL_BYTES, NEITHER, OPTIONAL),
        (FLOAT,),
        {"K": COUNT, "N": COUNT, "accuracy_level": Setting(int, (0, 4)), "bits": BITS, "block_size": COUNT},
    ),
    # query, key, value, no bias, padding mask, attention bias, past key and value
    "MultiHeadAttention": Form(
        (FLOAT, FLOAT, FLOAT, NEITHER, Operand("int32", optional=True), OPTIONAL, OPTIONAL, OPTIONAL),
        (FLOAT, OPTIONAL, OPTIONAL),
        {"mask_filter_value": Setting(float, required=False), "num_heads": COUNT, "scale": NUMBER},
    ),
    "QuickGelu": Form((FLOAT,), (FLOAT,), {"alpha": NUMBER}),
    "RotaryEmbedding": Form((FLOAT, INDEX, FLOAT, FLOAT), (FLOAT,)),
    "SkipLayerNormalization": Form((FLOAT,) * 4, _SUM_AND_NORM, {"epsilon": NUMBER}),
    "SkipSimplifiedLayerNormalization": Form((FLOAT,) * 3, _SUM_AND_NORM, {"epsilon": NUMBER}),
}


def _fused(node: spec.Node) -> Form:
    """The form of a node of ai.portlm. An attribute that has its default is not written."""
    counts = {i.heads for i in node.inputs} | {node.output_heads}

    def setting(attribute: spec.Attribute) -> Setting:
        values: tuple[int, int] | tuple[str, ...] = attribute.choices
        if attribute.kind is int:
            values = (1 if attribute.name in counts else 0, MAX_DIMENSION)
        return Setting(attribute.kind, values, attribute.default is None)

    return Form(
        tuple(Operand(i.dtype, optional=i.optional) for i in node.inputs),
        tuple(map(Operand, node.kinds)) or (FLOAT,) * len(node.outputs),
        {attribute.name: setting(attribute) for attribute in node.attributes},
    )


FUSED_OPS: dict[str, Form] = {op_type: _fused(node) for op_type, node in nodes().items()}
