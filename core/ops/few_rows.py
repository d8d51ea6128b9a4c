"""The CUDA twins of linear maps: a few rows of x by one kernel, which reads W as it is kept, once for eight rows.

More rows than that are a matrix product of PyTorch's, of what W means. So the kernels have no form of W of their own:
of a quantized matrix they read the numbers and zero points as core/ops/quantized.py says, and the scales as float16; of
one of 16 bits the matrix itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from portlm.ops import cuda, lazy
from portlm.ops.kernel_op import address, is_traced, needs_gradient
from portlm.ops.narrow import ACTIVATIONS, linear_reference

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", Tensor="torch:Tensor")

__all__ = ["MOST_ROWS", "dense_linear", "packed_linear", "packed_rows", "takes", "takes_few", "takes_packed"]

MOST_ROWS = 32  # of a quantized matrix: about where writing down what it means, for a product, costs no more
MOST_DENSE_ROWS = 8
ALIGNMENT = 16  # bytes: where a quantized matrix begins
GROUPS = (32, 64, 128)


def takes(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> bool:
    """Say whether the kernels take x and bias, float32 or bfloat16, and a weight beside them, for inference."""
    return (
        cuda.has_cuda_kernel(x, bias)
        and weight.device == x.device
        and weight.is_contiguous()
        and not needs_gradient(x, weight, bias)
        and not is_traced(x)
    )


def takes_few(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Say the same of a weight of x's own type, of so few rows that no product of PyTorch's is meant for them."""
    return takes(weight, x, bias) and weight.dtype is x.dtype and 0 < x.shape[:-1].numel() <= MOST_DENSE_ROWS


def takes_packed(weight: Tensor, bits: int) -> bool:
    """Say whether they take a quantized weight (N, G, g * bits / 8) of these sizes, where it lies."""
    group = weight.shape[2] * 8 // bits
    return group in GROUPS and weight.data_ptr() % ALIGNMENT == 0


def packed_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    bits: int,
    activation: str,
) -> Tensor:
    """Return activation(x W^T + b) in x's type; see quantized_linear.

    Args:
        x: (..., K).
        weight: (N, G, g * bits / 8) uint8.
        scale: (N, G) float16.
        zero: (N, ceil(G * bits / 8)) uint8, or None.
        bias: (N,), or None.
        bits: 4 or 8.
        activation: one of ACTIVATIONS.
    """
    N, G, size = weight.shape
    group = size * 8 // bits
    x, y = x.contiguous(), x.new_empty((*x.shape[:-1], N))
    rows = y.shape[:-1].numel()
    if rows > MOST_ROWS:
        every = packed_rows(None, weight, scale, zero, bits, x.dtype)
        return linear_reference(x, every, bias, activation)
    zero, bias = (None if t is None else t.contiguous() for t in (zero, bias))
    cuda.launch(
        "packed_linear", x.device, x.data_ptr(), weight.data_ptr(), scale.data_ptr(), address(zero), address(bias),
        y.data_ptr(), rows, N, G * group, group, bits, ACTIVATIONS.index(activation), x.dtype is torch.bfloat16,
    )  # fmt: skip
    return y


def packed_rows(
    ids: Tensor | None, weight: Tensor, scale: Tensor, zero: Tensor | None, bits: int, dtype: torch.dtype
) -> Tensor:
    """Return rows (..., K) of W at ids (...) int64, or all (N, K) for None. NaN where an id is outside [0, N)."""
    N, G, size = weight.shape
    group = size * 8 // bits
    ids = None if ids is None else ids.contiguous()
    y = weight.new_empty((*((N,) if ids is None else ids.shape), G * group), dtype=dtype)
    zero = None if zero is None else zero.contiguous()
    cuda.launch(
        "packed_rows", weight.device, address(ids), weight.data_ptr(), scale.data_ptr(), address(zero), y.data_ptr(),
        y.shape[:-1].numel(), N, G * group, group, bits, dtype is torch.bfloat16,
    )  # fmt: skip
    return y


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """Return activation(x W^T + b) in x's type, computed in float32; W (N, K) is float32, bfloat16 or float16."""
    N, K = weight.shape
    x, y = x.contiguous(), x.new_empty((*x.shape[:-1], N))
    rows = y.shape[:-1].numel()
    if rows > MOST_DENSE_ROWS:
        return linear_reference(x, weight.to(x.dtype), bias, activation)
    bias = None if bias is None else bias.contiguous()
    kind = (torch.float32, torch.bfloat16, torch.float16).index(weight.dtype)
    cuda.launch(
        "dense_linear", x.device, x.data_ptr(), weight.data_ptr(), address(bias), y.data_ptr(), rows, N, K, kind,
        ACTIVATIONS.index(activation), x.dtype is torch.bfloat16,
    )  # fmt: skip
    return y
