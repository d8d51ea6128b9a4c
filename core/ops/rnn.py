"""Elman's recurrent layer over a whole sequence (Elman 1990): h' = tanh(W_ih x + b_ih + W_hh h + b_hh), or relu of it.

torch.nn's formula. The input's products are one large `linear`; the kernel is what has to be done in order.

B rows, T tokens, C width, H units. All float32 in the kernels. A graph, which reads one token at a time, has `rnn_cell`
instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from portlm.ops import cuda, lazy, recurrent
from portlm.ops.kernel_op import KernelOp, address, contiguous
from portlm.ops.linear import linear, linear_reference
from portlm.ops.rnn_cell import check_activation, rnn_cell_reference
from portlm.ops.spec import OpSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", Tensor="torch:Tensor")

__all__ = ["rnn", "rnn_reference"]


def rnn_reference(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    h: Tensor,
    mask: Tensor | None = None,
    reverse: bool = False,
    activation: str = "tanh",
) -> tuple[Tensor, Tensor]:
    """Compute the definition in plain PyTorch: the oracle of the tests and the fallback without a kernel."""

    def step(projected: Tensor, h: Tensor) -> tuple[Tensor]:
        product = linear_reference(h, weight_hh, bias_hh)
        return (rnn_cell_reference(projected, product, h, activation=activation),)

    y, (h,) = recurrent.layer_reference(step, linear_reference(x, weight_ih, bias_ih), (h,), mask, reverse)
    return y, h


def rnn(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    h: Tensor,
    mask: Tensor | None = None,
    reverse: bool = False,
    activation: str = "tanh",
) -> tuple[Tensor, Tensor]:
    """Run one layer in one direction.

    Results and gradients are the same bits on any number of threads.

    Args:
        x: (B, T, C).
        weight_ih: (H, C).
        weight_hh: (H, H).
        bias_ih: (H,).
        bias_hh: (H,); the two are only ever added.
        h: (B, H), the state before the first token.
        mask: (B, T) int64; a token where it is 0 leaves the state as it was.
        reverse: read the last token first.
        activation: "tanh" or "relu".

    Returns:
        (B, T, H), h after each token; and h, (B, H), after the token that is read last.

    Raises:
        ValueError: the shapes do not fit, the mask is not int64, or there is no such activation.
    """
    recurrent.check_layer("rnn", 1, x, weight_ih, weight_hh, (bias_ih, bias_hh), {"h": h}, mask)
    check_activation("rnn", activation)
    if not cuda.has_float_kernel(mask, x, weight_ih, weight_hh, bias_ih, bias_hh, h):
        return rnn_reference(x, weight_ih, weight_hh, bias_ih, bias_hh, h, mask, reverse, activation)
    projected = linear(x, weight_ih, recurrent.joined(bias_ih, bias_hh))
    y = _fused(*contiguous(projected, weight_hh, h, mask), reverse, activation)
    return y, recurrent.last_state(y, h, reverse)


def _forward(
    projected: Tensor, weight: Tensor, h: Tensor, mask: Tensor | None, reverse: bool, activation: str
) -> Tensor:
    y = torch.empty_like(projected)
    cuda.run(
        "rnn_fwd", projected,
        projected.data_ptr(), weight.data_ptr(), h.data_ptr(), address(mask), y.data_ptr(), *y.shape,
        activation == "relu", reverse,
    )  # fmt: skip
    return y


def _gradients(
    dy: Tensor, weight: Tensor, h: Tensor, mask: Tensor | None, y: Tensor, reverse: bool, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dprojected, dweight and dh."""
    dprojected, dh = torch.empty_like(y), torch.empty_like(h)
    cuda.run(
        "rnn_bwd", weight,
        dy.data_ptr(), weight.data_ptr(), address(mask), y.data_ptr(), dprojected.data_ptr(), dh.data_ptr(),
        *y.shape, activation == "relu", reverse,
    )  # fmt: skip
    dweight, _ = recurrent.weight_gradients(dprojected, recurrent.states_before(y, h, reverse), weight, None)
    return dprojected, dweight, dh


_fused_gradients = KernelOp(
    "rnn_backward",
    _gradients,
    fake=lambda dy, weight, h, mask, y, reverse, activation: (
        torch.empty_like(y), torch.empty_like(weight), torch.empty_like(h),
    ),
)  # fmt: skip


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, h, mask, ctx.reverse, ctx.activation = inputs
    ctx.save_for_backward(weight, h, mask, output)


def _backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 6
    weight, h, mask, y = ctx.saved_tensors
    found = _fused_gradients(dy.contiguous(), weight, h, mask, y, ctx.reverse, ctx.activation)
    return *found, None, None, None


_fused = KernelOp(
    "rnn",
    _forward,
    fake=lambda projected, weight, h, mask, reverse, activation: projected.new_empty(projected.shape),
    backward=_backward,
    setup_context=_save,
)

SPEC = OpSpec(
    name="rnn",
    summary="Elman's layer over a whole sequence",
    forward=("rnn_fwd",),
    backward=("rnn_bwd",),
    cuda=("rnn_fwd", "rnn_bwd"),
)
