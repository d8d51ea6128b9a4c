"""The two-layer perceptrons on CUDA: PyTorch's matrix products, and kernels for bias and activation between them.

Shapes: x is (..., C), w1 (F, C), b1 (F,), w2 (N, F), b2 (N,), all float32 or all bfloat16. For backward the first
product is kept, and the hidden layer is made of it again in the pass that differentiates it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from portlm.ops import cuda, lazy
from portlm.ops.kernel_op import KernelOp, address
from portlm.ops.mlp import backward_by, empty_gradients

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", Tensor="torch:Tensor")

__all__ = ["mlp_cuda"]

# Activation -> the kernels' name, and what they take between the sizes and the type.
_KERNELS: dict[str, tuple[str, tuple[int, ...]]] = {
    "gelu": ("gelu_bias", (0,)),
    "gelu_tanh": ("gelu_bias", (1,)),
    "relu_squared": ("relu_squared_bias", ()),
}


def mlp_cuda(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str
) -> Tensor:
    """Return activation(x W1^T + b1) W2^T + b2 of contiguous tensors that ``cuda.has_cuda_kernel`` accepts.

    Args:
        x: (..., C).
        w1: (F, C).
        b1: (F,).
        w2: (N, F).
        b2: (N,).
        activation: "gelu", "gelu_tanh" or "relu_squared".

    Returns:
        (..., N).
    """
    y: Tensor = _fused(x, w1, b1, w2, b2, activation)[0]
    return y


def _empty(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    rows = x.shape[:-1]
    return x.new_empty((*rows, w2.shape[0])), x.new_empty((rows.numel(), w1.shape[0]))


def _forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """Return y and, for backward, x W1^T (rows, F)."""
    rows = x.shape[:-1]
    pre = x.view(rows.numel(), x.shape[-1]) @ w1.t()
    hidden = torch.empty_like(pre)
    name, settings = _KERNELS[activation]
    cuda.launch(
        f"{name}_fwd", x.device, pre.data_ptr(), address(b1), hidden.data_ptr(), *pre.shape, *settings,
        x.dtype is torch.bfloat16,
    )  # fmt: skip
    y = hidden @ w2.t() if b2 is None else torch.addmm(b2, hidden, w2.t())
    return y.view(*rows, w2.shape[0]), pre


def _gradients(
    dy: Tensor,
    x: Tensor,
    pre: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    needs: list[bool],
    activation: str,
) -> list[Tensor]:
    """Return dx, dw1, db1, dw2 and db2, empty where not needed."""
    dx, dw1, db1, dw2, db2 = grads = empty_gradients(dy, x, w1, w2, needs)
    (rows, F), bfloat16 = pre.shape, x.dtype is torch.bfloat16
    x, dy = x.view(rows, x.shape[-1]), dy.view(rows, w2.shape[0])
    if needs[4]:
        torch.sum(dy, 0, out=db2)
    if not any(needs[:4]):
        return grads
    dhidden = dy @ w2  # (rows, F)
    hidden = torch.empty_like(pre) if needs[3] else None
    blocks = cuda.row_blocks(rows)
    partial = pre.new_empty((blocks, F) if needs[2] else 0, dtype=torch.float32)
    name, settings = _KERNELS[activation]
    cuda.launch(
        f"{name}_bwd", x.device, dhidden.data_ptr(), pre.data_ptr(), address(b1), dhidden.data_ptr(), address(hidden),
        db1.data_ptr() if needs[2] else 0, partial.data_ptr(), blocks, rows, F, *settings, bfloat16,
    )  # fmt: skip
    if hidden is not None:
        torch.mm(dy.t(), hidden, out=dw2)
    if needs[1]:
        torch.mm(dhidden.t(), x, out=dw1)
    if needs[0]:
        torch.mm(dhidden, w1, out=dx.view(x.shape))
    return grads


_fused_gradients = KernelOp(
    "mlp_cuda_backward",
    _gradients,
    fake=lambda dy, x, pre, w1, w2, b1, needs, activation: empty_gradients(dy, x, w1, w2, needs),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w1, b1, w2, b2, *ctx.settings = inputs
    ctx.has_bias = b1 is not None, b2 is not None
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], w1, w2, b1)


_fused = KernelOp(
    "mlp_cuda", _forward, fake=_empty, backward=backward_by(_fused_gradients), setup_context=_save
)
