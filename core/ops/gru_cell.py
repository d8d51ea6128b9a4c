"""One step of a GRU behind its two products, which are `linear`s of their own: gates and state in one pass.

See portlm.ops.gru for the formulas. This is what a graph holds, whose engine hands the state from token to token.

Shapes: projected and recurrent are (..., 3 H), h (..., H), mask (...) int64. All float32 in the kernel.
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

__all__ = ["gru_cell", "gru_cell_reference"]


def gru_cell_reference(projected: Tensor, recurrent: Tensor, h: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the definition in plain PyTorch: the oracle of the tests and the fallback without a kernel."""
    (xr, xz, xn), (hr, hz, hn) = projected.chunk(3, dim=-1), recurrent.chunk(3, dim=-1)
    r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
    n = torch.tanh(xn + r * hn)
    return masked(n + z * (h - n), h, mask)


def gru_cell(projected: Tensor, recurrent: Tensor, h: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the state after one token. The kernel has no gradient: training runs `gru`.

    Args:
        projected: (..., 3 H), W_ih x + b_ih.
        recurrent: (..., 3 H), W_hh h + b_hh.
        h: (..., H).
        mask: (...) int64; where it is 0, h is given back.

    Returns:
        (..., H).

    Raises:
        ValueError: the shapes do not fit, or the mask is not int64; the message names them.
    """
    check_cell("gru_cell", 3, (projected, recurrent), {"h": h}, mask)
    if not cuda.has_float_kernel(mask, projected, recurrent, h):
        return gru_cell_reference(projected, recurrent, h, mask)
    inputs = (t.contiguous() for t in (projected, recurrent, h))
    return _fused(*inputs, None if mask is None else mask.contiguous())


def _forward(projected: Tensor, recurrent: Tensor, h: Tensor, mask: Tensor | None) -> Tensor:
    y = torch.empty_like(h)
    cuda.run(
        "gru_cell", projected,
        projected.data_ptr(), recurrent.data_ptr(), h.data_ptr(), address(mask), y.data_ptr(),
        h.shape[:-1].numel(), h.shape[-1],
    )  # fmt: skip
    return y


_fused = KernelOp("gru_cell", _forward, fake=lambda projected, recurrent, h, mask: h.new_empty(h.shape))


def _portable(g: Builder, inputs: Sequence[str], outputs: Sequence[str], attributes: Attributes) -> None:
    projected, recurrent, h, mask = inputs
    (y,) = outputs
    x, a = (
        g.split_op(
            "Split",
            (value,),
            f"{y}.{kind}",
            tuple(f"{y}.{kind}.{gate}" for gate in "rzn"),
            axis=-1,
            num_outputs=3,
        )
        for kind, value in (("x", projected), ("a", recurrent))
    )
    reset, update = (
        g.op("Sigmoid", (g.op("Add", (x[k], a[k]), f"{y}.{gate}.sum"),), f"{y}.{gate}")
        for k, gate in enumerate(("reset", "update"))
    )
    inner = g.op("Mul", (reset, a[2]), f"{y}.inner")
    candidate = g.op("Tanh", (g.op("Add", (x[2], inner), f"{y}.candidate.sum"),), f"{y}.candidate")
    kept = g.op("Mul", (update, g.op("Sub", (h, candidate), f"{y}.difference")), f"{y}.kept")
    out = g.op("Add", (candidate, kept), f"{y}.after" if mask else y)
    if mask:
        keep_masked(g, out, h, mask, y)


def _shapes(shapes: Sequence[Any], attributes: Attributes) -> Sequence[Shape]:
    return [shapes[2]]


SPEC = OpSpec(
    name="gru_cell",
    summary="one step of a GRU behind its products",
    forward=("gru_cell",),
    cuda=("gru_cell",),
    nodes=(
        Node(
            op_type="GruCell",
            torch=("portlm::gru_cell",),
            inputs=(
                Input("projected"), Input("recurrent"), Input("h"), Input("mask", dtype="int64", optional=True),
            ),
            outputs=("y",),
            suffix="gru",
            shapes=_shapes,
            portable=_portable,
            tvm="gru_cell",
        ),
    ),
)  # fmt: skip
