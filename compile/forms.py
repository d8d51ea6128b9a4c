"""The two profiles of a graph, and the operators that each may hold, with their attributes.

`portable` is standard ONNX of opset 20, `fused` one node of domain ai.portlm per op, which each engine's lowering
replaces by its best. Both are written by compile/capture.py from the ops' descriptions (core/ops/spec.py), which say
what the nodes of ai.portlm take and give.

Inputs    input_ids (B, T), attention_mask (B, P+T), position_ids (B, T), logits_to_keep (kept) int64,
          past_key_values.N.key and .value (B, K, P, D) float32
Outputs   logits (B, kept, V), present.N.key and .value (B, K, P+T, D) float32
Weights   of linear layers are stored (in, out); a table that is also the head is stored (V, C).
Padding   is on the left: mask 0, and position_ids = max(cumsum(mask) - 1, 0). Logits of padded positions are
          finite and mean nothing.

What the portable profile avoids, each for a measured reason:
- int64 arithmetic and Cast from int64: the WebGPU provider has neither, so masks and positions become float32 by
  Gather from a small table, which it has;
- booleans and infinities: TVM's WGSL cannot pass the first between kernels nor spell the second, so the causal
  mask is arithmetic, -1e30 * relu(key position - query position);
- CumSum over the last axis: wrong on TVM's WebGPU target, right over the first, so the mask is transposed around it;
- Shape and Slice: TVM needs to know shapes, so head splits are Reshape to (0, 0, H, D), which copies B and T.
"""

from portlm.ops.registry import nodes
from portlm.ops.spec import DOMAIN, DOMAIN_VERSION

# Profile -> operator set versions besides the standard one.
PROFILES: dict[str, dict[str, int]] = {"portable": {}, "fused": {DOMAIN: DOMAIN_VERSION}}

# Operator -> the attributes it may carry. compile/check.py refuses a graph with anything else.
PORTABLE_OPS: dict[str, tuple[str, ...]] = {
    "Add": (),
    "Concat": ("axis",),
    "CumSum": (),
    "Div": (),
    "Exp": (),
    "Gather": ("axis",),
    "Gelu": ("approximate",),
    "LayerNormalization": ("axis", "epsilon"),
    "MatMul": (),
    "Mul": (),
    "ReduceMean": ("keepdims",),
    "Relu": (),
    "Reshape": (),
    "Sigmoid": (),
    "Softmax": ("axis",),
    "Split": ("axis", "num_outputs"),
    "Sqrt": (),
    "Sub": (),
    "Transpose": ("perm",),
    "Unsqueeze": (),
}
FUSED_OPS: dict[str, tuple[str, ...]] = {
    op_type: tuple(attribute.name for attribute in node.attributes) for op_type, node in nodes().items()
}
CONTRIB_OPS: dict[str, tuple[str, ...]] = {  # of domain com.microsoft, in graphs lowered for ONNX Runtime
    "BiasGelu": (),
    "FastGelu": (),
    "FusedMatMul": ("transB",),
    "MultiHeadAttention": ("num_heads", "scale"),
    "QuickGelu": ("alpha",),
    "RotaryEmbedding": (),
    "SkipLayerNormalization": ("epsilon",),
    "SkipSimplifiedLayerNormalization": ("epsilon",),
}
