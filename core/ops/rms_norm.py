"""Root-mean-square normalisation (Zhang and Sennrich 2019), with the residual add in front."""

import torch
from torch import Tensor

__all__ = ["rms_norm", "rms_norm_reference"]


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Return h / sqrt(mean(h^2) + eps) * weight for h = x + residual; (y, h) when a residual is given."""
    h = x if residual is None else x + residual
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight
    return y if residual is None else (y, h)


rms_norm = rms_norm_reference
