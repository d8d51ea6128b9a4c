"""Attention, softmax(q k^T / sqrt(D)) v, causal or full; causal attention may see a window of the last positions alone.

Shapes: B sequences, T positions, H query heads, K key/value heads (K divides H: query head h uses h // (H / K)), D
the width of a head.

The kernels follow FlashAttention (Dao et al. 2022): the T x T scores exist in blocks that fit the cache. Where one
linear map yields q, k and v together, `attention_qkv` takes its output as it is, and writes one gradient for it. A
window (Beltagy et al. 2020, arXiv:2004.05150) hides keys, and a soft cap bounds scores (arXiv:2408.00118). Inside
``precision.products_in("bf16")`` the operands of all products are rounded to bfloat16; the softmax is float32.
On CUDA, what comes out is rounded, too.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

from portlm.ops import cuda, lazy
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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute the definition in plain PyTorch: the oracle of the tests and the fallback without a kernel."""
    T, H, K = q.shape[1], q.shape[2], k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
    k, v = k.repeat_interleave(H // K, dim=1), v.repeat_interleave(H // K, dim=1)
    product = rounded_matmul_reference if rounds_products() else torch.matmul
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = product(q, k.transpose(-1, -2)) * scale  # (B, H, T, T)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        visible = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
        visible = visible.triu(1 - window) if window else visible
        scores = scores.masked_fill(~visible, float("-inf"))
    return product(torch.softmax(scores, dim=-1), v).transpose(1, 2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return softmax(q k^T scale) v, where query t sees keys 0 .. t if causal, else all.

    Views are read where they lie, as long as the last dimension is contiguous.

    Args:
        q: (B, T, H, D).
        k: (B, T, K, D).
        v: (B, T, K, D).
        causal: hide later positions.
        scale: of the scores; 1 / sqrt(D) if None.
        window: query t sees keys t - window + 1 .. t alone; only with causal.
        softcap: c makes a scaled score s to c tanh(s / c).

    Returns:
        (B, T, H, D).

    Raises:
        ValueError: the shapes or bounds do not fit; the message names them.
    """
    _check(q, k, v)
    check_bounds("attention", window, softcap, causal)
    D = q.shape[3]
    if _rounds_on_cuda(D, q, k, v):
        q, k, v = (t.bfloat16() for t in (q, k, v))
        return attention(q, k, v, causal, scale, window, softcap).float()
    if D == 0 or not (has_kernel(q, k, v) or has_cuda_kernel(D, q, k, v)):
        return attention_reference(q, k, v, causal, scale, window, softcap)
    scale = D**-0.5 if scale is None else scale
    bounds = rounds_products(), window or 0, softcap or 0.0
    return _fused(rows_of(q), rows_of(k), rows_of(v), causal, scale, *bounds)[0]


def attention_qkv_reference(
    qkv: Tensor,
    n_head: int,
    n_kv_head: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute the definition of attention_qkv in plain PyTorch."""
    H, K = n_head, n_kv_head or n_head
    B, T, width = qkv.shape
    q, k, v = qkv.view(B, T, H + 2 * K, width // (H + 2 * K)).split((H, K, K), dim=2)
    return attention_reference(q, k, v, causal, scale, window, softcap)


def attention_qkv(
    qkv: Tensor,
    n_head: int,
    n_kv_head: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return the attention of queries, keys and values that lie side by side, as one linear map yields them.

    Args:
        qkv: (B, T, (H + 2 K) D): H heads of queries, then K of keys, then K of values.
        n_head: H.
        n_kv_head: K; H if None.
        causal: hide later positions.
        scale: of the scores; 1 / sqrt(D) if None.
        window: query t sees keys t - window + 1 .. t alone; only with causal.
        softcap: c makes a scaled score s to c tanh(s / c).

    Returns:
        (B, T, H, D).

    Raises:
        ValueError: the shapes or bounds do not fit; the message names them.
    """
    H, K = n_head, n_head if n_kv_head is None else n_kv_head
    if qkv.dim() != 3 or K < 1 or H < 1 or H % K or qkv.shape[2] % (H + 2 * K):
        raise ValueError(
            f"[attention_qkv] qkv must be (B, T, (H + 2 K) D) with K a divisor of H, "
            f"got {tuple(qkv.shape)} with H = {H}, K = {K}"
        )
    check_bounds("attention_qkv", window, softcap, causal)
    D = qkv.shape[2] // (H + 2 * K)
    if _rounds_on_cuda(D, qkv):
        return attention_qkv(qkv.bfloat16(), H, K, causal, scale, window, softcap).float()
    if D == 0 or not (has_kernel(qkv) or has_cuda_kernel(D, qkv)):
        return attention_qkv_reference(qkv, H, K, causal, scale, window, softcap)
    scale = D**-0.5 if scale is None else scale
    bounds = rounds_products(), window or 0, softcap or 0.0
    return _fused_qkv(qkv.contiguous(), H, K, causal, scale, *bounds)[0]


def has_cuda_kernel(D: int, q: Tensor, *others: Tensor | None) -> bool:
    """Say whether the CUDA kernels take these tensors, whose heads are D wide."""
    return D <= cuda.MOST_HEAD_WIDTH and cuda.has_cuda_kernel(q, *others)


def _rounds_on_cuda(D: int, q: Tensor, *others: Tensor) -> bool:
    """Say whether `precision` asks CUDA kernels for rounded products of such float32 tensors.

    They have them of bfloat16 tensors, so the result and the gradients are rounded as well, which is what the linear
    layers around attention would do next.
    """
    return rounds_products() and q.dtype is torch.float32 and has_cuda_kernel(D, q, *others)


def check_bounds(op: str, window: int | None, softcap: float | None, causal: bool = True) -> None:
    """Raise ValueError for a window or a soft cap that no attention can have."""
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"[{op}] a window needs at least one position and causal attention, got {window}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"[{op}] softcap must be a positive number, got {softcap}")


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    fits = q.dim() == k.dim() == 4 and k.shape == v.shape and q.shape[:2] == k.shape[:2]
    if not fits or q.shape[3] != k.shape[3] or k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"[attention] q must be (B, T, H, D), k and v (B, T, K, D) with K a divisor of H, "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )


def rows_of(x: Tensor) -> Tensor:
    """Return x, copied only if the elements of a head are not side by side."""
    return x if x.stride(3) == 1 else x.contiguous()


# What the kernels read of q, k and v: their addresses, and the floats from batch to batch, row to row and head to head.
_Where = tuple[tuple[int, int, int], "array[int]"]


def where(q: Tensor, k: Tensor, v: Tensor) -> _Where:
    """Return where three tensors lie whose last dimensions are contiguous."""
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
    return like.new_empty(shape), like.new_empty((B, H, T, 2), dtype=torch.float32)


def _attend(
    place: _Where,
    out: Tensor,
    stats: Tensor,
    K: int,
    causal: bool,
    scale: float,
    rounds: bool,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    addresses, strides = place
    B, T, H, D = out.shape
    arguments = (
        *addresses, strides.buffer_info()[0], out.data_ptr(), stats.data_ptr(), B, T, H, K, D, causal, scale,
        window, softcap,
    )  # fmt: skip
    if cuda.on_cuda(out):
        cuda.launch("attention_fwd", out.device, *arguments, out.dtype is torch.bfloat16)
    else:
        (kernels.attention_bf16_fwd if rounds else kernels.attention_fwd)(*arguments)
    return out, stats


def _differentiate(
    dout: Tensor,
    place: _Where,
    out: Tensor,
    stats: Tensor,
    grads: _Where,
    K: int,
    causal: bool,
    scale: float,
    rounds: bool,
    window: int,
    softcap: float,
) -> None:
    addresses, strides = place
    grad_addresses, grad_strides = grads
    B, T, H, D = out.shape
    arguments = (
        dout.data_ptr(), *addresses, strides.buffer_info()[0], out.data_ptr(), stats.data_ptr(),
        *grad_addresses, grad_strides.buffer_info()[0],
    )  # fmt: skip
    settings = B, T, H, K, D, causal, scale, window, softcap
    if cuda.on_cuda(out):
        delta = stats.new_empty(stats.shape[:3])  # room to work in
        bfloat16 = out.dtype is torch.bfloat16
        cuda.launch("attention_bwd", out.device, *arguments, delta.data_ptr(), *settings, bfloat16)
    else:
        (kernels.attention_bf16_bwd if rounds else kernels.attention_bwd)(*arguments, *settings)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    rounds: bool = False,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    results = _empty_results(q, q.shape)
    return _attend(where(q, k, v), *results, k.shape[2], causal, scale, rounds, window, softcap)


def _empty_gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs)


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
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = grads = _empty_gradients(q, k, v)
    places = where(q, k, v), out, stats, where(*grads)
    _differentiate(dout, *places, k.shape[2], causal, scale, rounds, window, softcap)
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors = [t for t in inputs if isinstance(t, Tensor)]
    ctx.settings = inputs[len(tensors) :]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


_fused_gradients = KernelOp(
    "attention_backward", _gradients, fake=lambda dout, q, k, v, *_, **__: _empty_gradients(q, k, v)
)


def _backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    settings = ctx.settings
    if dout is None:
        return (None,) * (3 + len(settings))
    return *_fused_gradients(dout.contiguous(), *ctx.saved_tensors, *settings), *[None] * len(settings)


_fused = KernelOp(
    "attention",
    _forward,
    fake=lambda q, *_, **__: _empty_results(q, q.shape),
    backward=_backward,
    setup_context=_save,
)


def _empty_results_qkv(qkv: Tensor, H: int, K: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    B, T, width = qkv.shape
    return _empty_results(qkv, (B, T, H, width // (H + 2 * K)))


def _forward_qkv(
    qkv: Tensor,
    H: int,
    K: int,
    causal: bool,
    scale: float,
    rounds: bool = False,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    results = _empty_results_qkv(qkv, H, K)
    return _attend(_where_in(qkv, H, K), *results, K, causal, scale, rounds, window, softcap)


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
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    dqkv = torch.empty_like(qkv)
    places = _where_in(qkv, H, K), out, stats, _where_in(dqkv, H, K)
    _differentiate(dout, *places, K, causal, scale, rounds, window, softcap)
    return dqkv


_fused_gradient_qkv = KernelOp(
    "attention_qkv_backward",
    _gradient_qkv,
    fake=lambda dout, qkv, *_, **__: torch.empty_like(qkv),
)


def _backward_qkv(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    settings = ctx.settings
    if dout is None:
        return (None,) * (1 + len(settings))
    return _fused_gradient_qkv(dout.contiguous(), *ctx.saved_tensors, *settings), *[None] * len(settings)


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
    cuda=("attention_fwd", "attention_bwd"),
)
