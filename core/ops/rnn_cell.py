"""One step of Elman's network behind its two products, which are `linear`s of their own.

See portlm.ops.rnn for the formula. This is what a graph holds, whose engine hands the state from token to token.

Shapes: projected, recurrent and h are (..., H), mask (...) int64. All float32 in the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from portlm.ops import cuda, lazy
from portlm.ops.kernel_op import KernelOp
from portlm.ops.recurrent import address, check_cell, keep_masked, masked
from portlm.ops.spec import Attribute, Attributes, Builder, Input, Node, OpSpec, Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", Tensor="torch:Tensor")

__all__ = ["rnn_cell", "rnn_cell_reference"]

ACTIVATIONS = ("tanh", "relu")


def rnn_cell_reference(
    projected: Tensor, recurrent: Tensor, h: Tensor, mask: Tensor | None = None, activation: str = "tanh"
) -> Tensor:
    """Compute the definition in plain PyTorch: the oracle of the tests and the fallback without a kernel."""
    total = projected + recurrent
    return masked(torch.relu(total) if activation == "relu" else torch.tanh(total), h, mask)


def rnn_cell(
    projected: Tensor, recurrent: Tensor, h: Tensor, mask: Tensor | None = None, activation: str = "tanh"
) -> Tensor:
    """Return the state after one token. The kernel has no gradient: training runs `rnn`.

    Args:
        projected: (..., H), W_ih x + b_ih.
        recurrent: (..., H), W_hh h + b_hh.
        h: (..., H).
        mask: (...) int64; where it is 0, h is given back.
        activation: "tanh" or "relu".

    Returns:
        (..., H).

    Raises:
        ValueError: the shapes do not fit, the mask is not int64, or there is no such activation.
    """
    check_cell("rnn_cell", 1, (projected, recurrent), {"h": h}, mask)
    check_activation("rnn_cell", activation)
    if not cuda.has_float_kernel(mask, projected, recurrent, h):
        return rnn_cell_reference(projected, recurrent, h, mask, activation)
    inputs = (t.contiguous() for t in (projected, recurrent, h))
    return _fused(*inputs, None if mask is None else mask.contiguous(), activation)


def check_activation(op: str, activation: str) -> None:
    """Raise ValueError, naming the op, unless an activation is one of ACTIVATIONS."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"[{op}] activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def _forward(projected: Tensor, recurrent: Tensor, h: Tensor, mask: Tensor | None, activation: str) -> Tensor:
    y = torch.empty_like(h)
    cuda.run(
        "rnn_cell", projected,
        projected.data_ptr(), recurrent.data_ptr(), h.data_ptr(), address(mask), y.data_ptr(),
        h.shape[:-1].numel(), h.shape[-1], activation == "relu",
    )  # fmt: skip
    return y


_fused = KernelOp(
    "rnn_cell", _forward, fake=lambda projected, recurrent, h, mask, activation: h.new_empty(h.shape)
)


def _portable(g: Builder, inputs: Sequence[str], outputs: Sequence[str], attributes: Attributes) -> None:
    projected, recurrent, h, mask = inputs
    (y,) = outputs
    total = g.op("Add", (projected, recurrent), f"{y}.sum")
    operator = {"tanh": "Tanh", "relu": "Relu"}[attributes["activation"]]
    out = g.op(operator, (total,), f"{y}.after" if mask else y)
    if mask:
        keep_masked(g, out, h, mask, y)


def _read(arguments: Mapping[str, Any]) -> Attributes:
    return {"activation": arguments["activation"]}


def _shapes(shapes: Sequence[Any], attributes: Attributes) -> Sequence[Shape]:
    return [shapes[2]]


SPEC = OpSpec(
    name="rnn_cell",
    summary="one step of Elman's network behind its products",
    forward=("rnn_cell",),
    cuda=("rnn_cell",),
    nodes=(
        Node(
            op_type="RnnCell",
            torch=("portlm::rnn_cell",),
            inputs=(
                Input("projected"), Input("recurrent"), Input("h"), Input("mask", dtype="int64", optional=True),
            ),
            outputs=("y",),
            attributes=(Attribute("activation", str, default="tanh", choices=ACTIVATIONS),),
            suffix="rnn",
            read=_read,
            shapes=_shapes,
            portable=_portable,
            tvm="rnn_cell",
        ),
    ),
)  # fmt: skip
