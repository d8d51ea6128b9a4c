"""Root-mean-square normalisation (Zhang and Sennrich 2019), with the residual add in front fused into the same pass.

Shapes: x, residual, y, h are (..., C); weight is (C,). All float32 in the kernel; on CUDA all bfloat16, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from portlm.ops import cuda, lazy
from portlm.ops.kernel_op import KernelOp, has_kernel, kernels
from portlm.ops.spec import Attribute, Attributes, Builder, Input, Node, OpSpec, like_first

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", Tensor="torch:Tensor")

__all__ = ["rms_norm", "rms_norm_reference"]


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the definition in plain PyTorch: the oracle of the tests and the fallback without a kernel."""
    h = x if residual is None else x + residual
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight
    return y if residual is None else (y, h)


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float = ..., residual: None = ...) -> Tensor: ...


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float = ..., *, residual: Tensor) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Scale the last dimension of ``h = x + residual`` to unit size: ``h / sqrt(mean(h^2) + eps) * weight``.

    Args:
        x: (..., C).
        weight: (C,) gain.
        eps: added to the mean of the squares.
        residual: (..., C), added to x first.

    Returns:
        y of x's shape, or (y, h) when a residual is given, because the next residual add needs h.

    Raises:
        ValueError: the shapes do not fit; the message names them.
    """
    C = x.shape[-1] if x.dim() else 0
    if not x.dim() or weight.shape != (C,):
        raise ValueError(
            f"[rms_norm] weight must be ({C},) for x {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"[rms_norm] shapes must match, got {tuple(x.shape)} and {tuple(residual.shape)}")
    if not has_kernel(x, weight, residual) and not cuda.has_cuda_kernel(x, weight, residual):
        return rms_norm_reference(x, weight, eps, residual)
    if residual is None:
        return _fused(x.contiguous(), weight.contiguous(), eps)[0]
    y, h, _ = _fused_add(x.contiguous(), residual.contiguous(), weight.contiguous(), eps)
    return y, h


def _statistic(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.float32)  # 1 / root mean square of each row


def _run_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, y: Tensor, h: Tensor | None, rstd: Tensor
) -> None:
    arguments = (
        x.data_ptr(), 0 if residual is None else residual.data_ptr(), weight.data_ptr(), eps,
        y.data_ptr(), 0 if h is None else h.data_ptr(), rstd.data_ptr(), rstd.numel(), x.shape[-1],
    )  # fmt: skip
    if cuda.on_cuda(x):
        cuda.launch("rms_norm_fwd", x.device, *arguments, x.dtype is torch.bfloat16)
    else:
        kernels.rms_norm_fwd(*arguments)


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, rstd = torch.empty_like(x), _statistic(x)
    _run_forward(x, None, weight, eps, y, None, rstd)
    return y, rstd


def _forward_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, h, rstd = torch.empty_like(x), torch.empty_like(x), _statistic(x)
    _run_forward(x, residual, weight, eps, y, h, rstd)
    return y, h, rstd


def _gradients(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    dx, dweight = torch.empty_like(h), torch.empty_like(weight)
    C, rows = h.shape[-1], rstd.numel()
    arguments = (
        dy.data_ptr(), 0 if dh is None else dh.data_ptr(), h.data_ptr(), weight.data_ptr(), rstd.data_ptr(),
        dx.data_ptr(), dweight.data_ptr(),
    )  # fmt: skip
    if cuda.on_cuda(h):
        blocks = cuda.row_blocks(rows)
        partial = rstd.new_empty((blocks, C))
        bfloat16 = h.dtype is torch.bfloat16
        cuda.launch("rms_norm_bwd", h.device, *arguments, partial.data_ptr(), blocks, rows, C, bfloat16)
    else:
        kernels.rms_norm_bwd(*arguments, rows, C)
    return dx, dweight


_fused_gradients = KernelOp(
    "rms_norm_backward",
    _gradients,
    fake=lambda dy, dh, h, weight, rstd: (torch.empty_like(h), torch.empty_like(weight)),
)


def _contiguous(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad.contiguous()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _ = inputs
    _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(x, weight, rstd)


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    h, weight, rstd = ctx.saved_tensors
    return *_fused_gradients(_contiguous(dy, h), None, h, weight, rstd), None


def _save_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, _ = inputs
    _, h, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(h, weight, rstd)


def _backward_add(ctx: Any, dy: Tensor | None, dh: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    h, weight, rstd = ctx.saved_tensors
    dh = None if dh is None else dh.contiguous()
    dx, dweight = _fused_gradients(_contiguous(dy, h), dh, h, weight, rstd)
    return dx, dx, dweight, None


_fused = KernelOp(
    "rms_norm",
    _forward,
    fake=lambda x, weight, eps: (x.new_empty(x.shape), _statistic(x)),
    backward=_backward,
    setup_context=_save,
)
_fused_add = KernelOp(
    "add_rms_norm",
    _forward_add,
    fake=lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape), _statistic(x)),
    backward=_backward_add,
    setup_context=_save_add,
)


def _portable(g: Builder, inputs: Sequence[str], outputs: Sequence[str], attributes: Attributes) -> None:
    x, weight = inputs
    y = outputs[0]
    square = g.op("Mul", (x, x), f"{y}.square")
    mean = g.op("ReduceMean", (square, g.ints(-1)), f"{y}.mean", keepdims=1)
    shifted = g.op("Add", (mean, g.scalar(attributes["epsilon"])), f"{y}.variance")
    root = g.op("Sqrt", (shifted,), f"{y}.rms")
    scaled = g.op("Div", (x, root), f"{y}.normed")
    g.op("Mul", (scaled, weight), y)


def _portable_add(g: Builder, inputs: Sequence[str], outputs: Sequence[str], attributes: Attributes) -> None:
    x, residual, weight = inputs
    h = g.op("Add", (x, residual), outputs[1])
    _portable(g, (h, weight), outputs, attributes)


def _read(arguments: Mapping[str, Any]) -> Attributes:
    return {"epsilon": arguments["eps"]}


SPEC = OpSpec(
    name="rms_norm",
    summary="root-mean-square normalisation, with the residual add in front",
    forward=("rms_norm_fwd",),
    backward=("rms_norm_bwd",),
    cuda=("rms_norm_fwd", "rms_norm_bwd"),
    nodes=(
        Node(
            op_type="RmsNorm",
            torch=("portlm::rms_norm",),
            inputs=(Input("x"), Input("weight")),
            outputs=("y",),
            attributes=(Attribute("epsilon", float),),
            read=_read,
            shapes=like_first(),
            portable=_portable,
            rowwise=True,
            tvm="rms_norm",
        ),
        Node(
            op_type="AddRmsNorm",
            torch=("portlm::add_rms_norm",),
            inputs=(Input("x"), Input("residual"), Input("weight")),
            outputs=("y", "input"),  # input = x + residual, y = its norm
            attributes=(Attribute("epsilon", float),),
            read=_read,
            shapes=like_first(2),
            portable=_portable_add,
            rowwise=True,
            tvm="add_rms_norm",
        ),
    ),
)
