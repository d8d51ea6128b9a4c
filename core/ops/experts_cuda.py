"""A mixture of experts on CUDA: kernels for the choice, for rows by expert and for the gates, and PyTorch's products.

Each expert's rows lie side by side, so each of its matrices is one product. How many they are is asked of the device,
which is waited for once in a forward pass.

Shapes: as in portlm.ops.experts, all float32 or all bfloat16; weights of the chosen are float32. A choice is a row and
one of its k places, row k + place.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from portlm.ops import cuda, lazy
from portlm.ops.kernel_op import KernelOp

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", Tensor="torch:Tensor")

__all__ = ["experts_cuda"]


def experts_cuda(
    x: Tensor, router: Tensor, gate: Tensor, up: Tensor, down: Tensor, top_k: int, normalize: bool
) -> Tensor:
    """Return experts of contiguous tensors that ``cuda.has_cuda_kernel`` accepts; arguments as there."""
    y: Tensor = _fused(x, router, gate, up, down, top_k, normalize)[0]
    return y


def _empty(
    x: Tensor, router: Tensor, gate: Tensor, up: Tensor, down: Tensor, top_k: int, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, E = x.shape[:-1].numel(), router.shape[0]
    count = rows * top_k
    return (
        x.new_empty(x.shape),
        x.new_empty((rows, E)),
        x.new_empty((rows, top_k), dtype=torch.int64),
        x.new_empty((rows, top_k), dtype=torch.float32),
        x.new_empty((2, count, gate.shape[0] // E)),
        x.new_empty(count, dtype=torch.int64),
        x.new_empty(count, dtype=torch.int64),
        torch.empty(E + 1, dtype=torch.int64, device="cpu"),
    )


def _forward(
    x: Tensor, router: Tensor, gate: Tensor, up: Tensor, down: Tensor, top_k: int, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y and, for backward, logits, what was chosen, its weights, what gate and up gave by expert, and the order.

    Of the order there are the choice of each place by expert, the place of each choice, and where experts begin.
    """
    y, logits, chosen, weights, pre, _, place, _ = _empty(x, router, gate, up, down, top_k, normalize)
    (rows, E), C, bfloat16 = logits.shape, x.shape[-1], x.dtype is torch.bfloat16
    flat = x.view(rows, C)
    torch.mm(flat, router.t(), out=logits)
    cuda.launch(
        "experts_choose", x.device, logits.data_ptr(), chosen.data_ptr(), weights.data_ptr(), rows, E, top_k,
        normalize, bfloat16,
    )  # fmt: skip
    ordered, slot = chosen.flatten().sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(E + 1, device=x.device)).cpu()  # waits for the device
    inputs = _gather(flat, slot, place, top_k)
    for rows_of, matrices in _by_expert(starts, gate, up):
        for part, matrix in zip(pre, matrices, strict=True):
            torch.mm(inputs[rows_of], matrix.t(), out=part[rows_of])
    value = torch.empty_like(pre[0])
    cuda.launch(
        "experts_hidden_fwd", x.device, pre[0].data_ptr(), pre[1].data_ptr(), weights.data_ptr(), slot.data_ptr(),
        value.data_ptr(), *value.shape, bfloat16,
    )  # fmt: skip
    answers = inputs  # which are not needed any more
    for rows_of, (matrix,) in _by_expert(starts, down.t()):
        torch.mm(value[rows_of], matrix, out=answers[rows_of])
    _combine(answers, place, y, top_k)
    return y, logits, chosen, weights, pre, slot, place, starts


def _by_expert(starts: Tensor, *matrices: Tensor) -> list[tuple[slice, list[Tensor]]]:
    """Return the rows of each expert that has some, and its parts of matrices (E F, ...)."""
    begin = starts.tolist()
    parts = [matrix.chunk(len(begin) - 1) for matrix in matrices]
    spans = [slice(*span) for span in itertools.pairwise(begin)]
    return [(span, [p[e] for p in parts]) for e, span in enumerate(spans) if span.stop > span.start]


def _gather(x: Tensor, slot: Tensor, place: Tensor | None, k: int) -> Tensor:
    """Return the rows of x (rows, C) that choices are of, and note the place of each choice."""
    found = x.new_empty((len(slot), x.shape[1]))
    cuda.launch(
        "experts_gather", x.device, x.data_ptr(), slot.data_ptr(), found.data_ptr(),
        0 if place is None else place.data_ptr(), len(slot), k, x.shape[1], x.dtype is torch.bfloat16,
    )  # fmt: skip
    return found


def _combine(rows_of: Tensor, place: Tensor, y: Tensor, k: int) -> None:
    """Write the sum over each row's choices into y (..., C)."""
    C = y.shape[-1]
    cuda.launch(
        "experts_combine", y.device, rows_of.data_ptr(), place.data_ptr(), y.data_ptr(), len(place) // k, k, C,
        y.dtype is torch.bfloat16,
    )  # fmt: skip


def _empty_gradients(inputs: Sequence[Tensor], needs: list[bool]) -> list[Tensor]:
    """Return zeros, which experts without rows keep."""
    return [t.new_zeros(t.shape if need else 0) for t, need in zip(inputs, needs, strict=True)]


def _gradients(
    dy: Tensor,
    x: Tensor,
    router: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    logits: Tensor,
    chosen: Tensor,
    weights: Tensor,
    pre: Tensor,
    slot: Tensor,
    place: Tensor,
    starts: Tensor,
    needs: list[bool],
    normalize: bool,
) -> list[Tensor]:
    """Return dx, drouter, dgate, dup and ddown, empty where not needed: no op can return None."""
    dx, drouter, dgate, dup, ddown = grads = _empty_gradients((x, router, gate, up, down), needs)
    (rows, E), C, k, bfloat16 = logits.shape, x.shape[-1], chosen.shape[1], x.dtype is torch.bfloat16
    flat = x.view(rows, C)
    inputs, upstream = _gather(flat, slot, None, k), _gather(dy.view(rows, C), slot, None, k)
    grad, grad_up, value = (torch.empty_like(pre[0]) for _ in range(3))
    for rows_of, (matrix,) in _by_expert(starts, down.t()):
        torch.mm(upstream[rows_of], matrix.t(), out=grad[rows_of])
    dweights = torch.empty_like(weights)
    cuda.launch(
        "experts_hidden_bwd", x.device, pre[0].data_ptr(), pre[1].data_ptr(), weights.data_ptr(), slot.data_ptr(),
        grad.data_ptr(), grad_up.data_ptr(), value.data_ptr(), dweights.data_ptr(), *value.shape, bfloat16,
    )  # fmt: skip
    if needs[4]:
        for rows_of, (part,) in _by_expert(starts, ddown.t()):
            part.copy_(value[rows_of].t() @ upstream[rows_of])
    for need, of, hidden in ((needs[2], dgate, grad), (needs[3], dup, grad_up)):
        if need:
            for rows_of, (part,) in _by_expert(starts, of):
                torch.mm(hidden[rows_of].t(), inputs[rows_of], out=part)
    if needs[0]:
        answers = upstream  # which is not needed any more
        for rows_of, (gate_part, up_part) in _by_expert(starts, gate, up):
            torch.mm(grad[rows_of], gate_part, out=answers[rows_of])
            answers[rows_of].addmm_(grad_up[rows_of], up_part)
        _combine(answers, place, dx, k)
    if not needs[0] and not needs[1]:
        return grads
    dlogits = torch.empty_like(logits)
    cuda.launch(
        "experts_choose_bwd", x.device, logits.data_ptr(), chosen.data_ptr(), weights.data_ptr(),
        dweights.data_ptr(), dlogits.data_ptr(), rows, E, k, normalize, bfloat16,
    )  # fmt: skip
    if needs[0]:
        dx.view(rows, C).addmm_(dlogits, router)
    if needs[1]:
        torch.mm(dlogits.t(), flat, out=drouter)
    return grads


_fused_gradients = KernelOp(
    "experts_cuda_backward",
    _gradients,
    fake=lambda *given: _empty_gradients(given[1:6], given[-2]),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, ctx.normalize = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    needs = list(ctx.needs_input_grad[:5])
    grads = _fused_gradients(dy.contiguous(), *ctx.saved_tensors, needs, ctx.normalize)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None


_fused = KernelOp("experts_cuda", _forward, fake=_empty, backward=_backward, setup_context=_save)
