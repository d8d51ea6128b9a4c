"""Cross-entropy of a linear head on CUDA, a chunk of rows at a time, so that the logits never exist as a whole.

For each chunk one matrix product makes the logits, one kernel turns them into losses and, in their place, their
gradients, and two products carry those to x and weight. The gradients are thus finished in the forward pass, and the
backward pass only scales them; Hsu et al. 2024 (Liger Kernel, arXiv:2410.10989) describe the scheme.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from portlm.ops import cuda
from portlm.ops.kernel_op import KernelOp

__all__ = ["has_cuda_kernel", "linear_cross_entropy_cuda"]

_CHUNK_BYTES = 1 << 28  # of logits: large enough to fill the device, small beside the model


def has_cuda_kernel(x: Tensor, weight: Tensor, targets: Tensor) -> bool:
    """Say whether :func:`linear_cross_entropy_cuda` takes these tensors."""
    return cuda.has_cuda_kernel(x, weight) and targets.device == x.device


def linear_cross_entropy_cuda(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """Return the cross-entropy of x W^T for tensors that :func:`has_cuda_kernel` accepts.

    A target outside the vocabulary that is not ``ignore_index`` makes the loss NaN: reading it on the host to name it
    would stall the device.

    Args:
        x: (N, C), float32 or bfloat16, like weight.
        weight: (V, C).
        targets: (N,) int64.
        ignore_index: rows with this target count for nothing.
        reduction: "mean" over the rows that count, NaN if there are none, or "sum".

    Returns:
        The loss, a float32 scalar.
    """
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    loss, _, _ = _fused(
        x.contiguous(), weight.contiguous(), targets.contiguous(), ignore_index, reduction == "mean", wanted
    )
    return loss


def _rows_per_chunk(weight: Tensor) -> int:
    row = weight.shape[0] * weight.element_size()
    return max(128, _CHUNK_BYTES // max(row, 1) // 128 * 128)  # whole tiles of the matrix products


def _forward(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, mean: bool, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    N, V = x.shape[0], weight.shape[0]
    losses = torch.empty(N, dtype=torch.float32, device=x.device)
    count = (targets != ignore_index).sum()
    scale = (1.0 / count if mean else torch.ones_like(count)).float()
    dx, dweight = _empty_gradients(x, weight, gradients)
    # Many bfloat16 terms would lose the small ones: chunks are added up in float32.
    sums = dweight if x.dtype is torch.float32 else torch.empty_like(dweight, dtype=torch.float32)
    sums.zero_()
    step = _rows_per_chunk(weight)
    for begin in range(0, N, step):
        rows = slice(begin, min(begin + step, N))
        logits = x[rows] @ weight.t()  # (n, V)
        cuda.launch(
            "cross_entropy", x.device, logits.data_ptr(), targets[rows].data_ptr(), losses[rows].data_ptr(),
            scale.data_ptr(), logits.shape[0], V, ignore_index, gradients, x.dtype is torch.bfloat16,
        )  # fmt: skip
        if gradients:
            torch.mm(logits, weight, out=dx[rows])
            if x.dtype is torch.float32:
                sums.addmm_(logits.t(), x[rows])
            else:
                sums.add_(logits.t() @ x[rows])
    if sums is not dweight:
        dweight.copy_(sums)
    return losses.sum() * scale, dx, dweight


def _empty_gradients(x: Tensor, weight: Tensor, gradients: bool) -> tuple[Tensor, Tensor]:
    if gradients:
        return torch.empty_like(x), torch.empty_like(weight)
    return x.new_empty(0), weight.new_empty(0)


def _fake(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, mean: bool, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty((), dtype=torch.float32), *_empty_gradients(x, weight, gradients)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, dx, dweight = output
    ctx.mark_non_differentiable(dx, dweight)
    ctx.save_for_backward(dx, dweight)


def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return None, None, None, None, None, None
    dx, dweight = ctx.saved_tensors
    return dx * dloss.to(dx.dtype), dweight * dloss.to(dweight.dtype), None, None, None, None


_fused = KernelOp("linear_cross_entropy_cuda", _forward, fake=_fake, backward=_backward, setup_context=_save)
