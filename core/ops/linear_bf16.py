"""linear with operands rounded to bfloat16 (:mod:`portlm.ops.precision`): x is kept rounded for backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from portlm.ops import lazy
from portlm.ops.kernel_op import KernelOp, kernels

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", Tensor="torch:Tensor")

__all__ = ["linear_bf16"]


def linear_bf16(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return R(x) R(W)^T + b for contiguous float32 tensors on the CPU, where R rounds; shapes as in linear."""
    y: Tensor = _fused(x, weight, bias)[0]
    return y


def _empty(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], weight.shape[0])), torch.empty_like(x, dtype=torch.bfloat16)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return y and x as it was rounded."""
    y, kept = _empty(x, weight, bias)
    N, K = weight.shape
    kernels.linear_bf16_fwd(
        x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(), kept.data_ptr(),
        y.shape[:-1].numel(), N, K,
    )  # fmt: skip
    return y, kept


def _empty_gradients(dy: Tensor, kept: Tensor, weight: Tensor, needs: list[bool]) -> list[Tensor]:
    shapes = (kept.shape, weight.shape, weight.shape[:1])
    return [dy.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True)]


def _gradients(dy: Tensor, kept: Tensor, weight: Tensor, needs: list[bool]) -> list[Tensor]:
    """Return dx, dweight and dbias, empty where not needed: no op can return None."""
    grads = _empty_gradients(dy, kept, weight, needs)
    N, K = weight.shape
    kernels.linear_bf16_bwd(
        dy.data_ptr(), kept.data_ptr(), weight.data_ptr(),
        *(g.data_ptr() if need else 0 for g, need in zip(grads, needs, strict=True)), dy.shape[:-1].numel(), N, K,
    )  # fmt: skip
    return grads


_fused_gradients = KernelOp("linear_bf16_backward", _gradients, fake=_empty_gradients)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, weight, bias = inputs
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], weight)


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
    grads = _fused_gradients(dy.contiguous(), *ctx.saved_tensors, needs)
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


_fused = KernelOp("linear_bf16", _forward, fake=_empty, backward=_backward, setup_context=_save)
