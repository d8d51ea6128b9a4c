"""Embedding: rows of a table by token id. Its gradient is the same for every number of threads.

Shapes: ids (...) int64; weight (V, C) float32 in the kernel, on CUDA bfloat16, too; the result (..., C).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from portlm.ops import cuda, lazy
from portlm.ops.kernel_op import KernelOp, has_kernel, kernels
from portlm.ops.spec import Attributes, Builder, Input, Node, OpSpec

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", F="torch.nn.functional", Tensor="torch:Tensor")

__all__ = ["embedding", "embedding_reference"]

_CHUNK = 32  # sorted ids whose rows one block of the CUDA kernel adds up


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
        IndexError: an id is outside [0, V); the message names it, its place and V. While CUDA work is captured in a
            graph, where nothing can be asked, its row is NaN instead.
    """
    if weight.dim() != 2 or ids.dtype != torch.int64:
        raise ValueError(
            f"[embedding] ids must be int64 and weight (V, C), got {ids.dtype} and {tuple(weight.shape)}"
        )
    if not (has_kernel(weight) or cuda.has_cuda_kernel(weight)) or ids.device != weight.device:
        return embedding_reference(ids, weight)
    return _fused(ids.contiguous(), weight.contiguous())


def _forward(ids: Tensor, weight: Tensor) -> Tensor:
    V, C = weight.shape
    y = torch.empty((*ids.shape, C), dtype=weight.dtype, device=weight.device)
    n, addresses = ids.numel(), (ids.data_ptr(), weight.data_ptr(), y.data_ptr())
    if cuda.on_cuda(weight):
        first_bad = torch.full((), n, dtype=torch.int64, device=ids.device)
        bfloat16 = weight.dtype is torch.bfloat16
        cuda.launch("embedding_fwd", weight.device, *addresses, first_bad.data_ptr(), n, V, C, bfloat16)
        bad = int(first_bad) if cuda.can_wait(weight) else n
    else:
        bad = kernels.embedding_fwd(*addresses, n, V, C)
    if 0 <= bad < n:
        value = int(ids.view(-1)[bad])
        raise IndexError(
            f"[embedding] id {value} at position {bad} is outside [0, {V}), the rows of the table"
        )
    return y


def _gradient(dy: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    V, C = weight.shape
    if cuda.on_cuda(weight):
        return _gradient_cuda(dy, ids, weight)
    dweight = torch.empty_like(weight)
    kernels.embedding_bwd(ids.data_ptr(), dy.data_ptr(), dweight.data_ptr(), ids.numel(), V, C)
    return dweight


def _gradient_cuda(dy: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """Add up rows of equal ids side by side: sorted, so that the order of additions is that of the ids alone."""
    V, C = weight.shape
    ordered, order = ids.flatten().sort(stable=True)
    n = ordered.numel()
    dweight = torch.zeros_like(weight)
    partial = weight.new_empty((-(-n // _CHUNK), 2, C), dtype=torch.float32)
    cuda.launch(
        "embedding_bwd", weight.device, ordered.data_ptr(), order.data_ptr(), dy.data_ptr(), dweight.data_ptr(),
        partial.data_ptr(), n, _CHUNK, V, C, weight.dtype is torch.bfloat16,
    )  # fmt: skip
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
    cuda=("embedding_fwd", "embedding_bwd"),
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
