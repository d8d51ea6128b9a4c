"""Linear map, y = x W^T + b, on portlm's own matrix product.

Shapes: x is (..., K), weight (N, K), bias (N,), y (..., N). All float32 in the kernel, which runs wherever there is
one; on CUDA there is one for inference of a few rows, of float32 or bfloat16, and PyTorch's product for all else.
benchmarks/bench_linear.py measures it against PyTorch's: about twice as fast for many rows on a CPU with
AVX-512, about even for one row of a large weight, and behind by the 2 µs of this wrapper for one row of a tiny one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from portlm.ops import few_rows, lazy
from portlm.ops.kernel_op import KernelOp, has_kernel, kernels
from portlm.ops.linear_bf16 import linear_bf16
from portlm.ops.precision import rounded_linear_reference, rounds_products
from portlm.ops.spec import Attribute, Attributes, Builder, Input, Node, OpSpec, Shape

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", F="torch.nn.functional", Tensor="torch:Tensor")

__all__ = ["linear", "linear_reference"]


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute the definition in plain PyTorch: the oracle of the tests and the fallback without a kernel."""
    return F.linear(x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b.

    Results and gradients are the same bits on any number of threads. Inside ``precision.products_in("bf16")`` operands
    are rounded to bfloat16.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,).

    Returns:
        (..., N).

    Raises:
        ValueError: the shapes do not fit; the message names them.
    """
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"[linear] weight must be (N, {x.shape[-1] if x.dim() else 0}) for x {tuple(x.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"[linear] bias must be ({weight.shape[0]},) for weight {tuple(weight.shape)}, got {tuple(bias.shape)}"
        )
    if few_rows.takes_few(x, weight, bias) and not rounds_products():
        return few_rows.dense_linear(x, weight, bias)
    if not has_kernel(x, weight, bias):
        return (rounded_linear_reference if rounds_products() else linear_reference)(x, weight, bias)
    if rounds_products():
        return linear_bf16(x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous())
    return _fused(x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous())


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    N, K = weight.shape
    y = x.new_empty((*x.shape[:-1], N))
    kernels.gemm(
        x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(),
        y.shape[:-1].numel(), N, K, K, K, N, 0, 1, 0,
    )  # fmt: skip
    return y


def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dweight and dbias, empty where not needed: no op can return None."""
    N, K = weight.shape
    dx, dweight, dbias = _empty_gradients(dy, x, weight, need_x, need_weight, need_bias)
    kernels.linear_bwd(
        dy.data_ptr(), x.data_ptr(), weight.data_ptr(), dx.data_ptr() if need_x else 0,
        dweight.data_ptr() if need_weight else 0, dbias.data_ptr() if need_bias else 0,
        dy.shape[:-1].numel(), N, K,
    )  # fmt: skip
    return dx, dweight, dbias


def _empty_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x) if need_x else x.new_empty(0),
        torch.empty_like(weight) if need_weight else x.new_empty(0),
        weight.new_empty(weight.shape[0] if need_bias else 0),
    )


_fused_gradients = KernelOp("linear_backward", _gradients, fake=_empty_gradients)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None
    x, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]
    grads = _fused_gradients(dy.contiguous(), x, weight, *needs)
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


_fused = KernelOp(
    "linear",
    _forward,
    fake=lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
    backward=_backward,
    setup_context=_save,
)


def _portable(g: Builder, inputs: Sequence[str], outputs: Sequence[str], attributes: Attributes) -> None:
    x, weight, bias = inputs
    (y,) = outputs
    if attributes["transposed"]:
        weight = g.op("Transpose", (weight,), f"{y}.turned", perm=[1, 0])
    if bias:
        x, weight = g.op("MatMul", (x, weight), f"{y}.matmul"), bias
    g.op("Add" if bias else "MatMul", (x, weight), y)


def _shapes(shapes: Sequence[Any], attributes: Attributes) -> Sequence[Shape]:
    return [(*shapes[0][:-1], shapes[1][0 if attributes["transposed"] else 1])]


SPEC = OpSpec(
    name="linear",
    summary="x W^T + b",
    forward=("gemm",),
    cuda=("dense_linear",),
    backward=("linear_bwd",),
    nodes=(
        Node(
            op_type="Linear",
            torch=("portlm::linear",),
            inputs=(Input("x"), Input("weight", matrix=True), Input("bias", optional=True)),
            outputs=("y",),
            attributes=(Attribute("transposed", int, default=0),),  # 1: the weight is kept (out, in)
            shapes=_shapes,
            portable=_portable,
            rowwise=True,
            tvm="linear",
        ),
    ),
    functions=("panel_linear", "panel_linear_no_bias", "panel_rows"),  # of weights, which are put in panels
)
