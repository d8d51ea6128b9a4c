"""Attention, softmax(q k^T / sqrt(D)) v, causal or full.

Shapes: B sequences, T positions, H query heads, K key/value heads (K divides H: query head h uses h // (H / K)), D
the width of a head.

The kernels follow FlashAttention (Dao et al. 2022): the T x T scores exist in blocks that fit the cache. Where one
linear map yields q, k and v together, `attention_qkv` takes its output as it is, and writes one gradient for it. Inside
``precision.products_in("bf16")`` the operands of all products are rounded to bfloat16; the softmax is float32.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

from portlm.ops import lazy
from portlm.ops.kernel_op import KernelOp, has_kernel, kernels
from portlm.ops.precision import rounded_matmul_reference, rounds_products
from portlm.ops.spec import OpSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", Tensor="torch:Tensor")

__all__ = ["attention", "attention_qkv", "attention_qkv_reference", "attention_reference"]


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = True, scale: float | None = None
) -> Tensor:
    """Compute the definition in plain PyTorch: the oracle of the tests and the fallback without a kernel."""
    T, H, K = q.shape[1], q.shape[2], k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
    k, v = k.repeat_interleave(H // K, dim=1), v.repeat_interleave(H // K, dim=1)
    product = rounded_matmul_reference if rounds_products() else torch.matmul
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = product(q, k.transpose(-1, -2)) * scale  # (B, H, T, T)
    if causal:
        visible = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~visible, float("-inf"))
    return product(torch.softmax(scores, dim=-1), v).transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, scale: float | None = None) -> Tensor:
    """Return softmax(q k^T scale) v, where query t sees keys 0 .. t if causal, else all.

    Views are read where they lie, as long as the last dimension is contiguous.

    Args:
        q: (B, T, H, D).
        k: (B, T, K, D).
        v: (B, T, K, D).
        causal: hide later positions.
        scale: of the scores; 1 / sqrt(D) if None.

    Returns:
        (B, T, H, D).

    Raises:
        ValueError: the shapes do not fit; the message names them.
    """
    _check(q, k, v)
    D = q.shape[3]
    if D == 0 or not has_kernel(q, k, v):
        return attention_reference(q, k, v, causal, scale)
    return _fused(
        _rows(q), _rows(k), _rows(v), causal, D**-0.5 if scale is None else scale, rounds_products()
    )[0]


def attention_qkv_reference(
    qkv: Tensor, n_head: int, n_kv_head: int | None = None, causal: bool = True, scale: float | None = None
) -> Tensor:
    """Compute the definition of attention_qkv in plain PyTorch."""
    H, K = n_head, n_kv_head or n_head
    B, T, width = qkv.shape
    q, k, v = qkv.view(B, T, H + 2 * K, width // (H + 2 * K)).split((H, K, K), dim=2)
    return attention_reference(q, k, v, causal, scale)


def attention_qkv(
    qkv: Tensor, n_head: int, n_kv_head: int | None = None, causal: bool = True, scale: float | None = None
) -> Tensor:
    """Return the attention of queries, keys and values that lie side by side, as one linear map yields them.

    Args:
        qkv: (B, T, (H + 2 K) D): H heads of queries, then K of keys, then K of values.
        n_head: H.
        n_kv_head: K; H if None.
        causal: hide later positions.
        scale: of the scores; 1 / sqrt(D) if None.

    Returns:
        (B, T, H, D).

    Raises:
        ValueError: the shapes do not fit; the message names them.
    """
    H, K = n_head, n_head if n_kv_head is None else n_kv_head
    if qkv.dim() != 3 or K < 1 or H < 1 or H % K or qkv.shape[2] % (H + 2 * K):
        raise ValueError(
            f"[attention_qkv] qkv must be (B, T, (H + 2 K) D) with K a divisor of H, "
            f"got {tuple(qkv.shape)} with H = {H}, K = {K}"
        )
    D = qkv.shape[2] // (H + 2 * K)
    if D == 0 or not has_kernel(qkv):
        return attention_qkv_reference(qkv, H, K, causal, scale)
    return _fused_qkv(qkv.contiguous(), H, K, causal, D**-0.5 if scale is None else scale, rounds_products())[
        0
    ]


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    fits = q.dim() == k.dim() == 4 and k.shape == v.shape and q.shape[:2] == k.shape[:2]
    if not fits or q.shape[3] != k.shape[3] or k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"[attention] q must be (B, T, H, D), k and v (B, T, K, D) with K a divisor of H, "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )


def _rows(x: Tensor) -> Tensor:
    """Return x, copied only if the elements of a head are not side by side."""
    return x if x.stride(3) == 1 else x.contiguous()


# What the kernels read of q, k and v: their addresses, and the floats from batch to batch, row to row and head to head.
_Where = tuple[tuple[int, int, int], "array[int]"]


def _where(q: Tensor, k: Tensor, v: Tensor) -> _Where:
    strides = array("q", (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]))
    return (q.data_ptr(), k.data_ptr(), v.data_ptr()), strides


def _where_in(qkv: Tensor, H: int, K: int) -> _Where:
    """Return the same for the parts of a contiguous (B, T, (H + 2 K) D), without the cost of making views."""
    _, T, width = qkv.shape
    D = width // (H + 2 * K)
    base, size = qkv.data_ptr(), D * qkv.element_size()
    return (base, base + H * size, base + (H + K) * size), array("q", (T * width, width, D) * 3)


def _empty_results(like: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the result (B, T, H, D), and what backward needs of each query: (B, H, T, 2), see kernels.def."""
    B, T, H, _ = shape
    return like.new_empty(shape), like.new_empty((B, H, T, 2))


def _attend(
    where: _Where, out: Tensor, stats: Tensor, K: int, causal: bool, scale: float, rounds: bool
) -> tuple[Tensor, Tensor]:
    addresses, strides = where
    B, T, H, D = out.shape
    (kernels.attention_bf16_fwd if rounds else kernels.attention_fwd)(
        *addresses, strides.buffer_info()[0], out.data_ptr(), stats.data_ptr(), B, T, H, K, D, causal, scale
    )
    return out, stats


def _differentiate(
    dout: Tensor,
    where: _Where,
    out: Tensor,
    stats: Tensor,
    grads: _Where,
    K: int,
    causal: bool,
    scale: float,
    rounds: bool = False,
) -> None:
    addresses, strides = where
    grad_addresses, grad_strides = grads
    B, T, H, D = out.shape
    (kernels.attention_bf16_bwd if rounds else kernels.attention_bwd)(
        dout.data_ptr(), *addresses, strides.buffer_info()[0], out.data_ptr(), stats.data_ptr(),
        *grad_addresses, grad_strides.buffer_info()[0], B, T, H, K, D, causal, scale,
    )  # fmt: skip


def _forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, rounds: bool = False
) -> tuple[Tensor, Tensor]:
    return _attend(_where(q, k, v), *_empty_results(q, q.shape), k.shape[2], causal, scale, rounds)


def _empty_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor,
    causal: bool,
    scale: float,
    rounds: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor,
    causal: bool,
    scale: float,
    rounds: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _empty_gradients(dout, q, k, v, out, stats, causal, scale, rounds)
    _differentiate(dout, _where(q, k, v), out, stats, _where(*grads), k.shape[2], causal, scale, rounds)
    return grads


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors = [t for t in inputs if isinstance(t, Tensor)]
    ctx.settings = inputs[len(tensors) :]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


_fused_gradients = KernelOp("attention_backward", _gradients, fake=_empty_gradients)


def _backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 6
    return *_fused_gradients(dout.contiguous(), *ctx.saved_tensors, *ctx.settings), None, None, None


_fused = KernelOp(
    "attention",
    _forward,
    fake=lambda q, k, v, causal, scale, rounds=False: _empty_results(q, q.shape),
    backward=_backward,
    setup_context=_save,
)


def _empty_results_qkv(
    qkv: Tensor, H: int, K: int, causal: bool, scale: float, rounds: bool = False
) -> tuple[Tensor, Tensor]:
    B, T, width = qkv.shape
    return _empty_results(qkv, (B, T, H, width // (H + 2 * K)))


def _forward_qkv(
    qkv: Tensor, H: int, K: int, causal: bool, scale: float, rounds: bool = False
) -> tuple[Tensor, Tensor]:
    results = _empty_results_qkv(qkv, H, K, causal, scale, rounds)
    return _attend(_where_in(qkv, H, K), *results, K, causal, scale, rounds)


def _gradient_qkv(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    stats: Tensor,
    H: int,
    K: int,
    causal: bool,
    scale: float,
    rounds: bool = False,
) -> Tensor:
    dqkv = torch.empty_like(qkv)
    _differentiate(dout, _where_in(qkv, H, K), out, stats, _where_in(dqkv, H, K), K, causal, scale, rounds)
    return dqkv


_fused_gradient_qkv = KernelOp(
    "attention_qkv_backward",
    _gradient_qkv,
    fake=lambda dout, qkv, out, stats, H, K, causal, scale, rounds=False: torch.empty_like(qkv),
)


def _backward_qkv(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 6
    return _fused_gradient_qkv(dout.contiguous(), *ctx.saved_tensors, *ctx.settings), *[None] * 5


_fused_qkv = KernelOp(
    "attention_qkv",
    _forward_qkv,
    fake=_empty_results_qkv,
    backward=_backward_qkv,
    setup_context=_save,
)


SPEC = OpSpec(
    name="attention",
    summary="softmax(q k^T) v, causal or full, grouped heads",
    forward=("attention_fwd",),
    backward=("attention_bwd",),
)
