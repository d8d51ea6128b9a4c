"""Cross-entropy of a linear head, a chunk of rows at a time: the (N, V) logits and their gradient never exist.

The loss is the last thing a training step computes, so forward already knows both gradients up to the factor that
arrives from above, which is nearly always 1. Computing them there, while a chunk's logits are in the cache, costs
three matrix products; to compute them in backward would need the logits a second time and cost a fourth.

Shapes: x (N, C) and weight (V, C) float32 in the CPU kernel; targets (N,) int64; the result is a scalar.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from portlm.ops.kernel_op import KernelOp, has_kernel, is_traced, kernels
from portlm.ops.linear_cross_entropy_cuda import has_cuda_kernel, linear_cross_entropy_cuda
from portlm.ops.precision import products_in, rounded_linear_reference, rounds_products
from portlm.ops.spec import OpSpec

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]


def linear_cross_entropy_reference(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """Compute the definition in plain PyTorch: the oracle of the tests and the fallback without a kernel."""
    product = rounded_linear_reference if rounds_products() else F.linear
    return F.cross_entropy(product(x, weight), targets, ignore_index=ignore_index, reduction=reduction)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """Return the mean (or sum) over rows of ``logsumexp(weight x) - (weight x)[target]``.

    With gradients enabled they are computed along with the loss, for those of x and weight that require them.

    Args:
        x: (N, C).
        weight: (V, C), the head.
        targets: (N,) int64, each in [0, V) or equal to ignore_index.
        ignore_index: rows with this target do not count and get no gradient.
        reduction: "mean" over the rows that count, or "sum".

    Returns:
        A scalar; if no row counts, 0 for the sum and NaN for the mean.

    Raises:
        ValueError: shapes, the dtype of targets or the reduction do not fit; the message names them.
        IndexError: a target is outside [0, V); the message names it, its place and V. On CUDA the loss is NaN instead,
            because to look would stall the device.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or targets.shape != x.shape[:1]:
        raise ValueError(
            f"[linear_cross_entropy] x must be (N, C), weight (V, C) and targets (N,), "
            f"got {tuple(x.shape)}, {tuple(weight.shape)} and {tuple(targets.shape)}"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"[linear_cross_entropy] targets must be int64, got {targets.dtype}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'[linear_cross_entropy] reduction must be "mean" or "sum", got "{reduction}"')
    if has_cuda_kernel(x, weight, targets):
        return linear_cross_entropy_cuda(x, weight, targets, ignore_index, reduction)
    if not has_kernel(x, weight) or targets.device != x.device:
        return linear_cross_entropy_reference(x, weight, targets, ignore_index, reduction)
    x, weight, targets, mean = x.contiguous(), weight.contiguous(), targets.contiguous(), reduction == "mean"
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        needed = x.requires_grad, weight.requires_grad
        return _fused_with_gradients(x, weight, targets, ignore_index, mean, *needed, rounds_products())[0]
    return _fused(x, weight, targets, ignore_index, mean, rounds_products())


def _run(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    mean: bool,
    rounds: bool,
    dx: int,
    dweight: int,
) -> Tensor:
    """Call the kernel with the addresses of the gradients, 0 for those that nobody needs."""
    N, (V, C) = targets.shape[0], weight.shape
    loss = x.new_empty(())
    bad = (kernels.linear_cross_entropy_bf16 if rounds else kernels.linear_cross_entropy)(
        x.data_ptr(), weight.data_ptr(), targets.data_ptr(), loss.data_ptr(), dx, dweight, N, C, V,
        ignore_index, mean,
    )  # fmt: skip
    if bad >= 0:
        raise IndexError(
            f"[linear_cross_entropy] target {int(targets[bad])} at position {bad} is outside [0, {V}), "
            f"the rows of the head, and is not ignore_index ({ignore_index})"
        )
    return loss


def _forward(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, mean: bool, rounds: bool = False
) -> Tensor:
    return _run(x, weight, targets, ignore_index, mean, rounds, 0, 0)


def _gradient_like(t: Tensor, needed: bool) -> Tensor:
    return torch.empty_like(t) if needed else t.new_empty(0)


def _forward_with_gradients(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    mean: bool,
    need_x: bool,
    need_weight: bool,
    rounds: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight = _gradient_like(x, need_x), _gradient_like(weight, need_weight)
    # an empty tensor has no address, so one that is not needed is 0 for the kernel
    loss = _run(x, weight, targets, ignore_index, mean, rounds, dx.data_ptr(), dweight.data_ptr())
    return loss, dx, dweight


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, targets, ignore_index, mean, _, _, rounds = inputs
    _, dx, dweight = output
    ctx.mark_non_differentiable(dx, dweight)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, targets)
    ctx.settings = ignore_index, "mean" if mean else "sum"
    ctx.precision = "bf16" if rounds else "fp32"
    ctx.gradients = dx, dweight


def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dloss is None:
        return (None,) * 8
    needed = ctx.needs_input_grad[:2]
    if is_traced(dloss):
        scaled = [dloss * g if n else None for g, n in zip(ctx.gradients, needed, strict=True)]
        return *scaled, *[None] * 6
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None or torch.is_grad_enabled():
        return *_gradients_again(ctx, dloss, needed), *[None] * 6
    # The gradients are handed out, not copied: that of the head can be the largest tensor of a step. From here on they
    # belong to the caller, who may add to them in place, so a second pass through this node cannot use them.
    factor = dloss.item()
    if factor != 1.0:
        for g in gradients:
            g.mul_(factor)
    return *(g if n else None for g, n in zip(gradients, needed, strict=True)), *[None] * 6


def _gradients_again(ctx: Any, dloss: Tensor, needed: tuple[bool, ...]) -> list[Tensor | None]:
    """Differentiate the reference, for a second pass through a retained graph or gradients of gradients."""
    x, weight, targets = ctx.saved_tensors
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad(), products_in(ctx.precision):
        loss = linear_cross_entropy_reference(x, weight, targets, *ctx.settings)
    wanted = [t for t, n in zip((x, weight), needed, strict=True) if n]
    found = iter(torch.autograd.grad(loss, wanted, dloss, create_graph=differentiable))
    return [next(found) if n else None for n in needed]


_fused = KernelOp(
    "linear_cross_entropy",
    _forward,
    fake=lambda x, weight, targets, ignore_index, mean, rounds=False: x.new_empty(()),
)
_fused_with_gradients = KernelOp(
    "linear_cross_entropy_with_gradients",
    _forward_with_gradients,
    fake=lambda x, weight, targets, ignore_index, mean, need_x, need_weight, rounds=False: (
        x.new_empty(()),
        _gradient_like(x, need_x),
        _gradient_like(weight, need_weight),
    ),
    backward=_backward,
    setup_context=_save,
)


SPEC = OpSpec(
    name="linear_cross_entropy",
    summary="cross-entropy of a linear head without the full logits",
    forward=("linear_cross_entropy",),
    backward=("linear_cross_entropy",),
    cuda=("cross_entropy",),
)
