"""The graph form of every op, in two profiles, behind one interface.

A family (compile/families/) describes its decoder once by calling these methods; `Portable` answers with standard
ONNX operators, `Fused` with one node of domain ai.portlm per op, which each engine's lowering replaces by its best.

Inputs    input_ids (B, T), attention_mask (B, P+T), position_ids (B, T) int64,
          past_key_values.N.key and .value (B, K, P, D) float32
Outputs   logits (B, T, V), present.N.key and .value (B, K, P+T, D) float32
Weights   of linear layers are stored (in, out); a table that is also the head is stored (V, C).
Padding   is on the left: mask 0, and position_ids = max(cumsum(mask) - 1, 0). Logits of padded positions are
          finite and mean nothing.

Nodes of domain ai.portlm, version 1 (all values float32 unless said; B batch, T time, P past, C width, F hidden
width, H query heads, K key/value heads, D head width, V vocabulary):

  Embedding(ids (B, T) int64, weight (V, C)) -> (B, T, C)
  Linear(x (B, T, I), weight (I, O), bias (O)?) -> (B, T, O); attribute transposed = 1: the weight is (O, I)
  LayerNorm(x, weight (C), bias (C)) -> y; attribute epsilon
  AddLayerNorm(x, residual, weight (C), bias (C)) -> y, h; h = x + residual, y = LayerNorm(h); attribute epsilon
  RmsNorm(x, weight (C)) -> y; AddRmsNorm(x, residual, weight (C)) -> y, h; attribute epsilon
  Rotary(x (B, T, H*D), position_ids (B, T) int64, cos (context, D/2), sin (context, D/2)) -> (B, T, H*D);
      attribute num_heads; within a head, (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), halves split at D/2
  CachedAttention(q (B, T, H*D), k (B, T, K*D), v (B, T, K*D), past_key (B, K, P, D), past_value (B, K, P, D),
      attention_mask (B, P+T) int64) -> out (B, T, H*D), present_key (B, K, P+T, D), present_value;
      attributes num_heads, num_kv_heads, scale; query i sees slot j iff j <= P + i and mask[b, j] != 0
  GeluMlp(x (B, T, C), w1 (C, F), b1 (F), w2 (F, C), b2 (C)) -> (B, T, C); attribute approximate: "tanh" or "none"
  SwiGlu(gate (B, T, F), up (B, T, F)) -> silu(gate) * up

Beside them the fused profile has standard Add (the two embeddings of GPT-2) and Split (GPT-2's joint q, k, v).

What the portable profile avoids, each for a measured reason:
- int64 arithmetic and Cast from int64: the WebGPU provider has neither, so masks and positions become float32 by
  Gather from a small table, which it has;
- booleans and infinities: TVM's WGSL cannot pass the first between kernels nor spell the second, so the causal
  mask is arithmetic, -1e30 * relu(key position - query position);
- CumSum over the last axis: wrong on TVM's WebGPU target, right over the first, so the mask is transposed around it;
- Shape and Slice: TVM needs to know shapes, so head splits are Reshape to (0, 0, H, D), which copies B and T.
"""

from typing import ClassVar, Protocol

import numpy as np

from portlm.compile.graph import GraphBuilder

DOMAIN = "ai.portlm"
DOMAIN_VERSION = 1

MASKED = -1e30  # times a whole number of positions: far below any score, and still finite in float32
FAR = float(2**20)  # a position beyond any context: where masked slots are put

# Operator -> the attributes it may carry. compile/check.py refuses a graph with anything else.
PORTABLE_OPS = {
    "Add": (),
    "Concat": ("axis",),
    "CumSum": (),
    "Div": (),
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
FUSED_OPS = {
    "AddLayerNorm": ("epsilon",),
    "AddRmsNorm": ("epsilon",),
    "CachedAttention": ("num_heads", "num_kv_heads", "scale"),
    "Embedding": (),
    "GeluMlp": ("approximate",),
    "LayerNorm": ("epsilon",),
    "Linear": ("transposed",),
    "RmsNorm": ("epsilon",),
    "Rotary": ("num_heads",),
    "SwiGlu": (),
}
CONTRIB_OPS = {  # of domain com.microsoft, in graphs lowered for ONNX Runtime (compile/ort_lowering.py)
    "BiasGelu": (),
    "FastGelu": (),
    "FusedMatMul": ("transB",),
    "MultiHeadAttention": ("num_heads", "scale"),
    "QuickGelu": ("alpha",),
    "RotaryEmbedding": (),
    "SkipLayerNormalization": ("epsilon",),
    "SkipSimplifiedLayerNormalization": ("epsilon",),
}


class Forms(Protocol):
    """What a family may call. Values are SSA names; `name` is a module path, under which its parameters are found."""

    g: GraphBuilder

    def embedding(self, ids: str, name: str) -> str:
        """Rows of {name}.weight (V, C): (B, T) int64 -> (B, T, C)."""

    def linear(self, x: str, name: str) -> str:
        """Return x @ {name}.weight (I, O) + {name}.bias, if there is one: (B, T, I) -> (B, T, O)."""

    def tied_head(self, x: str, table: str) -> str:
        """Logits x @ {table}.weight (V, C) transposed: (B, T, C) -> "logits" (B, T, V)."""

    def head(self, x: str, name: str) -> str:
        """Logits x @ {name}.weight (C, V): (B, T, C) -> "logits" (B, T, V)."""

    def layer_norm(self, x: str, name: str, epsilon: float) -> str:
        """Normalise (B, T, C) over C, times {name}.weight plus {name}.bias."""

    def add_layer_norm(self, x: str, residual: str, name: str, epsilon: float) -> tuple[str, str]:
        """(y, h) with h = x + residual and y = layer_norm(h)."""

    def rms_norm(self, x: str, name: str, epsilon: float) -> str:
        """Return x / sqrt(mean(x^2) + epsilon) * {name}.weight over the last axis of (B, T, C)."""

    def add_rms_norm(self, x: str, residual: str, name: str, epsilon: float) -> tuple[str, str]:
        """(y, h) with h = x + residual and y = rms_norm(h)."""

    def mask(self, attention_mask: str, position_ids: str, context: int, group: int) -> str:
        """Prepare, once per step, what attention needs to know about who sees whom; group = H / K."""

    def rotation(self, position_ids: str, cos: str, sin: str) -> tuple[str, ...]:
        """Prepare, once per step, the angles of the tables cos and sin (context, D/2) at the positions."""

    def heads(self, x: str, count: int, width: int, name: str) -> str:
        """See (B, T, count * width) as heads."""

    def rotary(self, x: str, rotation: tuple[str, ...], count: int, name: str) -> str:
        """Rotate each of the `count` heads of x by its position's angles."""

    def attention(
        self,
        q: str,
        k: str,
        v: str,
        mask: str,
        layer: int,
        n_head: int,
        n_kv_head: int,
        head_dim: int,
        name: str,
    ) -> str:
        """Append k and v to the layer's cache and attend: heads -> (B, T, H*D)."""

    def gelu_mlp(self, x: str, name: str, fc: str, proj: str, approximate: str) -> str:
        """{name}.{proj}(gelu({name}.{fc}(x))): (B, T, C) -> (B, T, C)."""

    def swiglu(self, gate: str, up: str, name: str) -> str:
        """silu(gate) * up for two values (B, T, F)."""


class Portable:
    """Standard operators of opset 20 only."""

    profile = "portable"
    domains: ClassVar[dict[str, int]] = {}

    def __init__(self, g: GraphBuilder):
        self.g = g

    def embedding(self, ids: str, name: str) -> str:  # noqa: D102 (the protocol documents every method)
        return self.g.op("Gather", (self.g.weight(f"{name}.weight"), ids), name, axis=0)

    def linear(self, x: str, name: str) -> str:  # noqa: D102
        if not self.g.has_weight(f"{name}.bias"):
            return self.g.op("MatMul", (x, self.g.weight(f"{name}.weight")), name)
        product = self.g.op("MatMul", (x, self.g.weight(f"{name}.weight")), f"{name}.matmul")
        return self.g.op("Add", (product, self.g.weight(f"{name}.bias")), name)

    def tied_head(self, x: str, table: str) -> str:  # noqa: D102
        weight = self.g.op("Transpose", (self.g.weight(f"{table}.weight"),), "logits.weight", perm=[1, 0])
        return self.g.op("MatMul", (x, weight), "logits")

    def head(self, x: str, name: str) -> str:  # noqa: D102
        return self.g.op("MatMul", (x, self.g.weight(f"{name}.weight")), "logits")

    def layer_norm(self, x: str, name: str, epsilon: float) -> str:  # noqa: D102
        inputs = (x, self.g.weight(f"{name}.weight"), self.g.weight(f"{name}.bias"))
        return self.g.op("LayerNormalization", inputs, name, axis=-1, epsilon=epsilon)

    def add_layer_norm(self, x: str, residual: str, name: str, epsilon: float) -> tuple[str, str]:  # noqa: D102
        h = self.g.op("Add", (x, residual), f"{name}.input")
        return self.layer_norm(h, name, epsilon), h

    def rms_norm(self, x: str, name: str, epsilon: float) -> str:  # noqa: D102
        square = self.g.op("Mul", (x, x), f"{name}.square")
        mean = self.g.op("ReduceMean", (square, self.g.ints(-1)), f"{name}.mean", keepdims=1)
        shifted = self.g.op("Add", (mean, self.g.scalar(epsilon)), f"{name}.variance")
        root = self.g.op("Sqrt", (shifted,), f"{name}.rms")
        scaled = self.g.op("Div", (x, root), f"{name}.normed")
        return self.g.op("Mul", (scaled, self.g.weight(f"{name}.weight")), name)

    def add_rms_norm(self, x: str, residual: str, name: str, epsilon: float) -> tuple[str, str]:  # noqa: D102
        h = self.g.op("Add", (x, residual), f"{name}.input")
        return self.rms_norm(h, name, epsilon), h

    def mask(self, attention_mask: str, position_ids: str, context: int, group: int) -> str:
        """The attention bias (B, 1, group*T, P+T): 0 where a query may look, at most -1e30 where not.

        With left padding the position of slot j is the number of mask ones before it, so it need not be given:
        cumsum(mask)[j] - 1. Masked slots are put FAR away. Both are float32, exact up to 2^24.
        """
        g = self.g
        ones = g.op("Gather", (g.floats("mask.values", np.arange(2)), attention_mask), "mask.ones", axis=0)
        columns = g.op("Transpose", (ones,), "mask.columns", perm=[1, 0])  # (P+T, B)
        counted = g.op("CumSum", (columns, g.axis(0)), "mask.counted")
        rows = g.op("Transpose", (counted,), "mask.rows", perm=[1, 0])
        near = g.op("Mul", (ones, g.scalar(FAR)), "mask.near")
        slots = g.op(
            "Sub", (rows, near), "mask.slots"
        )  # position + 1 - FAR, or number seen so far where masked
        keys = g.op("Unsqueeze", (slots, g.ints(1, 2)), "mask.keys")  # (B, 1, 1, P+T)
        table = g.floats("mask.positions", np.arange(context, dtype=np.float32) + 1 - FAR)
        positions = g.op("Gather", (table, position_ids), "mask.positions_at", axis=0)
        queries = g.op("Unsqueeze", (positions, g.ints(1, 3)), "mask.queries")  # (B, 1, T, 1)
        ahead = g.op("Sub", (keys, queries), "mask.ahead")  # (B, 1, T, P+T)
        hidden = g.op("Relu", (ahead,), "mask.hidden")
        bias = g.op("Mul", (hidden, g.scalar(MASKED)), "mask.bias")
        return bias if group == 1 else g.op("Concat", [bias] * group, "mask.grouped", axis=2)

    def rotation(self, position_ids: str, cos: str, sin: str) -> tuple[str, ...]:  # noqa: D102
        g, angles = self.g, []
        for table in (cos, sin):
            rows = g.op("Gather", (g.weight(table), position_ids), f"{table}.rows", axis=0)
            angles.append(g.op("Unsqueeze", (rows, g.ints(2)), f"{table}.heads"))  # (B, T, 1, D/2)
        return tuple(angles)

    def heads(self, x: str, count: int, width: int, name: str) -> str:  # noqa: D102
        return self.g.op("Reshape", (x, self.g.ints(0, 0, count, width)), f"{name}.heads")

    def rotary(self, x: str, rotation: tuple[str, ...], count: int, name: str) -> str:  # noqa: D102
        g, (cos, sin) = self.g, rotation
        name = f"{name}.rotary"
        x1, x2 = g.split_op(
            "Split", (x,), f"{name}.halves", (f"{name}.x1", f"{name}.x2"), axis=-1, num_outputs=2
        )
        first = g.op("Mul", (x1, cos), f"{name}.x1_cos"), g.op("Mul", (x2, sin), f"{name}.x2_sin")
        second = g.op("Mul", (x2, cos), f"{name}.x2_cos"), g.op("Mul", (x1, sin), f"{name}.x1_sin")
        y1, y2 = g.op("Sub", first, f"{name}.y1"), g.op("Add", second, f"{name}.y2")
        return g.op("Concat", (y1, y2), name, axis=-1)

    def attention(
        self,
        q: str,
        k: str,
        v: str,
        mask: str,
        layer: int,
        n_head: int,
        n_kv_head: int,
        head_dim: int,
        name: str,
    ) -> str:
        """Attention over the cache in plain products.

        The queries that share a key/value head are stacked along time, (B, K, G*T, D), so that grouped heads need
        no copy of the cache and each product has only two matrices per head.
        """
        g, group = self.g, n_head // n_kv_head
        keys = g.op("Transpose", (k,), f"{name}.keys", perm=[0, 2, 1, 3])  # (B, K, T, D)
        values = g.op("Transpose", (v,), f"{name}.values", perm=[0, 2, 1, 3])
        keys = g.op("Concat", (f"past_key_values.{layer}.key", keys), f"present.{layer}.key", axis=2)
        values = g.op("Concat", (f"past_key_values.{layer}.value", values), f"present.{layer}.value", axis=2)

        q = g.op("Mul", (q, g.scalar(head_dim**-0.5)), f"{name}.scaled")
        if group == 1:
            q = g.op("Transpose", (q,), f"{name}.queries", perm=[0, 2, 1, 3])  # (B, H, T, D)
        else:
            q = g.op("Reshape", (q, g.ints(0, 0, n_kv_head, group, head_dim)), f"{name}.groups")
            q = g.op("Transpose", (q,), f"{name}.grouped", perm=[0, 2, 3, 1, 4])  # (B, K, G, T, D)
            q = g.op("Reshape", (q, g.ints(0, 0, -1, head_dim)), f"{name}.queries")  # (B, K, G*T, D)
        across = g.op("Transpose", (keys,), f"{name}.keys_across", perm=[0, 1, 3, 2])  # (B, K, D, P+T)
        scores = g.op("MatMul", (q, across), f"{name}.scores")  # (B, K, G*T, P+T)
        biased = g.op("Add", (scores, mask), f"{name}.biased")
        shares = g.op("Softmax", (biased,), f"{name}.shares", axis=-1)
        out = g.op("MatMul", (shares, values), f"{name}.context")  # (B, K, G*T, D)
        if group == 1:
            out = g.op("Transpose", (out,), f"{name}.joined", perm=[0, 2, 1, 3])  # (B, T, H, D)
        else:
            out = g.op("Reshape", (out, g.ints(0, 0, group, -1, head_dim)), f"{name}.ungrouped")
            out = g.op("Transpose", (out,), f"{name}.joined", perm=[0, 3, 1, 2, 4])  # (B, T, K, G, D)
        return g.op("Reshape", (out, g.ints(0, 0, n_head * head_dim)), name)

    def gelu_mlp(self, x: str, name: str, fc: str, proj: str, approximate: str) -> str:  # noqa: D102
        hidden = self.linear(x, f"{name}.{fc}")
        hidden = self.g.op("Gelu", (hidden,), f"{name}.act", approximate=approximate)
        return self.linear(hidden, f"{name}.{proj}")

    def swiglu(self, gate: str, up: str, name: str) -> str:  # noqa: D102
        sigmoid = self.g.op("Sigmoid", (gate,), f"{name}.sigmoid")
        silu = self.g.op("Mul", (gate, sigmoid), f"{name}.silu")
        return self.g.op("Mul", (silu, up), f"{name}.swiglu")


class Fused:
    """One node of domain ai.portlm per op."""

    profile = "fused"
    domains: ClassVar[dict[str, int]] = {DOMAIN: DOMAIN_VERSION}

    def __init__(self, g: GraphBuilder):
        self.g = g

    def embedding(self, ids: str, name: str) -> str:  # noqa: D102
        return self.g.op("Embedding", (ids, self.g.weight(f"{name}.weight")), name, domain=DOMAIN)

    def linear(self, x: str, name: str) -> str:  # noqa: D102
        inputs = [x, self.g.weight(f"{name}.weight")]
        if self.g.has_weight(f"{name}.bias"):
            inputs.append(self.g.weight(f"{name}.bias"))
        return self.g.op("Linear", inputs, name, domain=DOMAIN)

    def tied_head(self, x: str, table: str) -> str:  # noqa: D102
        return self.g.op(
            "Linear", (x, self.g.weight(f"{table}.weight")), "logits", domain=DOMAIN, transposed=1
        )

    def head(self, x: str, name: str) -> str:  # noqa: D102
        return self.g.op("Linear", (x, self.g.weight(f"{name}.weight")), "logits", domain=DOMAIN)

    def layer_norm(self, x: str, name: str, epsilon: float) -> str:  # noqa: D102
        inputs = (x, self.g.weight(f"{name}.weight"), self.g.weight(f"{name}.bias"))
        return self.g.op("LayerNorm", inputs, name, domain=DOMAIN, epsilon=epsilon)

    def add_layer_norm(self, x: str, residual: str, name: str, epsilon: float) -> tuple[str, str]:  # noqa: D102
        inputs = (x, residual, self.g.weight(f"{name}.weight"), self.g.weight(f"{name}.bias"))
        outputs = (name, f"{name}.input")
        y, h = self.g.split_op("AddLayerNorm", inputs, name, outputs, domain=DOMAIN, epsilon=epsilon)
        return y, h

    def rms_norm(self, x: str, name: str, epsilon: float) -> str:  # noqa: D102
        return self.g.op(
            "RmsNorm", (x, self.g.weight(f"{name}.weight")), name, domain=DOMAIN, epsilon=epsilon
        )

    def add_rms_norm(self, x: str, residual: str, name: str, epsilon: float) -> tuple[str, str]:  # noqa: D102
        inputs, outputs = (x, residual, self.g.weight(f"{name}.weight")), (name, f"{name}.input")
        y, h = self.g.split_op("AddRmsNorm", inputs, name, outputs, domain=DOMAIN, epsilon=epsilon)
        return y, h

    def mask(self, attention_mask: str, position_ids: str, context: int, group: int) -> str:  # noqa: D102
        return attention_mask

    def rotation(self, position_ids: str, cos: str, sin: str) -> tuple[str, ...]:  # noqa: D102
        return position_ids, self.g.weight(cos), self.g.weight(sin)

    def heads(self, x: str, count: int, width: int, name: str) -> str:  # noqa: D102
        return x  # the nodes below take (B, T, count * width): the same memory

    def rotary(self, x: str, rotation: tuple[str, ...], count: int, name: str) -> str:  # noqa: D102
        return self.g.op("Rotary", (x, *rotation), f"{name}.rotary", domain=DOMAIN, num_heads=count)

    def attention(  # noqa: D102
        self,
        q: str,
        k: str,
        v: str,
        mask: str,
        layer: int,
        n_head: int,
        n_kv_head: int,
        head_dim: int,
        name: str,
    ) -> str:
        past = f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"
        outputs = (name, f"present.{layer}.key", f"present.{layer}.value")
        attributes = {"num_heads": n_head, "num_kv_heads": n_kv_head, "scale": head_dim**-0.5}
        return self.g.split_op(
            "CachedAttention", (q, k, v, *past, mask), name, outputs, domain=DOMAIN, **attributes
        )[0]

    def gelu_mlp(self, x: str, name: str, fc: str, proj: str, approximate: str) -> str:  # noqa: D102
        weights = (
            self.g.weight(f"{name}.{part}.{kind}") for part in (fc, proj) for kind in ("weight", "bias")
        )
        return self.g.op("GeluMlp", (x, *weights), f"{name}.{proj}", domain=DOMAIN, approximate=approximate)

    def swiglu(self, gate: str, up: str, name: str) -> str:  # noqa: D102
        return self.g.op("SwiGlu", (gate, up), f"{name}.swiglu", domain=DOMAIN)


PROFILES: dict[str, type[Portable] | type[Fused]] = {"portable": Portable, "fused": Fused}
