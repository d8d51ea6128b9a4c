"""The two-layer perceptron of Primer (So et al. 2021): linear, squared ReLU, linear.

Shapes: x is (..., C), w1 (F, C), b1 (F,), w2 (N, F), b2 (N,), y (..., N). All float32 in the kernel, which keeps relu
of the hidden layer for backward; on CUDA all bfloat16, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from portlm.ops import cuda, lazy
from portlm.ops.kernel_op import KernelOp, address, contiguous, has_kernel, kernels
from portlm.ops.linear import linear
from portlm.ops.mlp import backward_by, check_mlp, empty_gradients
from portlm.ops.mlp_cuda import mlp_cuda
from portlm.ops.precision import rounds_products
from portlm.ops.spec import Attributes, Builder, Input, Node, OpSpec, module_of

if TYPE_CHECKING:
    import torch.nn.functional as F
    from torch import Tensor
else:
    lazy.bind(globals(), F="torch.nn.functional", Tensor="torch:Tensor")

__all__ = ["relu_squared_mlp", "relu_squared_mlp_reference"]


def relu_squared_mlp_reference(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None
) -> Tensor:
    """Compute the definition in plain PyTorch: the oracle of the tests and the fallback without a kernel."""
    return F.linear(F.relu(F.linear(x, w1, b1)).square(), w2, b2)


def relu_squared_mlp(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    """Return relu(x W1^T + b1)^2 W2^T + b2.

    Results and gradients are the same bits on any number of threads.

    Args:
        x: (..., C).
        w1: (F, C).
        b1: (F,).
        w2: (N, F).
        b2: (N,).

    Returns:
        (..., N).

    Raises:
        ValueError: the shapes do not fit; the message names them.
    """
    check_mlp("relu_squared_mlp", x, w1, b1, w2, b2)
    if rounds_products():
        return linear(linear(x, w1, b1).relu().square(), w2, b2)
    on_cuda = cuda.has_cuda_kernel(x, w1, b1, w2, b2)
    if not on_cuda and not has_kernel(x, w1, b1, w2, b2):
        return relu_squared_mlp_reference(x, w1, b1, w2, b2)
    x, w1, w2 = x.contiguous(), w1.contiguous(), w2.contiguous()
    b1, b2 = contiguous(b1, b2)
    if on_cuda:
        return mlp_cuda(x, w1, b1, w2, b2, "relu_squared")
    y: Tensor = _fused(x, w1, b1, w2, b2)[0]
    return y


def _empty(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], w2.shape[0])), x.new_empty((*x.shape[:-1], w1.shape[0]))


def _forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return y and, for backward, relu of the hidden layer."""
    y, positive = _empty(x, w1, b1, w2, b2)
    kernels.relu_squared_mlp_fwd(
        x.data_ptr(), w1.data_ptr(), address(b1), w2.data_ptr(), address(b2), y.data_ptr(), positive.data_ptr(),
        True, x.shape[:-1].numel(), x.shape[-1], w1.shape[0], w2.shape[0],
    )  # fmt: skip
    return y, positive


def _gradients(
    dy: Tensor, x: Tensor, positive: Tensor, w1: Tensor, w2: Tensor, needs: list[bool]
) -> list[Tensor]:
    """Return dx, dw1, db1, dw2 and db2, empty where not needed."""
    grads = empty_gradients(dy, x, w1, w2, needs)
    dx, dw1, db1, dw2, db2 = (g.data_ptr() if need else 0 for g, need in zip(grads, needs, strict=True))
    (F_, C), N, rows = w1.shape, w2.shape[0], x.shape[:-1].numel()
    square, hidden = positive.square(), positive.new_empty(positive.shape)
    kernels.linear_bwd(
        dy.data_ptr(), square.data_ptr(), w2.data_ptr(), hidden.data_ptr(), dw2, db2, rows, N, F_
    )
    hidden.mul_(positive).mul_(2)
    kernels.linear_bwd(hidden.data_ptr(), x.data_ptr(), w1.data_ptr(), dx, dw1, db1, rows, F_, C)
    return grads


_fused_gradients = KernelOp(
    "relu_squared_mlp_backward",
    _gradients,
    fake=lambda dy, x, positive, w1, w2, needs: empty_gradients(dy, x, w1, w2, needs),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w1, b1, w2, b2, *ctx.settings = inputs
    ctx.has_bias = b1 is not None, b2 is not None
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], w1, w2)


_fused = KernelOp(
    "relu_squared_mlp", _forward, fake=_empty, backward=backward_by(_fused_gradients), setup_context=_save
)


def _portable(g: Builder, inputs: Sequence[str], outputs: Sequence[str], attributes: Attributes) -> None:
    x, w1, b1, w2, b2 = inputs
    (y,) = outputs
    first = module_of(w1)
    hidden = g.op("MatMul", (x, w1), f"{first}.matmul")
    hidden = g.op("Add", (hidden, b1), first)
    positive = g.op("Relu", (hidden,), f"{first}.relu")
    square = g.op("Mul", (positive, positive), f"{first}.square")
    product = g.op("MatMul", (square, w2), f"{y}.matmul")
    g.op("Add", (product, b2), y)


def _read(arguments: Mapping[str, Any]) -> Attributes:
    if arguments["b1"] is None or arguments["b2"] is None:
        raise ValueError("both layers need a bias")
    return {}


SPEC = OpSpec(
    name="relu_squared_mlp",
    summary="linear, squared ReLU, linear",
    forward=("relu_squared_mlp_fwd",),
    backward=("linear_bwd",),
    cuda=("relu_squared_bias_fwd", "relu_squared_bias_bwd"),
    nodes=(
        Node(
            op_type="ReluSquaredMlp",
            torch=("portlm::relu_squared_mlp",),
            inputs=(Input("x"), Input("w1", matrix=True), Input("b1"), Input("w2", matrix=True), Input("b2")),
            outputs=("y",),
            read=_read,
            shapes=lambda shapes, attributes: [(*shapes[0][:-1], shapes[3][1])],
            portable=_portable,
            rowwise=True,
            tvm="relu_squared_mlp",
        ),
    ),
)
