"""SwiGLU gate (Shazeer 2020), y = silu(gate) * up."""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["swiglu", "swiglu_reference"]


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up for two tensors of equal shape (..., F)."""
    return F.silu(gate) * up


swiglu = swiglu_reference
