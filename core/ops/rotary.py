"""Rotary position embedding (Su et al. 2021), halves convention."""

import torch
from torch import Tensor

__all__ = ["rotary", "rotary_reference"]


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (x1, x2) to (x1 cos - x2 sin, x2 cos + x1 sin): x (B, T, H, D), cos and sin (T, D/2) or (B, T, D/2)."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (..., T, 1, D/2)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


rotary = rotary_reference
