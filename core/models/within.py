"""Attention within a row: to all earlier tokens, or to those alone that a bias leaves.

A row may hold several texts, none of which is to see another (portlm.data.packing). Causal attention then becomes
attention with a bias on the scores, which hides the other texts and what comes later.

B batch, T time, H query heads, K key/value heads, D head width.
"""

from torch import Tensor

from portlm.data.packing import HIDDEN
from portlm.errors import UsageError
from portlm.ops.attention import attention
from portlm.ops.masked_attention import masked_attention


def attend_within(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return the attention (B, T, H, D) of a row's tokens to each other.

    Args:
        q: (B, T, H, D).
        k: (B, T, K, D).
        v: (B, T, K, D).
        bias: (B, 1, T, T), added to the scores; it hides what comes later. None leaves all that is not later.
        scale: Of the scores; 1 / sqrt(D) if None.
        window: Query t sees keys t - window + 1 .. t alone.
        softcap: c makes a scaled score s to c tanh(s / c).

    Raises:
        UsageError: There are both a bias and a soft cap, for which no kernel is made.
    """
    if bias is None:
        return attention(q, k, v, scale=scale, window=window, softcap=softcap)
    if softcap:
        raise UsageError("attention with a soft cap takes no bias")
    T = q.shape[1]
    if window and window < T:
        near = bias.new_ones(T, T).triu(1 - window)
        bias = bias.masked_fill(near == 0, HIDDEN)
    return masked_attention(q, k, v, None, bias, scale)
