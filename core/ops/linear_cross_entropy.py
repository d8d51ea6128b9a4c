"""Cross-entropy of a linear head."""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]


def linear_cross_entropy_reference(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """Return the cross-entropy of x W^T: x (N, C), weight (V, C), targets (N,) int64 -> scalar."""
    return F.cross_entropy(F.linear(x, weight), targets, ignore_index=ignore_index, reduction=reduction)


linear_cross_entropy = linear_cross_entropy_reference
