"""Attention without an order: every query sees every key that a mask does not hide, of its own sequence or of another.

Shapes: B sequences, T queries and S keys of each, H query heads, K key/value heads (K divides H: query head h uses
h // (H / K)), D the width of a head. Encoders look at themselves with it (T = S; Devlin et al. 2018, arXiv:1810.04805),
decoders at what an encoder made (Vaswani et al. 2017, arXiv:1706.03762), and a bias on the scores says how far apart
two positions are (Raffel et al. 2020, arXiv:1910.10683).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from portlm.ops import cuda, lazy
from portlm.ops.attention import rows_of, where
from portlm.ops.cached_attention import MASKED, stacked_heads, unstacked_heads
from portlm.ops.kernel_op import KernelOp, address, has_kernel, kernels, needs_gradient
from portlm.ops.spec import Attribute, Attributes, Builder, Input, Node, OpSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", Tensor="torch:Tensor")

__all__ = ["masked_attention", "masked_attention_reference"]


def masked_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute the definition in plain PyTorch: the oracle of the tests and the fallback without a kernel."""
    G = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D), (B, K, S, D)
    k, v = k.repeat_interleave(G, dim=1), v.repeat_interleave(G, dim=1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q @ k.transpose(-1, -2) * scale  # (B, H, T, S)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill((mask == 0)[:, None, None, :], float("-inf"))
    blind = (scores == float("-inf")).all(-1, keepdim=True)  # a query that sees nothing gives 0
    weights = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)
    return (weights @ v).transpose(1, 2)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return softmax(q k^T scale + bias) v over the keys j of row b with mask[b, j] != 0.

    Differentiable in q, k, v and bias.

    Args:
        q: (B, T, H, D).
        k: (B, S, K, D); query head h uses key/value head h // (H / K).
        v: (B, S, K, D).
        mask: (B, S) int64, 0 where a key is padding; None if none is.
        bias: (H or 1, T, S), or (B or 1, H or 1, T, S) where rows differ; added to the scores.
        scale: of the scores before the bias; None means 1 / sqrt(D).

    Returns:
        (B, T, H, D). A query that sees nothing gives 0.

    Raises:
        ValueError: the shapes do not fit; the message names them.
    """
    _check(q, k, v, mask, bias)
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
    if q.shape[3] == 0 or not (has_kernel(q, k, v, bias) or _has_cuda_kernel(q, k, v, mask, bias)):
        return masked_attention_reference(q, k, v, mask, bias, scale)
    mask, bias = (None if t is None else t.contiguous() for t in (mask, bias))
    return _fused(rows_of(q), rows_of(k), rows_of(v), mask, bias, scale, needs_gradient(q, k, v, bias))[0]


def _has_cuda_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None) -> bool:
    near = mask is None or mask.device == q.device
    return near and q.shape[3] <= cuda.MOST_HEAD_WIDTH and cuda.has_cuda_kernel(q, k, v, bias)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None) -> None:
    def wrong(what: str) -> ValueError:
        return ValueError(f"[masked_attention] {what}")

    fits = q.dim() == k.dim() == 4 and k.shape == v.shape and q.shape[0] == k.shape[0]
    if not fits or q.shape[3] != k.shape[3] or k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise wrong(
            "q must be (B, T, H, D), k and v (B, S, K, D) with K a divisor of H, "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    (B, T, H, _), S = q.shape, k.shape[1]
    if mask is not None and (mask.shape != (B, S) or mask.dtype is not torch.int64):
        raise wrong(f"mask must be int64 ({B}, {S}), got {mask.dtype} {tuple(mask.shape)}")
    if bias is None:
        return
    rows, heads = (1, *bias.shape[:-2])[-2:] if bias.dim() in (3, 4) else (-1, -1)
    if rows not in (1, B) or heads not in (1, H) or bias.shape[-2:] != (T, S):
        raise wrong(f"bias must be ({H} or 1, {T}, {S}), got {tuple(bias.shape)}")


def _bias_strides(bias: Tensor | None) -> tuple[int, int]:
    """Return the floats from row to row of the batch and from head to head, 0 where all have the same bias."""
    if bias is None:
        return 0, 0
    T, S = bias.shape[-2:]
    rows, heads = (1, *bias.shape[:-2])[-2:]
    return heads * T * S if rows > 1 else 0, T * S if heads > 1 else 0


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    differentiable: bool = False,
) -> tuple[Tensor, Tensor]:
    out, stats = _empty(q, differentiable)
    (B, T, H, D), S, K = q.shape, *k.shape[1:3]
    addresses, strides = where(q, k, v)
    arguments = (
        *addresses, strides.buffer_info()[0], address(mask), address(bias), *_bias_strides(bias), out.data_ptr(),
        stats.data_ptr() if differentiable else 0, B, T, S, H, K, D, scale,
    )  # fmt: skip
    if cuda.on_cuda(q):
        cuda.launch("masked_attention_fwd", q.device, *arguments, q.dtype is torch.bfloat16)
    else:
        kernels.masked_attention_fwd(*arguments)
    return out, stats


def _empty(q: Tensor, differentiable: bool) -> tuple[Tensor, Tensor]:
    """Return the result (B, T, H, D), and what backward needs of each query, (B, H, T, 2), or nothing of it."""
    B, T, H, _ = q.shape
    stats = (B, H, T, 2) if differentiable else (0,)
    return q.new_empty(q.shape), q.new_empty(stats, dtype=torch.float32)


def _gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dbias = _empty_gradients(q, k, v, bias, of_bias)
    (B, T, H, D), S, K = q.shape, *k.shape[1:3]
    rows = of_bias and bias is not None and bias.dim() == 4 and bias.shape[0] != 1
    dscores = stats.new_zeros((B if rows else 1, H, T, S)) if of_bias else dbias
    addresses, strides = where(q, k, v)
    grad_addresses, grad_strides = where(dq, dk, dv)
    arguments = (
        dout.data_ptr(), *addresses, strides.buffer_info()[0], address(mask), address(bias),
        *_bias_strides(bias), out.data_ptr(), stats.data_ptr(), *grad_addresses, grad_strides.buffer_info()[0],
    )  # fmt: skip
    settings = dscores.data_ptr() if of_bias else 0, H * T * S if rows else 0, B, T, S, H, K, D, scale
    if cuda.on_cuda(q):
        delta = stats.new_empty(stats.shape[:3])  # room to work in
        bfloat16 = q.dtype is torch.bfloat16
        cuda.launch("masked_attention_bwd", q.device, *arguments, delta.data_ptr(), *settings, bfloat16)
    else:
        kernels.masked_attention_bwd(*arguments, *settings)
    if of_bias:
        assert bias is not None
        shape = bias.shape if bias.dim() == 4 else (1, *bias.shape)
        dbias = dscores.sum_to_size(shape).reshape(bias.shape).to(bias.dtype)
    return dq, dk, dv, dbias


def _empty_gradients(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, of_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = bias.shape if of_bias and bias is not None else (0,)
    empty = q.new_empty if q.numel() and k.numel() else q.new_zeros  # what no kernel writes
    return empty(q.shape), empty(k.shape), empty(v.shape), empty(shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, mask, bias, ctx.scale, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, mask, bias)


_fused_gradients = KernelOp(
    "masked_attention_backward",
    _gradients,
    fake=lambda dout, q, k, v, out, stats, mask, bias, scale, of_bias: _empty_gradients(
        q, k, v, bias, of_bias
    ),
)


def _backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 7
    of_bias = ctx.needs_input_grad[4]
    dq, dk, dv, dbias = _fused_gradients(dout.contiguous(), *ctx.saved_tensors, ctx.scale, of_bias)
    return dq, dk, dv, None, dbias if of_bias else None, None, None


_fused = KernelOp(
    "masked_attention",
    _forward,
    fake=lambda q, k, v, mask, bias, scale, differentiable=False: _empty(q, differentiable),
    backward=_backward,
    setup_context=_save,
)


def _shown_keys(g: Builder, mask: str) -> str:
    """Return a mask (B, S) in float32."""

    def shown() -> str:
        return g.op("Gather", (g.floats("mask.values", range(2)), mask), g.unique("keys.seen"), axis=0)

    return g.shared(f"keys that {mask} shows", shown)


def _hidden_keys(g: Builder, mask: str) -> str:
    """Return what is added to scores, (B, 1, 1, S): 0, or -1e30 where the mask hides."""

    def added() -> str:
        hidden = g.op("Sub", (g.scalar(1.0), _shown_keys(g, mask)), g.unique("keys.hidden"))
        bias = g.op("Mul", (hidden, g.scalar(MASKED)), g.unique("keys.masked"))
        return g.op("Unsqueeze", (bias, g.ints(1, 2)), g.unique("keys.bias"))

    return g.shared(f"bias of keys by {mask}", added)


def rows_with_keys(g: Builder, mask: str) -> str:
    """Return which rows see anything, (B, 1, 1): 1, or 0 where the mask hides all keys."""

    def any_shown() -> str:
        most = g.op(
            "ReduceMax", (_shown_keys(g, mask), g.ints(-1)), g.unique("keys.any"), keepdims=1
        )  # (B, 1)
        return g.op("Unsqueeze", (most, g.ints(2)), g.unique("keys.rows"))

    return g.shared(f"rows with keys by {mask}", any_shown)


def _portable(g: Builder, inputs: Sequence[str], outputs: Sequence[str], attributes: Attributes) -> None:
    """Attention in plain products; the queries that share a key/value head are stacked along time, (B, K, G*T, D)."""
    q, k, v, mask, bias = inputs
    (out,) = outputs
    H, K, D = (attributes[name] for name in ("num_heads", "num_kv_heads", "head_dim"))
    across = g.op("Transpose", (k,), f"{out}.keys_across", perm=[0, 2, 3, 1])  # (B, K, D, S)
    values = g.op("Transpose", (v,), f"{out}.values", perm=[0, 2, 1, 3])  # (B, K, S, D)
    scaled = g.op("Mul", (q, g.scalar(attributes["scale"])), f"{out}.scaled")
    scores = g.op("MatMul", (stacked_heads(g, scaled, out, H, K, D), across), f"{out}.scores")
    if bias:
        if H != K:
            scores = g.op("Reshape", (scores, g.ints(0, H, -1, 0)), f"{out}.apart")  # (B, H, T, S)
        scores = g.op("Add", (scores, bias), f"{out}.near")
        if H != K:
            scores = g.op("Reshape", (scores, g.ints(0, K, -1, 0)), f"{out}.stacked")
    if mask:
        scores = g.op("Add", (scores, _hidden_keys(g, mask)), f"{out}.biased")
    shares = g.op("Softmax", (scores,), f"{out}.shares", axis=-1)
    context = g.op("MatMul", (shares, values), f"{out}.context")  # (B, K, G*T, D)
    unstacked_heads(g, context, f"{out}.seen" if mask else out, H, K, D)
    if mask:
        g.op("Mul", (f"{out}.seen", rows_with_keys(g, mask)), out)


def _read(arguments: Mapping[str, Any]) -> Attributes:
    (_, _, H, D), K, bias = arguments["q"].shape, arguments["k"].shape[2], arguments["bias"]
    sizes = {
        "num_heads": H,
        "num_kv_heads": K,
        "head_dim": D,
        "bias_rank": 3 if bias is None else len(bias.shape),
    }
    return {**sizes, "scale": arguments["scale"]}


SPEC = OpSpec(
    name="masked_attention",
    summary="attention to every key that a mask shows, with a bias",
    forward=("masked_attention_fwd",),
    backward=("masked_attention_bwd",),
    cuda=("masked_attention_fwd", "masked_attention_bwd"),
    nodes=(
        Node(
            op_type="MaskedAttention",
            torch=("portlm::masked_attention",),
            inputs=(
                Input("q", heads="num_heads"),
                Input("k", heads="num_kv_heads"),
                Input("v", heads="num_kv_heads"),
                Input("mask", dtype="int64", optional=True),
                Input("bias", optional=True),
            ),
            outputs=("y",),
            attributes=(
                Attribute("num_heads", int),
                Attribute("num_kv_heads", int),
                Attribute("head_dim", int),
                Attribute("bias_rank", int, 3),
                Attribute("scale", float),
            ),
            read=_read,
            shapes=lambda shapes, attributes: [shapes[0]],
            portable=_portable,
            tvm="masked_attention",
        ),
    ),
    functions=("masked_attention_no_mask_no_bias",),
)
