"""One step of attention over a key/value cache of 8 bits: cached_attention, whose cache takes a quarter of the memory.

Each vector that is kept, the D numbers of one slot of one head, becomes whole numbers and a scale of its own, as
portlm.ops.byte_cache.to_bytes says. Attention is that over scale * numbers of all slots, those that are being appended
among them, so an answer does not depend on how its text was cut into calls. Scales are float32; their share of the
memory is 4 / (D + 4).

B batch, T new tokens, P tokens already in the cache, H query heads, K key/value heads (H a multiple of K), D head
width. Inference only: the op has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from portlm.ops import cuda, lazy
from portlm.ops.attention import check_bounds
from portlm.ops.byte_cache import LEVELS, SMALLEST, to_bytes
from portlm.ops.cached_attention import (
    ATTRIBUTES,
    attention_bias,
    cached_attention_reference,
    capped,
    stacked_heads,
    unstacked_heads,
)
from portlm.ops.kernel_op import address
from portlm.ops.spec import Attributes, Builder, Input, Node, OpSpec, Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", Tensor="torch:Tensor")

__all__ = ["quantized_attention", "quantized_attention_reference"]

FLOAT, INT8 = 1, 3  # of ONNX
MOST_QUERIES = 16  # of a row that CUDA's kernel takes
WIDEST = 512  # of the heads that it takes


def quantized_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_key_scale: Tensor,
    past_value: Tensor,
    past_value_scale: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the definition in plain PyTorch: the oracle of the tests and the fallback without a kernel."""
    present, means = [], []
    for x, past, past_scale in ((k, past_key, past_key_scale), (v, past_value, past_value_scale)):
        fresh, fresh_scale = to_bytes(x.transpose(1, 2))  # (B, K, T, D)
        numbers, scales = torch.cat((past, fresh), 2), torch.cat((past_scale.float(), fresh_scale), 2)
        present += [numbers, scales]
        means.append(numbers.to(q.dtype) * scales.to(q.dtype))
    P = past_key.shape[2]
    keys, values = (x[:, :, P:].transpose(1, 2) for x in means)
    past_keys, past_values = (x[:, :, :P] for x in means)
    out, _, _ = cached_attention_reference(
        q, keys, values, past_keys, past_values, mask, scale, window, softcap
    )
    return (out, *present)  # type: ignore[return-value]


def quantized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_key_scale: Tensor,
    past_value: Tensor,
    past_value_scale: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Append k and v to a cache of 8 bits and attend to all of it, as cached_attention does.

    Args:
        q: (B, T, H, D) queries of the new tokens.
        k: (B, T, K, D) their keys; query head h uses key/value head h // (H / K).
        v: (B, T, K, D) their values.
        past_key: (B, K, P, D) int8.
        past_key_scale: (B, K, P, 1) float32.
        past_value: (B, K, P, D) int8.
        past_value_scale: (B, K, P, 1) float32.
        mask: (B, P+T) int64, 0 where a slot holds padding; None if none does.
        scale: of the scores; None means 1 / sqrt(D).
        window: how many slots a query sees, its own the last of them; None means all.
        softcap: c makes a scaled score s to c tanh(s / c).

    Returns:
        The attended values (B, T, H, D), and the grown cache in the order of the arguments, with P+T slots. A query
        that sees nothing gives 0.

    Raises:
        ValueError: the shapes, types or bounds do not fit; the message names them.
    """
    cache = past_key, past_key_scale, past_value, past_value_scale
    _check(q, k, v, cache, mask)
    check_bounds("quantized_attention", window, softcap)
    near = past_key.device == past_value.device == q.device
    if not near or not cuda.has_float_kernel(mask, q, k, v, past_key_scale, past_value_scale) or _is_large(q):
        return quantized_attention_reference(q, k, v, *cache, mask, scale, window, softcap)
    q, k, v = (t.contiguous() for t in (q, k, v))
    mask = None if mask is None else mask.contiguous()
    B, T, H, D = q.shape
    K, P = past_key.shape[1:3]
    S = P + T
    present = [t.new_empty((B, K, S, t.shape[3])) for t in cache]
    for new, past in zip(present, cache, strict=True):
        new[:, :, :P] = past
    keys, key_scales, values, value_scales = present
    for x, numbers, scales in ((k, keys, key_scales), (v, values, value_scales)):
        cuda.run(
            "append_bytes", x, x.data_ptr(), K * D, numbers.data_ptr(), K * S * D, S * D, scales.data_ptr(), K * S, S,
            B, K, P, T, D,
        )  # fmt: skip
    out = torch.empty_like(q)
    partial: tuple[int, ...] = ()
    if cuda.on_cuda(q):
        parts = _parts(S)
        room = q.new_empty((B, T, H, parts, D + 2) if parts > 1 else 0)
        partial = room.data_ptr() if parts > 1 else 0, parts
    cuda.run(
        "quantized_attention", q, q.data_ptr(), *(t.data_ptr() for t in present), K * S * D, S * D, K * S, S,
        address(mask), D**-0.5 if scale is None else scale, out.data_ptr(), *partial, B, T, S, H, K, D,
        window or 0, softcap or 0.0,
    )  # fmt: skip
    return out, keys, key_scales, values, value_scales


def _is_large(q: Tensor) -> bool:
    """Whether these queries are for products of PyTorch's on CUDA, whose kernel reads a cache for each few of them."""
    return cuda.on_cuda(q) and (q.shape[1] > MOST_QUERIES or q.shape[3] > WIDEST)


def _parts(slots: int) -> int:
    """Return in how many parts CUDA's kernel reads so many slots: of 128, or of more, so that there are at most 64."""
    return max(1, min(64, -(-slots // 128)))


def _check(q: Tensor, k: Tensor, v: Tensor, cache: Sequence[Tensor], mask: Tensor | None) -> None:
    def wrong(what: str) -> ValueError:
        return ValueError(f"[quantized_attention] {what}")

    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise wrong(f"need q (B, T, H, D), k and v (B, T, K, D), got {shapes}")
    B, T, H, D = q.shape
    K = k.shape[2]
    if k.shape != (B, T, K, D) or K == 0 or H % K:
        raise wrong(f"k {tuple(k.shape)} does not fit q {tuple(q.shape)}: heads must be a multiple")
    P = cache[0].shape[2] if cache[0].dim() == 4 else 0
    for t, width, dtype in zip(cache, (D, 1, D, 1), (torch.int8, q.dtype) * 2, strict=True):
        if t.shape != (B, K, P, width) or t.dtype is not dtype:
            raise wrong(
                f"the cache must have {dtype} ({B}, {K}, {P}, {width}), got {t.dtype} {tuple(t.shape)}"
            )
    if mask is not None and (mask.shape != (B, P + T) or mask.dtype is not torch.int64):
        raise wrong(f"mask must be int64 ({B}, {P + T}), got {mask.dtype} {tuple(mask.shape)}")


def _write_bytes(g: Builder, x: str, name: str) -> tuple[str, str]:
    """Write what is kept of vectors (..., D); return its numbers and scales."""
    largest = g.op(
        "ReduceMax", (g.op("Abs", (x,), f"{name}.sizes"), g.ints(-1)), f"{name}.largest", keepdims=1
    )
    scale = g.op("Div", (largest, g.scalar(float(LEVELS))), f"{name}.scale_of")
    divisor = g.op("Max", (scale, g.scalar(SMALLEST)), f"{name}.divisor")
    whole = g.op("Round", (g.op("Div", (x, divisor), f"{name}.shares"),), f"{name}.whole")
    return g.op("Cast", (whole,), f"{name}.bytes", to=INT8), scale


def _portable(g: Builder, inputs: Sequence[str], outputs: Sequence[str], attributes: Attributes) -> None:
    """Attention over the numbers as they are: a key's scale multiplies its score, and a value's its weight."""
    q, k, v, *cache, mask = inputs  # q (B, T, H, D), k and v (B, T, K, D)
    out, *present = outputs
    H, K, D = attributes["num_heads"], attributes["num_kv_heads"], int(g.input_shape(cache[0])[3])
    numbers, scales = [], []
    for place, (x, kind) in enumerate(((k, "keys"), (v, "values"))):
        heads = g.op("Transpose", (x,), f"{out}.{kind}", perm=[0, 2, 1, 3])  # (B, K, T, D)
        fresh = _write_bytes(g, heads, f"{out}.{kind}")
        for past, new, grown in zip(
            cache[2 * place :], fresh, present[2 * place : 2 * place + 2], strict=False
        ):
            g.op("Concat", (past, new), grown, axis=2)
        numbers.append(g.op("Cast", (present[2 * place],), f"{out}.{kind}.numbers", to=FLOAT))
        scales.append(g.op("Transpose", (present[2 * place + 1],), f"{out}.{kind}.scales", perm=[0, 1, 3, 2]))
    q = stacked_heads(g, g.op("Mul", (q, g.scalar(attributes["scale"])), f"{out}.scaled"), out, H, K, D)
    across = g.op("Transpose", (numbers[0],), f"{out}.keys_across", perm=[0, 1, 3, 2])  # (B, K, D, P+T)
    scores = g.op("MatMul", (q, across), f"{out}.products")  # (B, K, G*T, P+T)
    scores = capped(g, g.op("Mul", (scores, scales[0]), f"{out}.scores"), attributes["softcap"], out)
    bias = attention_bias(g, mask, H // K, attributes["window"])
    biased = g.op("Add", (scores, bias), f"{out}.biased")
    shares = g.op("Softmax", (biased,), f"{out}.shares", axis=-1)
    weights = g.op("Mul", (shares, scales[1]), f"{out}.weights")
    unstacked_heads(g, g.op("MatMul", (weights, numbers[1]), f"{out}.context"), out, H, K, D)


def _shapes(shapes: Sequence[Any], attributes: Attributes) -> Sequence[Shape]:
    B, K, P, D = shapes[3]
    S = P + shapes[0][1]
    return [shapes[0], (B, K, S, D), (B, K, S, 1), (B, K, S, D), (B, K, S, 1)]


SPEC = OpSpec(
    name="quantized_attention",
    summary="attention over a key/value cache of 8 bits",
    forward=("append_bytes", "quantized_attention"),
    cuda=("append_bytes", "quantized_attention"),
    nodes=(
        Node(
            op_type="QuantizedAttention",
            torch=(),  # export writes it where a model has cached_attention, see compile/quantized_cache.py
            inputs=(
                Input("q", heads="num_heads"),
                Input("k", heads="num_kv_heads"),
                Input("v", heads="num_kv_heads"),
                Input("past_key", dtype="int8"),
                Input("past_key_scale"),
                Input("past_value", dtype="int8"),
                Input("past_value_scale"),
                Input("mask", dtype="int64"),
            ),
            outputs=("y", "present_key", "present_key_scale", "present_value", "present_value_scale"),
            kinds=("float32", "int8", "float32", "int8", "float32"),
            attributes=ATTRIBUTES,
            shapes=_shapes,
            portable=_portable,
        ),
    ),
    functions=(
        "append_bytes",
        "append_byte_scales",
        "quantized_attention",
    ),  # TVM's lowering is compile/tvm_fused.py
)
