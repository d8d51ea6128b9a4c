"""One step of attention over a key/value cache: append the new keys and values, then look at everything so far.

B batch, T new tokens, P tokens already in the cache, H query heads, K key/value heads (H a multiple of K), D head
width. Inference only: the op has no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from portlm.ops.fused import FusedOp, has_kernel, kernels

__all__ = ["cached_attention", "cached_attention_reference"]


def cached_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the definition in plain PyTorch: the oracle of the tests and the fallback without a kernel."""
    T, P, G = q.shape[1], past_key.shape[2], q.shape[2] // k.shape[2]
    key = torch.cat((past_key, k.transpose(1, 2)), dim=2)  # (B, K, P+T, D)
    value = torch.cat((past_value, v.transpose(1, 2)), dim=2)
    visible = torch.ones(T, P + T, dtype=torch.bool, device=q.device).tril(P)
    if mask is not None:
        visible = visible & (mask != 0)[:, None, None, :]  # (B, 1, T, P+T)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q.transpose(1, 2) @ key.repeat_interleave(G, dim=1).transpose(-1, -2) * scale  # (B, H, T, P+T)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Append k and v to a cache and attend to all of it: query i sees slot j if j <= P + i and mask[b, j] != 0.

    Args:
        q: (B, T, H, D) queries of the new tokens.
        k: (B, T, K, D) their keys; query head h uses key/value head h // (H / K).
        v: (B, T, K, D) their values.
        past_key: (B, K, P, D).
        past_value: (B, K, P, D).
        mask: (B, P+T) int64, 0 where a slot holds padding; None if none does.
        scale: of the scores; None means 1 / sqrt(D).

    Returns:
        The attended values (B, T, H, D), and the grown cache: keys and values (B, K, P+T, D). A query that sees
        nothing gives 0.

    Raises:
        ValueError: the shapes do not fit; the message names them.
    """
    _check(q, k, v, past_key, past_value, mask)
    needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, past_key, past_value))
    if needs_gradient or not has_kernel(q, k, v, past_key, past_value):
        return cached_attention_reference(q, k, v, past_key, past_value, mask, scale)
    q, k, v, past_key, past_value = (t.contiguous() for t in (q, k, v, past_key, past_value))
    mask = None if mask is None else mask.contiguous()
    out, key, value = _fused(
        q, k, v, past_key, past_value, mask, q.shape[-1] ** -0.5 if scale is None else scale
    )
    return out, key, value


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
    q: Tensor, k: Tensor, v: Tensor, past_key: Tensor, past_value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, H, D = q.shape
    K, P = past_key.shape[1:3]
    S = P + T
    out, key, value = _empty(q, k, v, past_key, past_value, mask, scale)
    for past, fresh, present in ((past_key, k, key), (past_value, v, value)):
        kernels.append_cache(past.data_ptr(), fresh.data_ptr(), present.data_ptr(), B, K, P, T, D)
    kernels.cached_attention(
        q.data_ptr(), key.data_ptr(), value.data_ptr(), K * S * D, S * D,
        0 if mask is None else mask.data_ptr(), scale, out.data_ptr(), B, T, S, H, K, D,
    )  # fmt: skip
    return out, key, value


def _empty(
    q: Tensor, k: Tensor, v: Tensor, past_key: Tensor, past_value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, K, D = k.shape
    shape = (B, K, past_key.shape[2] + T, D)
    return torch.empty_like(q), q.new_empty(shape), q.new_empty(shape)


_fused = FusedOp("cached_attention", _forward, fake=_empty)
