"""The two-layer perceptron of the GPT family: linear, GELU (Hendrycks and Gimpel 2016), linear.

Shapes: x is (..., C), w1 (F, C), b1 (F,), w2 (N, F), b2 (N,), y (..., N); in the models N = C and F = 4 C. All float32
in the kernel, which keeps one hidden layer for backward where autograd through the three operators keeps two; so does
the one on CUDA, where all may be bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from portlm.ops import cuda, lazy
from portlm.ops.gelu_mlp_bf16 import gelu_mlp_bf16
from portlm.ops.kernel_op import KernelOp, address, contiguous, has_kernel, kernels
from portlm.ops.mlp import backward_by, check_mlp, empty_gradients
from portlm.ops.mlp_cuda import mlp_cuda
from portlm.ops.precision import rounded_linear_reference, rounds_products
from portlm.ops.spec import Attribute, Attributes, Builder, Input, Node, OpSpec, module_of

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", F="torch.nn.functional", Tensor="torch:Tensor")

__all__ = ["gelu_mlp", "gelu_mlp_reference"]


def gelu_mlp_reference(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, approximate: str = "tanh"
) -> Tensor:
    """Compute the definition in plain PyTorch: the oracle of the tests and the fallback without a kernel."""
    product = rounded_linear_reference if rounds_products() else F.linear
    return product(F.gelu(product(x, w1, b1), approximate=approximate), w2, b2)


def gelu_mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, approximate: str = "tanh"
) -> Tensor:
    """Return gelu(x W1^T + b1) W2^T + b2.

    Results and gradients are the same bits on any number of threads. Inside ``precision.products_in("bf16")`` operands
    are rounded to bfloat16.

    Args:
        x: (..., C).
        w1: (F, C).
        b1: (F,).
        w2: (N, F).
        b2: (N,).
        approximate: "tanh" for the approximation of Hendrycks and Gimpel 2016, "none" for x Phi(x) with the normal
            distribution.

    Returns:
        (..., N).

    Raises:
        ValueError: the shapes do not fit, or approximate is neither; the message names it.
    """
    if approximate not in ("tanh", "none"):
        raise ValueError(f"[gelu_mlp] approximate must be 'tanh' or 'none', got {approximate!r}")
    check_mlp("gelu_mlp", x, w1, b1, w2, b2)
    on_cuda = not rounds_products() and cuda.has_cuda_kernel(x, w1, b1, w2, b2)
    if not on_cuda and not has_kernel(x, w1, b1, w2, b2):
        return gelu_mlp_reference(x, w1, b1, w2, b2, approximate)
    x, w1, w2 = x.contiguous(), w1.contiguous(), w2.contiguous()
    b1, b2 = contiguous(b1, b2)
    if on_cuda:
        return mlp_cuda(x, w1, b1, w2, b2, "gelu_tanh" if approximate == "tanh" else "gelu")
    if rounds_products():
        return gelu_mlp_bf16(x, w1, b1, w2, b2, approximate == "tanh")
    if torch.is_grad_enabled():
        for t in (x, w1, w2, b1, b2):
            if t is not None and t.requires_grad:
                return _fused(x, w1, b1, w2, b2, approximate == "tanh")[0]
    return _fused_value(x, w1, b1, w2, b2, approximate == "tanh")


def _run(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, pre: Tensor | None, tanh: bool
) -> Tensor:
    y = x.new_empty((*x.shape[:-1], w2.shape[0]))
    kernels.gelu_mlp_fwd(
        x.data_ptr(), w1.data_ptr(), address(b1), w2.data_ptr(), address(b2), address(pre), y.data_ptr(),
        x.shape[:-1].numel(), x.shape[-1], w1.shape[0], w2.shape[0], tanh,
    )  # fmt: skip
    return y


def _forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, tanh: bool
) -> tuple[Tensor, Tensor]:
    """Return y and, for backward, the argument of GELU."""
    pre = x.new_empty((*x.shape[:-1], w1.shape[0]))
    return _run(x, w1, b1, w2, b2, pre, tanh), pre


def _value(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, tanh: bool) -> Tensor:
    return _run(x, w1, b1, w2, b2, None, tanh)


def _gradients(
    dy: Tensor, x: Tensor, pre: Tensor, w1: Tensor, w2: Tensor, needs: list[bool], tanh: bool
) -> list[Tensor]:
    """Return dx, dw1, db1, dw2 and db2, empty where not needed."""
    grads = empty_gradients(dy, x, w1, w2, needs)
    kernels.gelu_mlp_bwd(
        dy.data_ptr(), x.data_ptr(), pre.data_ptr(), w1.data_ptr(), w2.data_ptr(),
        *(g.data_ptr() if need else 0 for g, need in zip(grads, needs, strict=True)),
        x.shape[:-1].numel(), x.shape[-1], w1.shape[0], w2.shape[0], tanh,
    )  # fmt: skip
    return grads


_fused_gradients = KernelOp(
    "gelu_mlp_backward",
    _gradients,
    fake=lambda dy, x, pre, w1, w2, needs, tanh: empty_gradients(dy, x, w1, w2, needs),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w1, b1, w2, b2, *ctx.settings = inputs
    ctx.has_bias = b1 is not None, b2 is not None
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], w1, w2)


_fused = KernelOp(
    "gelu_mlp",
    _forward,
    fake=lambda x, w1, b1, w2, b2, tanh: (
        x.new_empty((*x.shape[:-1], w2.shape[0])),
        x.new_empty((*x.shape[:-1], w1.shape[0])),
    ),
    backward=backward_by(_fused_gradients),
    setup_context=_save,
)
_fused_value = KernelOp(
    "gelu_mlp_value",
    _value,
    fake=lambda x, w1, b1, w2, b2, tanh: x.new_empty((*x.shape[:-1], w2.shape[0])),
)


def _portable(g: Builder, inputs: Sequence[str], outputs: Sequence[str], attributes: Attributes) -> None:
    x, w1, b1, w2, b2 = inputs
    (y,) = outputs
    first = g.unique(module_of(w1))  # taken where a model calls the same layer twice
    hidden = g.op("MatMul", (x, w1), f"{first}.matmul")
    hidden = g.op("Add", (hidden, b1), first)
    hidden = g.op("Gelu", (hidden,), f"{first}.gelu", approximate=attributes["approximate"])
    product = g.op("MatMul", (hidden, w2), f"{y}.matmul")
    g.op("Add", (product, b2), y)


def _read(arguments: Mapping[str, Any]) -> Attributes:
    if arguments["b1"] is None or arguments["b2"] is None:
        raise ValueError("both layers need a bias")
    return {"approximate": "tanh" if arguments["tanh"] else "none"}


SPEC = OpSpec(
    name="gelu_mlp",
    summary="linear, GELU, linear",
    forward=("gelu_mlp_fwd",),
    backward=("gelu_mlp_bwd",),
    cuda=("gelu_bias_fwd", "gelu_bias_bwd"),
    nodes=(
        Node(
            op_type="GeluMlp",
            torch=("portlm::gelu_mlp", "portlm::gelu_mlp_value"),
            inputs=(Input("x"), Input("w1", matrix=True), Input("b1"), Input("w2", matrix=True), Input("b2")),
            outputs=("y",),
            attributes=(Attribute("approximate", str, choices=("none", "tanh")),),
            read=_read,
            shapes=lambda shapes, attributes: [(*shapes[0][:-1], shapes[3][1])],
            portable=_portable,
            rowwise=True,
            tvm="gelu_mlp",
        ),
    ),
)
