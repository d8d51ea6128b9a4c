"""GRU layer over a whole sequence (Cho et al. 2014), with the reset gate behind the recurrent product.

r = sigmoid(W_ir x + b_ir + W_hr h + b_hr), z likewise, n = tanh(W_in x + b_in + r (W_hn h + b_hn)), and
h' = (1 - z) n + z h: torch.nn's formulas and order of gates, as cuDNN has them; ONNX calls this linear_before_reset.
The input's products are one large `linear`; the kernel is what has to be done in order.

B rows, T tokens, C width, H units. All float32 in the kernels. A graph, which reads one token at a time, has `gru_cell`
instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from portlm.ops import cuda, lazy, recurrent
from portlm.ops.gru_cell import gru_cell_reference
from portlm.ops.kernel_op import KernelOp, address, contiguous
from portlm.ops.linear import linear, linear_reference
from portlm.ops.spec import OpSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", Tensor="torch:Tensor")

__all__ = ["gru", "gru_reference"]


def gru_reference(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    h: Tensor,
    mask: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the definition in plain PyTorch: the oracle of the tests and the fallback without a kernel."""

    def step(projected: Tensor, h: Tensor) -> tuple[Tensor]:
        return (gru_cell_reference(projected, linear_reference(h, weight_hh, bias_hh), h),)

    y, (h,) = recurrent.layer_reference(step, linear_reference(x, weight_ih, bias_ih), (h,), mask, reverse)
    return y, h


def gru(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    h: Tensor,
    mask: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run one layer in one direction.

    Results and gradients are the same bits on any number of threads.

    Args:
        x: (B, T, C).
        weight_ih: (3 H, C), gates in the order reset, update, candidate.
        weight_hh: (3 H, H).
        bias_ih: (3 H,).
        bias_hh: (3 H,); its last third is inside the reset gate.
        h: (B, H), the state before the first token.
        mask: (B, T) int64; a token where it is 0 leaves the state as it was.
        reverse: read the last token first.

    Returns:
        (B, T, H), h after each token; and h, (B, H), after the token that is read last.

    Raises:
        ValueError: the shapes do not fit, or the mask is not int64; the message names them.
    """
    recurrent.check_layer("gru", 3, x, weight_ih, weight_hh, (bias_ih, bias_hh), {"h": h}, mask)
    if not cuda.has_float_kernel(mask, x, weight_ih, weight_hh, bias_ih, bias_hh, h):
        return gru_reference(x, weight_ih, weight_hh, bias_ih, bias_hh, h, mask, reverse)
    projected = linear(x, weight_ih, bias_ih)
    y, _ = _fused(*contiguous(projected, weight_hh, bias_hh, h, mask), reverse, torch.is_grad_enabled())
    return y, recurrent.last_state(y, h, reverse)


def _empty(projected: Tensor, weight: Tensor, differentiable: bool) -> tuple[Tensor, Tensor]:
    B, T, H = *projected.shape[:2], weight.shape[1]
    return projected.new_empty((B, T, H)), projected.new_empty((B, T, 4 * H) if differentiable else 0)


def _forward(
    projected: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    mask: Tensor | None,
    reverse: bool,
    differentiable: bool,
) -> tuple[Tensor, Tensor]:
    """Return y (B, T, H), and the gates (B, T, 4 H) that backward needs, empty where there is none."""
    y, gates = _empty(projected, weight, differentiable)
    cuda.run(
        "gru_fwd", projected,
        projected.data_ptr(), weight.data_ptr(), address(bias), h.data_ptr(), address(mask), y.data_ptr(),
        gates.data_ptr() if differentiable else 0, *y.shape, reverse,
    )  # fmt: skip
    return y, gates


def _gradients(
    dy: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    mask: Tensor | None,
    y: Tensor,
    gates: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dprojected, dweight, dbias, empty without one, and dh."""
    dprojected = y.new_empty((*y.shape[:2], weight.shape[0]))
    drecurrent, dh = torch.empty_like(dprojected), torch.empty_like(h)
    cuda.run(
        "gru_bwd", weight,
        dy.data_ptr(), weight.data_ptr(), h.data_ptr(), address(mask), y.data_ptr(), gates.data_ptr(),
        dprojected.data_ptr(), drecurrent.data_ptr(), dh.data_ptr(), *y.shape, reverse,
    )  # fmt: skip
    return (
        dprojected,
        *recurrent.weight_gradients(drecurrent, recurrent.states_before(y, h, reverse), weight, bias),
        dh,
    )


_fused_gradients = KernelOp(
    "gru_backward",
    _gradients,
    fake=lambda dy, weight, bias, h, mask, y, gates, reverse: (
        y.new_empty((*y.shape[:2], weight.shape[0])), torch.empty_like(weight),
        weight.new_empty(0 if bias is None else bias.shape[0]), torch.empty_like(h),
    ),
)  # fmt: skip


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, weight, bias, h, mask, ctx.reverse, _ = inputs
    ctx.save_for_backward(weight, bias, h, mask, *output)


def _backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    weight, bias, h, mask, y, gates = ctx.saved_tensors
    found = _fused_gradients(dy.contiguous(), weight, bias, h, mask, y, gates, ctx.reverse)
    dprojected, dweight, dbias, dh = found
    return dprojected, dweight, None if bias is None else dbias, dh, None, None, None


_fused = KernelOp(
    "gru", _forward, fake=lambda projected, weight, *rest: _empty(projected, weight, differentiable=rest[-1]),
    backward=_backward, setup_context=_save,
)  # fmt: skip

SPEC = OpSpec(
    name="gru",
    summary="GRU layer over a whole sequence",
    forward=("gru_fwd",),
    backward=("gru_bwd",),
    cuda=("gru_fwd", "gru_bwd"),
)
