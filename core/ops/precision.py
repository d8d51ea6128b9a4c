"""In what precision the matrix products of a model are computed: a setting of whoever trains, not of the model.

``fp32`` takes operands as they are. ``bf16`` rounds both operands of each product of linear layers, of attention, of
the MLP and of the head to bfloat16, forward and backward, and adds up in float32, as csrc/cpu/bf16_tiles.h defines it;
what linear layers and the MLP keep for backward is rounded. What masked_attention does, whose kernels know masks,
biases and the keys of another sequence, and what recurrent layers do in order is float32 either way. Parameters, their
gradients, norms, softmax, losses and the optimiser stay float32. bfloat16 has the exponents of float32, so no loss
scaling is needed (Kalamkar et al. 2019, arXiv:1905.12322).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from portlm.ops import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", Tensor="torch:Tensor")

__all__ = [
    "Precision",
    "products_in",
    "rounded",
    "rounded_linear_reference",
    "rounded_matmul_reference",
    "rounds_products",
]

Precision = Literal["fp32", "bf16"]

_rounds = False


@contextmanager
def products_in(precision: Precision) -> Iterator[None]:
    """Compute matrix products in this precision inside the block; backward goes as its forward went.

    It holds for the process: one training at a time.
    """
    global _rounds
    before, _rounds = _rounds, precision == "bf16"
    try:
        yield
    finally:
        _rounds = before


def rounds_products() -> bool:
    """Say whether products round their operands to bfloat16 here."""
    return _rounds


def rounded(x: Tensor) -> Tensor:
    """Return x rounded to bfloat16, in its own dtype. What is below 2^-126 may stay: the kernels make it zero."""
    return x.bfloat16().to(x.dtype)


def rounded_matmul_reference(a: Tensor, b: Tensor) -> Tensor:
    """Compute a @ b with the operands of every product rounded, those of backward too, in plain PyTorch.

    Args:
        a: (..., M, K).
        b: (..., K, N), with the same number of dimensions.
    """
    product: Tensor = _rounded_product().apply(a, b)
    return product


def rounded_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x W^T + b in the same way, for x (..., K) and weight (N, K)."""
    y = rounded_matmul_reference(x.reshape(x.shape[:-1].numel(), x.shape[-1]), weight.t())
    y = y.reshape(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


def _rounded_product() -> Any:
    global _Product
    if _Product is None:

        class Product(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
                a, b = rounded(a), rounded(b)
                ctx.save_for_backward(a, b)
                return a @ b

            @staticmethod
            def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
                a, b = ctx.saved_tensors
                dy = rounded(dy)
                return dy @ b.transpose(-1, -2), a.transpose(-1, -2) @ dy

        _Product = Product
    return _Product


_Product: Any = None
