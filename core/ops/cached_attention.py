"""One step of attention over a key/value cache: append the new keys and values, then look at everything so far.

B batch, T new tokens, P tokens already in the cache, H query heads, K key/value heads (H a multiple of K), D head
width. Inference only: the op has no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from portlm.ops import cuda, lazy
from portlm.ops.attention import check_bounds
from portlm.ops.byte_cache import is_rounded, kept
from portlm.ops.kernel_op import KernelOp, address, has_kernel, kernels, needs_gradient
from portlm.ops.spec import FAR, Attribute, Attributes, Builder, Input, Node, OpSpec, Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", Tensor="torch:Tensor")

__all__ = ["cached_attention", "cached_attention_reference"]


def cached_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the definition in plain PyTorch: the oracle of the tests and the fallback without a kernel."""
    T, P, G = q.shape[1], past_key.shape[2], q.shape[2] // k.shape[2]
    key = torch.cat((past_key, k.transpose(1, 2)), dim=2)  # (B, K, P+T, D)
    value = torch.cat((past_value, v.transpose(1, 2)), dim=2)
    visible = torch.ones(T, P + T, dtype=torch.bool, device=q.device).tril(P)
    visible = visible.triu(P + 1 - window) if window else visible
    if mask is not None:
        visible = visible & (mask != 0)[:, None, None, :]  # (B, 1, T, P+T)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q.transpose(1, 2) @ key.repeat_interleave(G, dim=1).transpose(-1, -2) * scale  # (B, H, T, P+T)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1)
    weights = torch.where(visible.any(-1, keepdim=True), weights, 0.0)  # a query that sees nothing gives 0
    return (weights @ value.repeat_interleave(G, dim=1)).transpose(1, 2), key, value


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Append k and v to a cache and attend to all of it: query i sees slot j if j <= P + i and mask[b, j] != 0.

    With a window, only if j > P + i - window, too. In a graph padding stands in front of what is seen alone.

    Args:
        q: (B, T, H, D) queries of the new tokens.
        k: (B, T, K, D) their keys; query head h uses key/value head h // (H / K).
        v: (B, T, K, D) their values.
        past_key: (B, K, P, D).
        past_value: (B, K, P, D).
        mask: (B, P+T) int64, 0 where a slot holds padding; None if none does.
        scale: of the scores; None means 1 / sqrt(D).
        window: how many slots a query sees, its own the last of them; None means all.
        softcap: c makes a scaled score s to c tanh(s / c).

    Returns:
        The attended values (B, T, H, D), and the grown cache: keys and values (B, K, P+T, D). A query that sees
        nothing gives 0.

    Raises:
        ValueError: the shapes or bounds do not fit; the message names them.
    """
    _check(q, k, v, past_key, past_value, mask)
    check_bounds("cached_attention", window, softcap)
    if is_rounded():
        k, v = kept(k), kept(v)
    tensors = q, k, v, past_key, past_value
    if needs_gradient(*tensors) or not (has_kernel(*tensors) or _has_cuda_kernel(mask, *tensors)):
        return cached_attention_reference(*tensors, mask, scale, window, softcap)
    mask = None if mask is None else mask.contiguous()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, key, value = _fused(*(t.contiguous() for t in tensors), mask, scale, window or 0, softcap or 0.0)
    return out, key, value


def _has_cuda_kernel(mask: Tensor | None, q: Tensor, *others: Tensor) -> bool:
    near = mask is None or mask.device == q.device
    return near and 0 < q.shape[3] <= cuda.MOST_HEAD_WIDTH and cuda.has_cuda_kernel(q, *others)


def _check(
    q: Tensor, k: Tensor, v: Tensor, past_key: Tensor, past_value: Tensor, mask: Tensor | None
) -> None:
    def wrong(what: str) -> ValueError:
        return ValueError(f"[cached_attention] {what}")

    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or past_key.shape != past_value.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v, past_key, past_value))
        raise wrong(f"need q (B, T, H, D), k and v (B, T, K, D), past (B, K, P, D), got {shapes}")
    B, T, H, D = q.shape
    K = k.shape[2]
    if k.shape != (B, T, K, D) or K == 0 or H % K:
        raise wrong(f"k {tuple(k.shape)} does not fit q {tuple(q.shape)}: heads must be a multiple")
    if past_key.dim() != 4 or (*past_key.shape[:2], past_key.shape[3]) != (B, K, D):
        raise wrong(f"the cache {tuple(past_key.shape)} does not fit k {tuple(k.shape)}")
    if mask is not None and (mask.shape != (B, past_key.shape[2] + T) or mask.dtype is not torch.int64):
        total = past_key.shape[2] + T
        raise wrong(f"mask must be int64 ({B}, {total}), got {mask.dtype} {tuple(mask.shape)}")


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    mask: Tensor | None,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, D = q.shape
    K, P = past_key.shape[1:3]
    S = P + T
    out, key, value = _empty(q, k, v, past_key)
    arguments = (
        q.data_ptr(), key.data_ptr(), value.data_ptr(), K * S * D, S * D, address(mask), scale, out.data_ptr(),
        B, T, S, H, K, D, window, softcap,
    )  # fmt: skip
    pairs = (past_key, k, key), (past_value, v, value)
    if cuda.on_cuda(q):
        bfloat16 = q.dtype is torch.bfloat16
        for past, fresh, present in pairs:
            addresses = (t.data_ptr() for t in (past, fresh, present))
            cuda.launch("append_cache", q.device, *addresses, B, K, P, T, D, bfloat16)
        parts = _parts(B, T, min(S, window + T - 1) if window else S, H, K)
        partial = q.new_empty((B, T, H, parts, D + 2) if parts > 1 else (0,), dtype=torch.float32)
        room = partial.data_ptr() if parts > 1 else 0
        cuda.launch("cached_attention", q.device, *arguments, room, parts, bfloat16)
        return out, key, value
    for past, fresh, present in pairs:
        kernels.append_cache(past.data_ptr(), fresh.data_ptr(), present.data_ptr(), B, K, P, T, D)
    kernels.cached_attention(*arguments)
    return out, key, value


def _parts(B: int, T: int, slots: int, H: int, K: int) -> int:
    """Return into how many parts CUDA kernels cut so many slots: enough to fill any device, 128 or more in each.

    It depends on sizes alone, so that sums over slots have the same bits on every device.
    """
    if T > _FEW_QUERIES or not slots:
        return 1
    heads = max(1, B * K * -(-T * (H // K) // 8))  # of keys, times the blocks that queries of one make
    return max(1, min(-(-slots // 128), -(-512 // heads)))


_FEW_QUERIES = 16  # csrc/cuda/attention.cuh takes more in tiles


def _empty(
    q: Tensor, k: Tensor, v: Tensor, past_key: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, K, D = k.shape
    shape = (B, K, past_key.shape[2] + T, D)
    return q.new_empty(q.shape), q.new_empty(shape), q.new_empty(shape)


_fused = KernelOp("cached_attention", _forward, fake=_empty)


MASKED = -1e30  # times a whole number of positions: far below any score, and still finite in float32


def attention_bias(g: Builder, attention_mask: str, group: int, window: int = 0) -> str:
    """Return the attention bias (B, 1, group*T, P+T): 0 where a query may look, at most -1e30 where not.

    With a window that is not 0, a query may not look at slots so far behind it, or further.

    The queries' places are the graph's position_ids. With left padding the position of slot j is the number of mask
    ones before it, so it need not be given: cumsum(mask)[j] - 1. Masked slots are put FAR away. All are float32, exact
    up to 2^24. Written once per graph, whatever the number of layers.
    """

    def single() -> str:
        ones = g.op("Gather", (g.floats("mask.values", range(2)), attention_mask), "mask.ones", axis=0)
        columns = g.op("Transpose", (ones,), "mask.columns", perm=[1, 0])  # (P+T, B)
        counted = g.op("CumSum", (columns, g.axis(0)), "mask.counted")
        rows = g.op("Transpose", (counted,), "mask.rows", perm=[1, 0])
        near = g.op("Mul", (ones, g.scalar(FAR)), "mask.near")
        slots = g.op(
            "Sub", (rows, near), "mask.slots"
        )  # position + 1 - FAR, or number seen so far where masked
        keys = g.op("Unsqueeze", (slots, g.ints(1, 2)), "mask.keys")  # (B, 1, 1, P+T)
        table = g.floats("mask.positions", [place + 1 - FAR for place in range(g.context_length)])
        positions = g.op("Gather", (table, "position_ids"), "mask.positions_at", axis=0)
        queries = g.op("Unsqueeze", (positions, g.ints(1, 3)), "mask.queries")  # (B, 1, T, 1)
        ahead = g.op("Sub", (keys, queries), "mask.ahead")  # (B, 1, T, P+T)
        hidden = g.op("Relu", (ahead,), "mask.hidden")
        return g.op("Mul", (hidden, g.scalar(MASKED)), "mask.bias")

    def inside() -> str:
        behind = g.op("Sub", (g.scalar(1.0 - window), "mask.ahead"), f"mask.behind{window}")
        hidden = g.op("Relu", (behind,), f"mask.past{window}")
        return g.op(
            "Add", (bias, g.op("Mul", (hidden, g.scalar(MASKED)), f"{hidden}.bias")), f"mask.window{window}"
        )

    bias, kind = g.shared(f"bias of {attention_mask}", single), ""
    if window:
        bias, kind = g.shared(f"bias of {attention_mask} in {window}", inside), f".window{window}"
    if group == 1:
        return bias
    return g.shared(
        f"bias of {attention_mask} x {group}{kind}",
        lambda: g.op("Concat", [bias] * group, f"mask.grouped{group}{kind}", axis=2),
    )


def capped(g: Builder, scores: str, softcap: float, name: str) -> str:
    """Write the soft cap of scores, if it is not 0."""
    if not softcap:
        return scores
    share = g.op("Mul", (scores, g.scalar(1 / softcap)), f"{name}.share")
    return g.op("Mul", (g.op("Tanh", (share,), f"{name}.tanh"), g.scalar(softcap)), f"{name}.capped")


def stacked_heads(g: Builder, q: str, name: str, H: int, K: int, D: int) -> str:
    """Return queries (B, T, H, D) with those that share a key/value head stacked along time, (B, K, G*T, D)."""
    group = H // K
    if group == 1:
        return g.op("Transpose", (q,), f"{name}.queries", perm=[0, 2, 1, 3])  # (B, H, T, D)
    q = g.op("Reshape", (q, g.ints(0, 0, K, group, D)), f"{name}.groups")
    q = g.op("Transpose", (q,), f"{name}.grouped", perm=[0, 2, 3, 1, 4])  # (B, K, G, T, D)
    return g.op("Reshape", (q, g.ints(0, 0, -1, D)), f"{name}.queries")  # (B, K, G*T, D)


def unstacked_heads(g: Builder, context: str, name: str, H: int, K: int, D: int) -> None:
    """Write what such queries found (B, K, G*T, D) as the value (B, T, H*D) of this name."""
    group = H // K
    if group == 1:
        context = g.op("Transpose", (context,), f"{name}.joined", perm=[0, 2, 1, 3])  # (B, T, H, D)
    else:
        context = g.op("Reshape", (context, g.ints(0, 0, group, -1, D)), f"{name}.ungrouped")
        context = g.op("Transpose", (context,), f"{name}.joined", perm=[0, 3, 1, 2, 4])  # (B, T, K, G, D)
    g.op("Reshape", (context, g.ints(0, 0, H * D)), name)


def _portable(g: Builder, inputs: Sequence[str], outputs: Sequence[str], attributes: Attributes) -> None:
    """Attention over the cache in plain products.

    The queries that share a key/value head are stacked along time, (B, K, G*T, D), so that grouped heads need no copy
    of the cache and each product has only two matrices per head.
    """
    q, k, v, past_key, past_value, mask = inputs  # q (B, T, H, D), k and v (B, T, K, D)
    out, present_key, present_value = outputs
    H, K, D = attributes["num_heads"], attributes["num_kv_heads"], int(g.input_shape(past_key)[3])
    group = H // K
    bias = attention_bias(g, mask, group, attributes["window"])
    keys = g.op("Transpose", (k,), f"{out}.keys", perm=[0, 2, 1, 3])  # (B, K, T, D)
    values = g.op("Transpose", (v,), f"{out}.values", perm=[0, 2, 1, 3])
    keys = g.op("Concat", (past_key, keys), present_key, axis=2)
    values = g.op("Concat", (past_value, values), present_value, axis=2)

    q = g.op("Mul", (q, g.scalar(attributes["scale"])), f"{out}.scaled")
    q = stacked_heads(g, q, out, H, K, D)
    across = g.op("Transpose", (keys,), f"{out}.keys_across", perm=[0, 1, 3, 2])  # (B, K, D, P+T)
    scores = g.op("MatMul", (q, across), f"{out}.scores")  # (B, K, G*T, P+T)
    scores = capped(g, scores, attributes["softcap"], out)
    biased = g.op("Add", (scores, bias), f"{out}.biased")
    shares = g.op("Softmax", (biased,), f"{out}.shares", axis=-1)
    context = g.op("MatMul", (shares, values), f"{out}.context")  # (B, K, G*T, D)
    unstacked_heads(g, context, out, H, K, D)


def _read(arguments: Mapping[str, Any]) -> Attributes:
    if arguments["mask"] is None:
        raise ValueError("give it the attention mask, so that rows of different lengths can be told apart")
    heads = {"num_heads": arguments["q"].shape[2], "num_kv_heads": arguments["k"].shape[2]}
    return {**heads, **{name: arguments[name] for name in ("scale", "window", "softcap")}}


def _shapes(shapes: Sequence[Any], attributes: Attributes) -> Sequence[Shape]:
    B, K, P, D = shapes[3]
    present = (B, K, P + shapes[0][1], D)
    return [shapes[0], present, present]


ATTRIBUTES = (
    Attribute("num_heads", int),
    Attribute("num_kv_heads", int),
    Attribute("scale", float),
    Attribute("window", int, 0),  # 0 for none
    Attribute("softcap", float, 0.0),
)

SPEC = OpSpec(
    name="cached_attention",
    summary="attention over a key/value cache",
    forward=("cached_attention",),
    cuda=("append_cache", "cached_attention"),
    nodes=(
        Node(
            op_type="CachedAttention",
            torch=("portlm::cached_attention",),
            inputs=(
                Input("q", heads="num_heads"),
                Input("k", heads="num_kv_heads"),
                Input("v", heads="num_kv_heads"),
                Input("past_key"),
                Input("past_value"),
                Input("mask", dtype="int64"),
            ),
            outputs=("y", "present_key", "present_value"),
            attributes=ATTRIBUTES,
            read=_read,
            shapes=_shapes,
            portable=_portable,
        ),
    ),
    functions=(
        "append_cache",
        "cached_attention",
        "columns",
        "join_columns",
    ),  # TVM's lowering is compile/tvm_fused.py
)
