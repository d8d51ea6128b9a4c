"""The last passes: what is left is written with few operators that every engine has, or refused.

KEPT is what an exporter has to know besides portlm's own ops. Their graph forms need no operator beyond PORTABLE_OPS
of compile/forms.py, except `exp`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from portlm.compile.canonical_graph import (
    SIZE_OPS,
    Node,
    Work,
    aten,
    is_node,
    portlm,
    same_shape,
    unsupported,
)
from portlm.compile.canonical_static import MASKED

KEPT: dict[Any, str] = {
    aten.add.Tensor: "Add",
    aten.sub.Tensor: "Sub",
    aten.mul.Tensor: "Mul",
    aten.div.Tensor: "Div",
    aten.sqrt.default: "Sqrt",
    aten.exp.default: "Exp",
    aten.sigmoid.default: "Sigmoid",
    aten.relu.default: "Relu",
    aten.gelu.default: "Gelu",
    aten.softmax.int: "Softmax",
    aten.mean.dim: "ReduceMean",  # over the last axis, which stays with size 1
    aten.matmul.default: "MatMul",
    aten.reshape.default: "Reshape",  # sizes are ints, the nodes of B and T, and at most one -1
    aten.permute.default: "Transpose",
    aten.cat.default: "Concat",
    aten.split_with_sizes.default: "Split",
    aten.index_select.default: "Gather",
}
"""ATen operators of a canonical graph -> the ONNX operator that says the same."""

OPS = {
    portlm.linear.default, portlm.embedding.default, portlm.layer_norm.default, portlm.add_layer_norm.default,
    portlm.rms_norm.default, portlm.add_rms_norm.default, portlm.rotary.default, portlm.gelu_mlp_value.default,
    portlm.swiglu.default, portlm.attention.default, portlm.cached_attention.default,
}  # fmt: skip

_INSTEAD = {
    "fft": "there is no Fourier transform in the portable operators; use linear maps with fixed weights",
    "complex": "use real numbers: rotary positions as x cos + rotate_half(x) sin",
    "cumsum": "attend to earlier positions with causal attention",
    "topk": "routing by data is not exported",
    "sort": "routing by data is not exported",
    "batch_norm": "normalise over the width: LayerNorm or RMSNorm",
    "conv1d": "use nn.Linear for a kernel of 1; other convolutions have no form yet",
}


def expand_spelling(work: Work) -> None:
    """Write what has no operator of its own with those that KEPT lists."""
    for node in list(work.graph.nodes):
        rule = _EXPANSIONS.get(node.target) if node.op == "call_function" and node.users else None
        if rule is not None and work.is_dynamic(node):
            new = rule(work, node)
            if new is not None and new is not node:
                work.replace(node, new)
    work.clean()


def _power(work: Work, node: Node) -> Node | None:
    x, exponent = node.args
    if exponent == 0.5:
        return work.call(node, aten.sqrt.default, x)
    if exponent == -0.5:
        return _rsqrt(work, node)
    if exponent == -1:
        return _reciprocal(work, node)
    if exponent not in (2, 3, 4):
        return None
    square = work.call(node, aten.mul.Tensor, x, x)
    if exponent == 2:
        return square
    return work.call(node, aten.mul.Tensor, square, x if exponent == 3 else square)


def _square(work: Work, node: Node) -> Node:
    return work.call(node, aten.mul.Tensor, node.args[0], node.args[0])


def _reciprocal(work: Work, node: Node, x: Node | None = None) -> Node:
    x = node.args[0] if x is None else x
    return work.call(node, aten.div.Tensor, work.constant("one", torch.ones(())), x)


def _rsqrt(work: Work, node: Node) -> Node:
    return _reciprocal(work, node, work.call(node, aten.sqrt.default, node.args[0]))


def _tanh(work: Work, node: Node) -> Node:
    """2 sigmoid(2 x) - 1, exact to the rounding of 1 in float32."""
    doubled = work.call(node, aten.mul.Tensor, node.args[0], 2.0)
    sigmoid = work.call(node, aten.sigmoid.default, doubled)
    return work.call(node, aten.add.Tensor, work.call(node, aten.mul.Tensor, sigmoid, 2.0), -1.0)


def _silu(work: Work, node: Node) -> Node:
    x = node.args[0]
    return work.call(node, aten.mul.Tensor, x, work.call(node, aten.sigmoid.default, x))


def _softmax(work: Work, node: Node) -> Node | None:
    x, dim = node.args[:2]
    rank = len(work.shape(x))
    if dim % rank != rank - 1:
        raise unsupported(node, f"softmax over axis {dim}", "transpose the axis to the last place")
    dtype = (
        node.args[2] if len(node.args) > 2 and node.target is aten.softmax.int else node.kwargs.get("dtype")
    )
    if dtype not in (None, torch.float32, False):
        return None
    return node if node.args == (x, rank - 1) else work.call(node, aten.softmax.int, x, rank - 1)


def _reduce(work: Work, node: Node) -> Node | None:
    """Rewrite a mean or sum over the last axis as a mean that keeps the axis, and a reshape."""
    x = node.args[0]
    rank = len(work.shape(x))
    given = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | dict(node.kwargs)
    dims = given.get("dim") or []
    dims = [dims] if isinstance(dims, int) else dims
    C = work.shape(x)[-1]
    if [d % rank for d in dims] != [rank - 1] or not isinstance(C, int):
        raise unsupported(
            node, f"{_name(node)} over axes {dims}", "reduce the last axis, of fixed size, only"
        )
    is_sum = node.target is aten.sum.dim_IntList
    if not is_sum and node.args == (x, [-1], True):
        return node
    mean = work.call(node, aten.mean.dim, x, [-1], True)
    if is_sum:
        mean = work.call(node, aten.mul.Tensor, mean, float(C))
    return work.reshape(node, mean, work.shape(node))


def _variance(work: Work, node: Node) -> Node | None:
    x = node.args[0]
    given = dict(zip(("dim", "correction", "keepdim"), node.args[1:], strict=False)) | dict(node.kwargs)
    rank = len(work.shape(x))
    dims = given.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    C = work.shape(x)[-1]
    if dims is None or [d % rank for d in dims] != [rank - 1] or not isinstance(C, int):
        raise unsupported(
            node, f"{_name(node)} over axes {dims}", "reduce the last axis, of fixed size, only"
        )
    correction = given.get("correction", 1)
    correction = int(correction if correction is not None else 1)  # `unbiased` is a bool in the same place
    mean = work.call(node, aten.mean.dim, x, [-1], True)
    off = work.call(node, aten.sub.Tensor, x, mean)
    value = work.call(node, aten.mean.dim, work.call(node, aten.mul.Tensor, off, off), [-1], True)
    if correction:
        value = work.call(node, aten.mul.Tensor, value, C / (C - correction))
    if _name(node) == "std":
        value = work.call(node, aten.sqrt.default, value)
    return work.reshape(node, value, work.shape(node))


def _mask(work: Work, node: Node) -> Node | None:
    """Choose by a static mask with arithmetic: x keep + number (1 - keep)."""
    if node.target is aten.masked_fill.Scalar:
        x, mask, number = node.args
        keep_where = False
    elif node.target in (aten.where.ScalarOther, aten.where.self):
        mask, x, number = node.args
        keep_where = True
        if is_node(number):
            if not work.is_static(number) or number.meta["val"].numel() != 1:
                return None
            number = float(work.evaluate(number, 2, 2))
    else:
        return None
    if not work.is_static(mask) or not work.is_dynamic(x):
        return None
    number = max(float(number), MASKED)  # infinity times 0 is no number
    keep = mask if keep_where else work.call(node, aten.logical_not.default, mask)
    keep = work.call(node, aten.to.dtype, keep, torch.float32)
    other = work.call(node, aten.mul.Tensor, work.call(node, aten.rsub.Scalar, keep, 1), number)
    return work.call(node, aten.add.Tensor, work.call(node, aten.mul.Tensor, x, keep), other)


def _sdpa(work: Work, node: Node) -> Node | None:
    """Write an attention that is not causal in products."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    q, k, v, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
    if (
        given.get("dropout_p")
        or given.get("is_causal")
        or given.get("enable_gqa")
        or not work.is_static(mask)
    ):
        return None
    scale = given.get("scale")
    q = work.call(node, aten.mul.Tensor, q, work.shape(q)[-1] ** -0.5 if scale is None else scale)
    rank = len(work.shape(k))
    scores = work.call(
        node, aten.matmul.default, q, work.permute(node, k, [*range(rank - 2), rank - 1, rank - 2])
    )
    if mask is not None:
        if mask.meta["val"].dtype is torch.bool:
            hidden = work.call(node, aten.logical_not.default, mask)
            mask = work.call(
                node, aten.mul.Tensor, work.call(node, aten.to.dtype, hidden, torch.float32), MASKED
            )
        scores = work.call(node, aten.add.Tensor, scores, mask)
    return work.call(node, aten.matmul.default, work.call(node, aten.softmax.int, scores, rank - 1), v)


def _repeat_interleave(work: Work, node: Node) -> Node | None:
    """Write copies of each element of an axis of fixed size."""
    x, repeats = node.args[:2]
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    if dim is None or not isinstance(repeats, int):
        return None
    shape = work.shape(x)
    dim %= len(shape)
    single = work.reshape(node, x, (*shape[: dim + 1], 1, *shape[dim + 1 :]))
    copies = work.call(node, aten.cat.default, [single] * repeats, dim + 1)
    return work.reshape(node, copies, work.shape(node))


def _expand(work: Work, node: Node) -> Node | None:
    """Leave broadcasting to the readers of an expanded value, or write copies along one axis of fixed size."""
    broadcasting = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
    x = node.args[0]
    before, after = work.shape(x), work.shape(node)
    grown = [j for j, size in enumerate(after) if not same_shape(before[j : j + 1], (size,))]
    if len(before) == len(after) and len(grown) == 1 and isinstance(after[grown[0]], int):
        return work.call(node, aten.cat.default, [x] * after[grown[0]], grown[0])
    for reader in node.users:
        others = [a for a in reader.args if is_node(a) and a is not node]
        if reader.target not in broadcasting or len(others) != 1:
            return None
        if not same_shape(work.shape(others[0]), work.shape(reader)):
            return None
    return x


_EXPANSIONS: dict[Any, Any] = {
    aten.pow.Tensor_Scalar: _power, aten.square.default: _square, aten.reciprocal.default: _reciprocal,
    aten.rsqrt.default: _rsqrt, aten.tanh.default: _tanh, aten.silu.default: _silu,
    aten.neg.default: lambda w, n: w.call(n, aten.mul.Tensor, n.args[0], -1.0),
    aten.softmax.int: _softmax, aten._softmax.default: _softmax,
    aten.mean.dim: _reduce, aten.sum.dim_IntList: _reduce,
    aten.var.correction: _variance, aten.var.dim: _variance,
    aten.std.correction: _variance, aten.std.dim: _variance,
    aten.masked_fill.Scalar: _mask, aten.where.self: _mask, aten.where.ScalarOther: _mask,
    aten.expand.default: _expand, aten.expand_as.default: _expand,
    aten.scaled_dot_product_attention.default: _sdpa,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.embedding.default: lambda w, n: w.call(n, portlm.embedding.default, n.args[1], n.args[0]),
}  # fmt: skip


def refuse_unknown(work: Work) -> None:
    """Stop at the first operator without a form.

    Raises:
        UsageError: names it, its module, its line of Python, and what to use instead.
    """
    for node in work.graph.nodes:
        value = node.meta.get("val")
        if (
            node.op != "call_function"
            or node.target in SIZE_OPS
            or not isinstance(value, torch.Tensor | tuple | list)
        ):
            continue
        if isinstance(value, torch.Tensor) and value.is_complex():
            advice = next((text for key, text in _INSTEAD.items() if key in _name(node)), _INSTEAD["complex"])
            raise unsupported(node, f"{_full_name(node)}, which gives complex numbers,", advice)
        if node.target is operator.getitem or node.target in OPS:
            continue
        if node.target not in KEPT:
            name = _name(node)
            forms = "the operators with a form are " + ", ".join(sorted({_short(op) for op in KEPT}))
            advice = next((text for key, text in _INSTEAD.items() if key in name), forms)
            raise unsupported(node, f"the operator {_full_name(node)}", advice)
        if isinstance(value, torch.Tensor) and value.dtype is not torch.float32:
            raise unsupported(node, f"{_full_name(node)} in {value.dtype}", "compute in float32")
        if node.target is aten.reshape.default and list(node.args[1]).count(-1) > 1:
            raise unsupported(
                node,
                "a reshape that mixes the batch or time axis with others",
                "keep the axes (batch, time) apart from the heads and the width",
            )


def _full_name(node: Node) -> str:
    return str(node.target)


def _name(node: Node) -> str:
    return _short(node.target)


def _short(target: Any) -> str:
    return (
        str(target)
        .removeprefix("aten.")
        .removesuffix(".default")
        .split(".")[0 if "aten" in str(target) else -1]
    )
