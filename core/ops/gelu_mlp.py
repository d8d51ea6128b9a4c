"""The two-layer perceptron of the GPT family: linear, GELU (Hendrycks and Gimpel 2016), linear."""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["gelu_mlp", "gelu_mlp_reference"]


def gelu_mlp_reference(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, approximate: str = "tanh"
) -> Tensor:
    """Return gelu(x W1^T + b1) W2^T + b2: x (..., C), w1 (F, C), w2 (C, F) -> (..., C)."""
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate=approximate), w2, b2)


gelu_mlp = gelu_mlp_reference
