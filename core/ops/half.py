"""What the ops on weights of 16 bits share: float16 and bfloat16 as kernels read them, widened element by element.

A matrix W (N, K) lies as float16 or bfloat16, and means exactly the float32 numbers that its elements are. Kernels read
it in panels (ceil(N / 64), K, 64), rows beyond N zero: element (n, k) is at (n / 64, k, n % 64).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from portlm.ops import cuda, lazy
from portlm.ops.kernel_op import available, kernels

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", Tensor="torch:Tensor")

__all__ = ["BITS", "DTYPES", "PANEL", "check_weight", "pack", "pack_array", "packed_shape", "reads_rows"]

BITS = 16
DTYPES = ("float16", "bfloat16")
PANEL = 64  # rows


def pack_array(weight: np.ndarray) -> np.ndarray:
    """Return a matrix (N, K) of any 16 bits in panels, (ceil(N / 64), K, 64) uint16, as half_linear reads it."""
    weight = np.ascontiguousarray(weight).view(np.uint16)
    N, K = weight.shape
    panels = np.empty((-(-N // PANEL), K, PANEL), np.uint16)
    kernels.half_panels(weight.ctypes.data, panels.ctypes.data, N, K)
    return panels


def pack(weight: Tensor) -> Tensor:
    """Return what the ops read of a weight (N, K): panels, or float32 (N, K) where no kernel could read them.

    On CUDA, whose kernels read it as it is, the weight itself.
    """
    check_weight("weight of 16 bits", weight)
    if reads_rows(weight):
        return weight
    if not available() or not weight.is_cpu:
        return weight.float()
    return torch.from_numpy(pack_array(weight.contiguous().view(torch.int16).numpy()).view(np.int16)).view(
        weight.dtype
    )


def reads_rows(weight: Tensor) -> bool:
    """Say whether the weight lies on a device whose kernels read it as it is."""
    return cuda.on_cuda(weight) and cuda.has_cuda_kernel(weight.new_empty(0, dtype=torch.float32))


def packed_shape(weight: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of what `pack` gives on the CPU for a weight (N, K)."""
    N, K = weight
    return (-(-N // PANEL), K, PANEL) if available() else (N, K)


def check_weight(op: str, weight: Tensor, packed: Tensor | None = None) -> None:
    """Raise ValueError unless a weight is of 16 bits, and what was made of it fits; the message begins with `op`."""
    if weight.dim() != 2 or weight.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"[{op}] weight must be float16 or bfloat16 of two dimensions, got {weight.dtype} {tuple(weight.shape)}"
        )
    if packed is None:
        return
    N, K = weight.shape
    wanted = {torch.float32: (N, K), weight.dtype: (-(-N // PANEL), K, PANEL)}
    if reads_rows(weight):
        wanted[weight.dtype] = (N, K)
    if packed.shape != wanted.get(packed.dtype) or not packed.is_contiguous():
        raise ValueError(
            f"[{op}] packed must be what portlm.ops.half.pack gives of weight {tuple(weight.shape)}, "
            f"got {packed.dtype} {tuple(packed.shape)}"
        )
