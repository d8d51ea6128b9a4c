"""Layer normalisation (Ba, Kiros and Hinton 2016), with the residual add in front fused into the same pass.

Shapes: x, residual, y, h are (..., C); weight and bias are (C,). All float32 in the kernel; on CUDA all bfloat16, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from portlm.ops import cuda, lazy
from portlm.ops.kernel_op import KernelOp, has_kernel, kernels
from portlm.ops.spec import Attribute, Attributes, Builder, Input, Node, OpSpec, like_first

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", F="torch.nn.functional", Tensor="torch:Tensor")

__all__ = ["layer_norm", "layer_norm_reference"]


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the definition in plain PyTorch: the oracle of the tests and the fallback without a kernel."""
    if residual is None:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    h = x + residual
    return F.layer_norm(h, weight.shape, weight, bias, eps), h


@overload
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = ..., residual: None = ...) -> Tensor: ...


@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor
) -> tuple[Tensor, Tensor]: ...


@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = ..., *, residual: Tensor
) -> tuple[Tensor, Tensor]: ...


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise the last dimension of ``h = x + residual``: ``(h - mean) / sqrt(var + eps) * weight + bias``.

    Args:
        x: (..., C).
        weight: (C,) gain.
        bias: (C,) shift.
        eps: added to the variance, which is the biased one (divided by C).
        residual: (..., C), added to x first.

    Returns:
        y of x's shape, or (y, h) when a residual is given, because the next residual add needs h.

    Raises:
        ValueError: the shapes do not fit; the message names them.
    """
    C = x.shape[-1] if x.dim() else 0
    if weight.shape != (C,) or bias.shape != (C,):
        raise ValueError(
            f"[layer_norm] weight and bias must be ({C},) for x {tuple(x.shape)}, "
            f"got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"[layer_norm] shapes must match, got {tuple(x.shape)} and {tuple(residual.shape)}")
    if not has_kernel(x, weight, bias, residual) and not cuda.has_cuda_kernel(x, weight, bias, residual):
        return layer_norm_reference(x, weight, bias, eps, residual)
    if residual is None:
        return _fused(x.contiguous(), weight.contiguous(), bias.contiguous(), eps)[0]
    y, h, _ = _fused_add(x.contiguous(), residual.contiguous(), weight.contiguous(), bias.contiguous(), eps)
    return y, h


def _statistics(x: Tensor) -> Tensor:
    return x.new_empty((2, *x.shape[:-1]), dtype=torch.float32)  # mean and 1 / deviation of each row


def _run_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float,
    y: Tensor, h: Tensor | None, statistics: Tensor,
) -> None:  # fmt: skip
    rows, mean = statistics.numel() // 2, statistics.data_ptr()
    arguments = (
        x.data_ptr(), 0 if residual is None else residual.data_ptr(), weight.data_ptr(), bias.data_ptr(), eps,
        y.data_ptr(), 0 if h is None else h.data_ptr(), mean, mean + 4 * rows,
    )  # fmt: skip
    if cuda.on_cuda(x):
        cuda.launch("layer_norm_fwd", x.device, *arguments, rows, x.shape[-1], x.dtype is torch.bfloat16)
    else:
        kernels.layer_norm_fwd(*arguments, rows, x.shape[-1])


def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, statistics = torch.empty_like(x), _statistics(x)
    _run_forward(x, None, weight, bias, eps, y, None, statistics)
    return y, statistics


def _forward_add(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, h, statistics = torch.empty_like(x), torch.empty_like(x), _statistics(x)
    _run_forward(x, residual, weight, bias, eps, y, h, statistics)
    return y, h, statistics


def _gradients(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = torch.empty_like(h), torch.empty_like(weight), torch.empty_like(weight)
    C, rows, mean = h.shape[-1], statistics.numel() // 2, statistics.data_ptr()
    arguments = (
        dy.data_ptr(), 0 if dh is None else dh.data_ptr(), h.data_ptr(), weight.data_ptr(),
        mean, mean + 4 * rows, dx.data_ptr(), dweight.data_ptr(), dbias.data_ptr(),
    )  # fmt: skip
    if cuda.on_cuda(h):
        blocks = cuda.row_blocks(rows)
        partial = statistics.new_empty((blocks, 2, C))
        bfloat16 = h.dtype is torch.bfloat16
        cuda.launch("layer_norm_bwd", h.device, *arguments, partial.data_ptr(), blocks, rows, C, bfloat16)
    else:
        kernels.layer_norm_bwd(*arguments, rows, C)
    return dx, dweight, dbias


_fused_gradients = KernelOp(
    "layer_norm_backward",
    _gradients,
    fake=lambda dy, dh, h, weight, statistics: (
        torch.empty_like(h),
        torch.empty_like(weight),
        torch.empty_like(weight),
    ),
)


def _contiguous(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad.contiguous()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _ = inputs
    _, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(x, weight, statistics)


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    h, weight, statistics = ctx.saved_tensors
    return *_fused_gradients(_contiguous(dy, h), None, h, weight, statistics), None


def _save_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, _, _ = inputs
    _, h, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(h, weight, statistics)


def _backward_add(ctx: Any, dy: Tensor | None, dh: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    h, weight, statistics = ctx.saved_tensors
    dh = None if dh is None else dh.contiguous()
    dx, dweight, dbias = _fused_gradients(_contiguous(dy, h), dh, h, weight, statistics)
    return dx, dx, dweight, dbias, None


_fused = KernelOp(
    "layer_norm",
    _forward,
    fake=lambda x, weight, bias, eps: (x.new_empty(x.shape), _statistics(x)),
    backward=_backward,
    setup_context=_save,
)
_fused_add = KernelOp(
    "add_layer_norm",
    _forward_add,
    fake=lambda x, residual, weight, bias, eps: (x.new_empty(x.shape), x.new_empty(x.shape), _statistics(x)),
    backward=_backward_add,
    setup_context=_save_add,
)


def _portable(g: Builder, inputs: Sequence[str], outputs: Sequence[str], attributes: Attributes) -> None:
    g.op("LayerNormalization", inputs, outputs[0], axis=-1, epsilon=attributes["epsilon"])


def _portable_add(g: Builder, inputs: Sequence[str], outputs: Sequence[str], attributes: Attributes) -> None:
    x, residual, weight, bias = inputs
    h = g.op("Add", (x, residual), outputs[1])
    _portable(g, (h, weight, bias), outputs, attributes)


def _read(arguments: Mapping[str, Any]) -> Attributes:
    return {"epsilon": arguments["eps"]}


SPEC = OpSpec(
    name="layer_norm",
    summary="layer normalisation, with the residual add in front",
    forward=("layer_norm_fwd",),
    backward=("layer_norm_bwd",),
    cuda=("layer_norm_fwd", "layer_norm_bwd"),
    nodes=(
        Node(
            op_type="LayerNorm",
            torch=("portlm::layer_norm",),
            inputs=(Input("x"), Input("weight"), Input("bias")),
            outputs=("y",),
            attributes=(Attribute("epsilon", float),),
            read=_read,
            shapes=like_first(),
            portable=_portable,
            rowwise=True,
            tvm="layer_norm",
        ),
        Node(
            op_type="AddLayerNorm",
            torch=("portlm::add_layer_norm",),
            inputs=(Input("x"), Input("residual"), Input("weight"), Input("bias")),
            outputs=("y", "input"),  # input = x + residual, y = its norm
            attributes=(Attribute("epsilon", float),),
            read=_read,
            shapes=like_first(2),
            portable=_portable_add,
            rowwise=True,
            tvm="add_layer_norm",
        ),
    ),
)
