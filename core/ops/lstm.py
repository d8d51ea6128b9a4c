"""LSTM layer over a whole sequence (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000).

i, f, g, o = W_ih x + b_ih + W_hh h + b_hh, c' = sigmoid(f) c + sigmoid(i) tanh(g), h' = sigmoid(o) tanh(c'): torch.nn's
formulas and order. The input's products are one large `linear`; the kernel is what has to be done in order.

B rows, T tokens, C width, H units. All float32 in the kernels. benchmarks/bench_recurrent.py measures a training step
against torch.nn.LSTM. A graph, which reads one token at a time, has `lstm_cell` instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from portlm.ops import cuda, lazy, recurrent
from portlm.ops.kernel_op import KernelOp, address, contiguous
from portlm.ops.linear import linear, linear_reference
from portlm.ops.lstm_cell import lstm_cell_reference
from portlm.ops.spec import OpSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", Tensor="torch:Tensor")

__all__ = ["lstm", "lstm_reference"]


def lstm_reference(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    h: Tensor,
    c: Tensor,
    mask: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the definition in plain PyTorch: the oracle of the tests and the fallback without a kernel."""

    def step(projected: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return lstm_cell_reference(projected, linear_reference(h, weight_hh, bias_hh), h, c)

    y, (h, c) = recurrent.layer_reference(
        step, linear_reference(x, weight_ih, bias_ih), (h, c), mask, reverse
    )
    return y, h, c


def lstm(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    h: Tensor,
    c: Tensor,
    mask: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one layer in one direction.

    Results and gradients are the same bits on any number of threads.

    Args:
        x: (B, T, C).
        weight_ih: (4 H, C), gates in the order input, forget, candidate, output.
        weight_hh: (4 H, H).
        bias_ih: (4 H,).
        bias_hh: (4 H,); the two are only ever added.
        h: (B, H), the state before the first token.
        c: (B, H), that of the cell.
        mask: (B, T) int64; a token where it is 0 leaves both states as they were.
        reverse: read the last token first.

    Returns:
        (B, T, H), h after each token; and h and c, (B, H), after the token that is read last.

    Raises:
        ValueError: the shapes do not fit, or the mask is not int64; the message names them.
    """
    recurrent.check_layer("lstm", 4, x, weight_ih, weight_hh, (bias_ih, bias_hh), {"h": h, "c": c}, mask)
    if not cuda.has_float_kernel(mask, x, weight_ih, weight_hh, bias_ih, bias_hh, h, c):
        return lstm_reference(x, weight_ih, weight_hh, bias_ih, bias_hh, h, c, mask, reverse)
    projected = linear(x, weight_ih, recurrent.joined(bias_ih, bias_hh))
    y, cells, _ = _fused(*contiguous(projected, weight_hh, h, c, mask), reverse, torch.is_grad_enabled())
    return y, recurrent.last_state(y, h, reverse), recurrent.last_state(cells, c, reverse)


def _empty(projected: Tensor, weight: Tensor, differentiable: bool) -> tuple[Tensor, Tensor, Tensor]:
    y = projected.new_empty((*projected.shape[:2], weight.shape[1]))
    return y, torch.empty_like(y), projected.new_empty(projected.shape if differentiable else 0)


def _forward(
    projected: Tensor,
    weight: Tensor,
    h: Tensor,
    c: Tensor,
    mask: Tensor | None,
    reverse: bool,
    differentiable: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the cells, both (B, T, H), and the gates (B, T, 4 H) that backward needs, empty where there is none."""
    y, cells, gates = _empty(projected, weight, differentiable)
    cuda.run(
        "lstm_fwd", projected,
        projected.data_ptr(), weight.data_ptr(), h.data_ptr(), c.data_ptr(), address(mask), y.data_ptr(),
        cells.data_ptr(), gates.data_ptr() if differentiable else 0, *y.shape, reverse,
    )  # fmt: skip
    return y, cells, gates


def _gradients(
    weight: Tensor,
    dy: Tensor | None,
    dcells: Tensor | None,
    h: Tensor,
    c: Tensor,
    mask: Tensor | None,
    y: Tensor,
    cells: Tensor,
    gates: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dprojected, dweight, dh and dc."""
    dprojected, dh, dc = torch.empty_like(gates), torch.empty_like(h), torch.empty_like(c)
    cuda.run(
        "lstm_bwd", weight,
        address(dy), address(dcells), weight.data_ptr(), c.data_ptr(), address(mask), cells.data_ptr(),
        gates.data_ptr(), dprojected.data_ptr(), dh.data_ptr(), dc.data_ptr(), *y.shape, reverse,
    )  # fmt: skip
    dweight, _ = recurrent.weight_gradients(dprojected, recurrent.states_before(y, h, reverse), weight, None)
    return dprojected, dweight, dh, dc


_fused_gradients = KernelOp(
    "lstm_backward",
    _gradients,
    fake=lambda weight, dy, dcells, h, c, mask, y, cells, gates, reverse: (
        torch.empty_like(gates), torch.empty_like(weight), torch.empty_like(h), torch.empty_like(c),
    ),
)  # fmt: skip


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, weight, h, c, mask, ctx.reverse, _ = inputs
    ctx.save_for_backward(weight, h, c, mask, *output)


def _backward(
    ctx: Any, dy: Tensor | None, dcells: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dy is None and dcells is None:
        return (None,) * 7
    weight, h, c, mask, y, cells, gates = ctx.saved_tensors
    found = _fused_gradients(weight, *contiguous(dy, dcells), h, c, mask, y, cells, gates, ctx.reverse)
    return *found, None, None, None


_fused = KernelOp(
    "lstm", _forward, fake=lambda projected, weight, *rest: _empty(projected, weight, differentiable=rest[-1]),
    backward=_backward, setup_context=_save,
)  # fmt: skip

SPEC = OpSpec(
    name="lstm",
    summary="LSTM layer over a whole sequence",
    forward=("lstm_fwd",),
    backward=("lstm_bwd",),
    cuda=("lstm_fwd", "lstm_bwd"),
)
