"""One step of an LSTM behind its two products, which are `linear`s of their own: gates, cell and state in one pass.

See portlm.ops.lstm for the formulas. This is what a graph holds, whose engine hands the states from token to token.

Shapes: projected and recurrent are (..., 4 H), h and c (..., H), mask (...) int64. All float32 in the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from portlm.ops import cuda, lazy
from portlm.ops.kernel_op import KernelOp
from portlm.ops.recurrent import address, check_cell, keep_masked, masked
from portlm.ops.spec import Attributes, Builder, Input, Node, OpSpec, Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", Tensor="torch:Tensor")

__all__ = ["lstm_cell", "lstm_cell_reference"]


def lstm_cell_reference(
    projected: Tensor, recurrent: Tensor, h: Tensor, c: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the definition in plain PyTorch: the oracle of the tests and the fallback without a kernel."""
    i, f, g, o = (projected + recurrent).chunk(4, dim=-1)
    cell = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return masked(torch.sigmoid(o) * torch.tanh(cell), h, mask), masked(cell, c, mask)


def lstm_cell(
    projected: Tensor, recurrent: Tensor, h: Tensor, c: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return h and c after one token. The kernel has no gradient: training runs `lstm`.

    Args:
        projected: (..., 4 H), W_ih x + b_ih.
        recurrent: (..., 4 H), W_hh h + b_hh.
        h: (..., H).
        c: (..., H).
        mask: (...) int64; where it is 0, h and c are given back.

    Returns:
        h' and c', each (..., H).

    Raises:
        ValueError: the shapes do not fit, or the mask is not int64; the message names them.
    """
    check_cell("lstm_cell", 4, (projected, recurrent), {"h": h, "c": c}, mask)
    if not cuda.has_float_kernel(mask, projected, recurrent, h, c):
        return lstm_cell_reference(projected, recurrent, h, c, mask)
    inputs = (t.contiguous() for t in (projected, recurrent, h, c))
    y, cell = _fused(*inputs, None if mask is None else mask.contiguous())
    return y, cell


def _forward(
    projected: Tensor, recurrent: Tensor, h: Tensor, c: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    y, cell = torch.empty_like(h), torch.empty_like(c)
    cuda.run(
        "lstm_cell", projected,
        projected.data_ptr(), recurrent.data_ptr(), h.data_ptr(), c.data_ptr(), address(mask), y.data_ptr(),
        cell.data_ptr(), h.shape[:-1].numel(), h.shape[-1],
    )  # fmt: skip
    return y, cell


_fused = KernelOp(
    "lstm_cell",
    _forward,
    fake=lambda projected, recurrent, h, c, mask: (h.new_empty(h.shape), c.new_empty(c.shape)),
)


def _portable(g: Builder, inputs: Sequence[str], outputs: Sequence[str], attributes: Attributes) -> None:
    projected, recurrent, h, c, mask = inputs
    y, cell = outputs
    total = g.op("Add", (projected, recurrent), f"{y}.gates")
    parts = tuple(f"{y}.{gate}" for gate in ("i", "f", "g", "o"))
    i, f, candidate, o = g.split_op("Split", (total,), f"{y}.split", parts, axis=-1, num_outputs=4)
    kept = g.op("Mul", (g.op("Sigmoid", (f,), f"{y}.forget"), c), f"{y}.kept")
    added = g.op(
        "Mul",
        (g.op("Sigmoid", (i,), f"{y}.input"), g.op("Tanh", (candidate,), f"{y}.candidate")),
        f"{y}.added",
    )
    after = g.op("Add", (kept, added), f"{cell}.after" if mask else cell)
    squashed = g.op("Tanh", (after,), f"{y}.squashed")
    out = g.op("Mul", (g.op("Sigmoid", (o,), f"{y}.output"), squashed), f"{y}.after" if mask else y)
    if mask:
        keep_masked(g, out, h, mask, y)
        keep_masked(g, after, c, mask, cell)


def _shapes(shapes: Sequence[Any], attributes: Attributes) -> Sequence[Shape]:
    return [shapes[2], shapes[3]]


SPEC = OpSpec(
    name="lstm_cell",
    summary="one step of an LSTM behind its products",
    forward=("lstm_cell",),
    cuda=("lstm_cell",),
    nodes=(
        Node(
            op_type="LstmCell",
            torch=("portlm::lstm_cell",),
            inputs=(
                Input("projected"),
                Input("recurrent"),
                Input("h"),
                Input("c"),
                Input("mask", dtype="int64", optional=True),
            ),
            outputs=("y", "cell"),
            suffix="lstm",
            shapes=_shapes,
            portable=_portable,
            tvm="lstm_cell",
        ),
    ),
)
