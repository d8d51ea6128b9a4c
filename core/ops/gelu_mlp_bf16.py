"""gelu_mlp with operands rounded to bfloat16 (:mod:`portlm.ops.precision`).

For backward x and GELU's argument are kept rounded: half the memory, and half of what a pass over them moves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from portlm.ops import lazy
from portlm.ops.kernel_op import KernelOp, address, kernels
from portlm.ops.mlp import backward_by, empty_gradients

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", Tensor="torch:Tensor")

__all__ = ["gelu_mlp_bf16"]


def gelu_mlp_bf16(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, tanh: bool
) -> Tensor:
    """Return gelu_mlp of contiguous float32 tensors on the CPU with rounded products; shapes as there."""
    y: Tensor = _fused(x, w1, b1, w2, b2, tanh)[0]
    return y


def _empty(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, tanh: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty((*x.shape[:-1], w2.shape[0])),
        torch.empty_like(x, dtype=torch.bfloat16),
        x.new_empty((*x.shape[:-1], w1.shape[0]), dtype=torch.bfloat16),
    )


def _forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, tanh: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y and, for backward, x and the argument of GELU, both rounded."""
    y, kept, pre = _empty(x, w1, b1, w2, b2, tanh)
    kernels.gelu_mlp_bf16_fwd(
        x.data_ptr(), w1.data_ptr(), address(b1), w2.data_ptr(), address(b2), kept.data_ptr(), pre.data_ptr(),
        y.data_ptr(), x.shape[:-1].numel(), x.shape[-1], w1.shape[0], w2.shape[0], tanh,
    )  # fmt: skip
    return y, kept, pre


def _gradients(
    dy: Tensor, kept: Tensor, pre: Tensor, w1: Tensor, w2: Tensor, needs: list[bool], tanh: bool
) -> list[Tensor]:
    """Return dx, dw1, db1, dw2 and db2, empty where not needed."""
    grads = empty_gradients(dy, kept, w1, w2, needs)
    kernels.gelu_mlp_bf16_bwd(
        dy.data_ptr(), kept.data_ptr(), pre.data_ptr(), w1.data_ptr(), w2.data_ptr(),
        *(g.data_ptr() if need else 0 for g, need in zip(grads, needs, strict=True)),
        kept.shape[:-1].numel(), kept.shape[-1], w1.shape[0], w2.shape[0], tanh,
    )  # fmt: skip
    return grads


_fused_gradients = KernelOp(
    "gelu_mlp_bf16_backward",
    _gradients,
    fake=lambda dy, kept, pre, w1, w2, needs, tanh: empty_gradients(dy, kept, w1, w2, needs),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, w1, b1, w2, b2, *ctx.settings = inputs
    ctx.has_bias = b1 is not None, b2 is not None
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:], w1, w2)


_fused = KernelOp(
    "gelu_mlp_bf16", _forward, fake=_empty, backward=backward_by(_fused_gradients), setup_context=_save
)
