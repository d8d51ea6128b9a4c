"""The GELU kernels with the bias add in front, against PyTorch eager and torch.compile."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from harness import Case, compiled, main, with_gradients, without_gradients
from torch import Tensor

from portlm.ops.kernel_op import kernels

SHAPES = [(768, 512), (2048, 1536), (8192, 3072)]


class Kernels(torch.autograd.Function):
    """The two kernels as gelu_mlp calls them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, approximate: bool) -> Tensor:
        """Return gelu(x + bias)."""
        y = torch.empty_like(x)
        kernels.gelu_bias_fwd(x.data_ptr(), bias.data_ptr(), y.data_ptr(), *x.shape, approximate)
        ctx.save_for_backward(x, bias)
        ctx.approximate = approximate
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients of x and bias."""
        x, bias = ctx.saved_tensors
        dx, dbias = torch.empty_like(x), torch.empty_like(bias)
        kernels.gelu_bias_bwd(
            dy.data_ptr(),
            x.data_ptr(),
            bias.data_ptr(),
            dx.data_ptr(),
            dbias.data_ptr(),
            *x.shape,
            ctx.approximate,
        )
        return dx, dbias, None


def cases(smoke: bool) -> Iterator[Case]:
    for rows, width in [(8, 48)] if smoke else SHAPES:
        x, bias = torch.randn(rows, width), torch.randn(width)
        for form in ("tanh", "none"):

            def ours(x, bias, form=form):
                return Kernels.apply(x, bias, form == "tanh")

            def eager(x, bias, form=form):
                return F.gelu(x + bias, approximate=form)

            contenders = {"portlm": ours, "eager": eager, "compile": compiled(eager)}
            size = 4 * rows * width
            yield Case(
                f"forward {form} ({rows}, {width})",
                {k: without_gradients(f, x, bias) for k, f in contenders.items()},
                moved=2 * size,
            )
            yield Case(
                f"forward + backward {form} ({rows}, {width})",
                {k: with_gradients(f, x, bias) for k, f in contenders.items()},
                moved=5 * size,  # backward: dy, x in, dx out
            )


if __name__ == "__main__":
    main("gelu with bias", cases)
