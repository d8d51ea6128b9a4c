"""Linear map, y = x W^T + b."""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["linear", "linear_reference"]


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b: x (..., K), weight (N, K), bias (N,) -> (..., N)."""
    return F.linear(x, weight, bias)


linear = linear_reference
