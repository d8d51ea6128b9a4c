"""Attention, softmax(q k^T / sqrt(D)) v, causal or full, and one step of it over a key/value cache."""

import torch
from torch import Tensor

__all__ = ["attention", "attention_reference", "cached_attention", "cached_attention_reference"]


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float | None) -> Tensor:
    """Attend for q (B, T, H, D), k and v (B, S, K, D), visible broadcastable to (B, H, T, S) -> (B, T, H, D)."""
    H, K = q.shape[2], k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
    k, v = k.repeat_interleave(H // K, dim=1), v.repeat_interleave(H // K, dim=1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)  # (B, H, T, S)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    weights = torch.softmax(scores, dim=-1)
    if visible is not None:  # a query that sees nothing gives 0, not NaN
        weights = torch.where(visible.any(-1, keepdim=True), weights, torch.zeros_like(weights))
    return (weights @ v).transpose(1, 2)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = True, scale: float | None = None
) -> Tensor:
    """Return softmax(q k^T scale) v: q (B, T, H, D), k and v (B, T, K, D) -> (B, T, H, D)."""
    T = q.shape[1]
    visible = torch.ones(T, T, dtype=torch.bool, device=q.device).tril() if causal else None
    return _attend(q, k, v, visible, scale)


def cached_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Append k, v (B, T, K, D) to the cache (B, K, P, D) and attend: query i sees slot j <= P + i where mask is not 0."""
    T, P = q.shape[1], past_key.shape[2]
    key = torch.cat((past_key, k.transpose(1, 2)), dim=2)  # (B, K, P+T, D)
    value = torch.cat((past_value, v.transpose(1, 2)), dim=2)
    visible = torch.ones(T, P + T, dtype=torch.bool, device=q.device).tril(P)
    if mask is not None:
        visible = visible & (mask != 0)[:, None, None, :]
    return _attend(q, key.transpose(1, 2), value.transpose(1, 2), visible, scale), key, value


attention = attention_reference
cached_attention = cached_attention_reference
