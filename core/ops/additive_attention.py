"""Additive attention: a query's score for a key is a weighted sum over the tanh of their sum (Bahdanau et al., 2015).

e[t, s] = sum_a v[a] tanh(query[t, a] + key[s, a]), weights = softmax over s, context[t] = sum_s weights[t, s] value[s],
section 3.1 and appendix A.1.2 of arXiv:1409.0473. Queries and keys come in behind their maps W_a and U_a, which are
products of their own: keys are the same for all steps of a decoder, so they are made once.

Shapes: query (B, T, A), keys (B, S, A), values (B, S, C), v (A,), mask (B, S) int64. All float32 in the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from portlm.ops import cuda, lazy
from portlm.ops.cached_attention import MASKED
from portlm.ops.kernel_op import KernelOp
from portlm.ops.recurrent import address
from portlm.ops.spec import Attributes, Builder, Input, Node, OpSpec, Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", Tensor="torch:Tensor")

__all__ = ["additive_attention", "additive_attention_reference"]


def additive_attention_reference(
    query: Tensor, keys: Tensor, values: Tensor, v: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the definition in plain PyTorch: the oracle of the tests and the fallback without a kernel."""
    scores = torch.tanh(query[:, :, None] + keys[:, None]) @ v  # (B, T, S)
    if mask is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        hidden = (mask == 0)[:, None]
        weights = torch.softmax(scores.masked_fill(hidden, MASKED), dim=-1).masked_fill(hidden, 0.0)
    return weights @ values, weights


def additive_attention(
    query: Tensor, keys: Tensor, values: Tensor, v: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return what each query sees, and how much of it is which key. Differentiable in all but the mask.

    Results and gradients are the same bits on any number of threads.

    Args:
        query: (B, T, A), W_a s.
        keys: (B, S, A), U_a h.
        values: (B, S, C), what is summed.
        v: (A,), v_a.
        mask: (B, S) int64, 0 where a key is padding; None if none is.

    Returns:
        Context (B, T, C) and weights (B, T, S), which are 0 where the mask is 0 and add up to 1. A query that sees no
        key gives 0 in both.

    Raises:
        ValueError: the shapes do not fit, or the mask is not int64; the message names them.
    """
    _check(query, keys, values, v, mask)
    if not cuda.has_float_kernel(mask, query, keys, values, v):
        return additive_attention_reference(query, keys, values, v, mask)
    inputs = (t.contiguous() for t in (query, keys, values, v))
    context, weights = _fused(*inputs, None if mask is None else mask.contiguous())
    return context, weights


def _check(query: Tensor, keys: Tensor, values: Tensor, v: Tensor, mask: Tensor | None) -> None:
    if query.dim() != 3:
        raise ValueError(f"[additive_attention] query must be (B, T, A), got {tuple(query.shape)}")
    if keys.dim() != 3 or values.dim() != 3:
        raise ValueError(
            "[additive_attention] keys must be (B, S, A) and values (B, S, C), "
            f"got {tuple(keys.shape)} and {tuple(values.shape)}"
        )
    (B, _, A), S = query.shape, keys.shape[1]
    wanted = {
        "keys": (keys, (B, S, A)),
        "values": (values, (B, S, values.shape[2])),
        "v": (v, (A,)),
        "mask": (mask, (B, S)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"[additive_attention] {name} must be {shape} for query {tuple(query.shape)}, "
                f"got {tuple(tensor.shape)}"
            )
    if mask is not None and mask.dtype is not torch.int64:
        raise ValueError(f"[additive_attention] mask must be int64, got {mask.dtype}")


def _sizes(query: Tensor, keys: Tensor, values: Tensor) -> tuple[int, int, int, int, int]:
    """B, T, S, A and C."""
    return *query.shape[:2], *keys.shape[1:], values.shape[2]


def _empty(
    query: Tensor, keys: Tensor, values: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, T, S, _, C = _sizes(query, keys, values)
    return query.new_empty((B, T, C)), query.new_empty((B, T, S))


def _forward(
    query: Tensor, keys: Tensor, values: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    context, weights = _empty(query, keys, values, v, mask)
    cuda.run(
        "additive_attention_fwd", query,
        query.data_ptr(), keys.data_ptr(), values.data_ptr(), v.data_ptr(), address(mask), context.data_ptr(),
        weights.data_ptr(), *_sizes(query, keys, values),
    )  # fmt: skip
    return context, weights


def _gradients(
    dcontext: Tensor | None,
    dweights: Tensor | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    mask: Tensor | None,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dquery, dkeys, dvalues and dv."""
    dscores, dquery, dkeys, dvalues = (torch.empty_like(t) for t in (weights, query, keys, values))
    parts = v.new_empty((len(query), len(v)))  # of dv, added up in one order whoever made them
    cuda.run(
        "additive_attention_bwd", query,
        address(dcontext), address(dweights), query.data_ptr(), keys.data_ptr(), values.data_ptr(),
        v.data_ptr(), address(mask), weights.data_ptr(), dscores.data_ptr(), dquery.data_ptr(), dkeys.data_ptr(),
        dvalues.data_ptr(), parts.data_ptr(), *_sizes(query, keys, values),
    )  # fmt: skip
    return dquery, dkeys, dvalues, parts.sum(0)


def _empty_gradients(
    dcontext: Tensor | None,
    dweights: Tensor | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    mask: Tensor | None,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dquery, dkeys, dvalues, dv = (torch.empty_like(t) for t in (query, keys, values, v))
    return dquery, dkeys, dvalues, dv


_fused_gradients = KernelOp("additive_attention_backward", _gradients, fake=_empty_gradients)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, dcontext: Tensor | None, dweights: Tensor | None) -> tuple[Tensor | None, ...]:
    if dcontext is None and dweights is None:
        return (None,) * 5
    dcontext, dweights = (None if d is None else d.contiguous() for d in (dcontext, dweights))
    return *_fused_gradients(dcontext, dweights, *ctx.saved_tensors), None


_fused = KernelOp("additive_attention", _forward, fake=_empty, backward=_backward, setup_context=_save)


def _portable(g: Builder, inputs: Sequence[str], outputs: Sequence[str], attributes: Attributes) -> None:
    query, keys, values, v, mask = inputs
    context, weights = outputs
    queries = g.op("Unsqueeze", (query, g.ints(2)), f"{context}.queries")  # (B, T, 1, A)
    against = g.op("Unsqueeze", (keys, g.ints(1)), f"{context}.keys")  # (B, 1, S, A)
    both = g.op("Tanh", (g.op("Add", (queries, against), f"{context}.sums"),), f"{context}.tanh")
    column = g.op("Unsqueeze", (v, g.ints(1)), f"{context}.column")  # (A, 1)
    products = g.op("MatMul", (both, column), f"{context}.products")  # (B, T, S, 1)
    scores = g.op("Gather", (products, g.axis(0)), f"{context}.scores", axis=-1)
    if mask:
        table = g.shared("flags", lambda: g.floats("flags", [[0.0], [1.0]]))
        flags = g.op("Gather", (table, mask), f"{context}.real_keys", axis=0)  # (B, S, 1)
        real = g.op("Transpose", (flags,), f"{context}.real", perm=[0, 2, 1])  # (B, 1, S)
        hidden = g.op("Sub", (g.scalar(1.0), real), f"{context}.hidden")
        bias = g.op("Mul", (hidden, g.scalar(MASKED)), f"{context}.bias")
        scores = g.op("Add", (scores, bias), f"{context}.shown")
    shares = g.op("Softmax", (scores,), f"{context}.shares" if mask else weights, axis=-1)
    if mask:
        g.op("Mul", (shares, real), weights)
    g.op("MatMul", (weights, values), context)


def _shapes(shapes: Sequence[Any], attributes: Attributes) -> Sequence[Shape]:
    query, keys, values, *_ = shapes
    return [(*query[:2], values[2]), (*query[:2], keys[1])]


SPEC = OpSpec(
    name="additive_attention",
    summary="attention whose scores are sums over tanh of query plus key, with its weights",
    forward=("additive_attention_fwd",),
    backward=("additive_attention_bwd",),
    cuda=("additive_attention_fwd", "additive_attention_bwd"),
    nodes=(
        Node(
            op_type="AdditiveAttention",
            torch=("portlm::additive_attention",),
            inputs=(
                Input("query"), Input("keys"), Input("values"), Input("v"),
                Input("mask", dtype="int64", optional=True),
            ),
            outputs=("context", "weights"),
            suffix="attention",
            shapes=_shapes,
            portable=_portable,
            tvm="additive_attention",
        ),
    ),
)  # fmt: skip
