"""Embedding: rows of a table by token id. Its gradient is the same for every number of threads.

Shapes: ids (...) int64; weight (V, C) float32 in the kernel; the result (..., C).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from portlm.ops import lazy
from portlm.ops.kernel_op import KernelOp, has_kernel, kernels
from portlm.ops.spec import Attributes, Builder, Input, Node, OpSpec

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", F="torch.nn.functional", Tensor="torch:Tensor")

__all__ = ["embedding", "embedding_reference"]


def embedding_reference(ids: Tensor, weight: Tensor) -> Tensor:
    """Compute the definition in plain PyTorch: the oracle of the tests and the fallback without a kernel."""
    return F.embedding(ids, weight)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Return ``weight[ids]``.

    Args:
        ids: (...) int64, each in [0, V).
        weight: (V, C).

    Returns:
        (..., C).

    Raises:
        ValueError: weight is not a matrix, or ids are not int64.
        IndexError: an id is outside [0, V); the message names it, its place and V.
    """
    if weight.dim() != 2 or ids.dtype != torch.int64:
        raise ValueError(
            f"[embedding] ids must be int64 and weight (V, C), got {ids.dtype} and {tuple(weight.shape)}"
        )
    if not has_kernel(weight) or ids.device != weight.device:
        return embedding_reference(ids, weight)
    return _fused(ids.contiguous(), weight.contiguous())


def _forward(ids: Tensor, weight: Tensor) -> Tensor:
    V, C = weight.shape
    y = torch.empty((*ids.shape, C), dtype=weight.dtype, device=weight.device)
    bad = kernels.embedding_fwd(ids.data_ptr(), weight.data_ptr(), y.data_ptr(), ids.numel(), V, C)
    if bad >= 0:
        value = int(ids.view(-1)[bad])
        raise IndexError(
            f"[embedding] id {value} at position {bad} is outside [0, {V}), the rows of the table"
        )
    return y


def _gradient(dy: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    V, C = weight.shape
    dweight = torch.empty_like(weight)
    kernels.embedding_bwd(ids.data_ptr(), dy.data_ptr(), dweight.data_ptr(), ids.numel(), V, C)
    return dweight


_fused_gradient = KernelOp(
    "embedding_backward", _gradient, fake=lambda dy, ids, weight: torch.empty_like(weight)
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    return None, None if dy is None else _fused_gradient(dy.contiguous(), *ctx.saved_tensors)


_fused = KernelOp(
    "embedding",
    _forward,
    fake=lambda ids, weight: torch.empty(
        (*ids.shape, weight.shape[1]), dtype=weight.dtype, device=weight.device
    ),
    backward=_backward,
    setup_context=_save,
)


def _portable(g: Builder, inputs: Sequence[str], outputs: Sequence[str], attributes: Attributes) -> None:
    ids, weight = inputs
    g.op("Gather", (weight, ids), outputs[0], axis=0)


SPEC = OpSpec(
    name="embedding",
    summary="rows of a table by token id",
    forward=("embedding_fwd",),
    backward=("embedding_bwd",),
    nodes=(
        Node(
            op_type="Embedding",
            torch=("portlm::embedding",),
            inputs=(Input("ids", dtype="int64"), Input("weight")),
            outputs=("y",),
            shapes=lambda shapes, attributes: [(*shapes[0], shapes[1][1])],
            portable=_portable,
            tvm="embedding",
        ),
    ),
)
