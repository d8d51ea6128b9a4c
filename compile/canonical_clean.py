"""Passes that change the spelling of a graph and nothing else: no-ops out, one name per operation, axes in order.

After `spell`, every reordering of axes is a permute, every other change of shape a reshape, every way to take a part
of a value a split_with_sizes, and every matrix product a matmul. After `settle`, permutes and reshapes that undo each
other are gone.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch

from portlm.compile.canonical_graph import (
    Node,
    Work,
    aten,
    is_node,
    portlm,
    same_shape,
    unsupported,
)

_SAME = {  # operators that give their first argument back, when it is not being trained and not being written to
    aten.detach.default, aten.detach_.default, aten.contiguous.default, aten.clone.default, aten.alias.default,
    aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.positive.default, aten.resolve_conj.default,
    aten.resolve_neg.default,
}  # fmt: skip
_DROPOUT = {
    aten.dropout.default,
    aten.dropout_.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
}
_CASTS = {
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default,
    aten.type_as.default, aten.expand.default, aten.expand_as.default, aten.broadcast_to.default,
    aten.slice.Tensor, aten.narrow.default, aten.reshape.default, aten.permute.default,
}  # fmt: skip
_RESHAPES = {
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.view_as.default, aten.reshape_as.default, aten.unsqueeze.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
}  # fmt: skip
_PERMUTES = {
    aten.transpose.int, aten.permute.default, aten.t.default, aten.mT.default, aten.numpy_T.default,
    aten.swapaxes.default, aten.swapdims.default, aten.movedim.int, aten.movedim.intlist,
    aten.moveaxis.int, aten.moveaxis.intlist, aten.adjoint.default,
}  # fmt: skip


def inline_regions(work: Work) -> None:
    """Put the nodes of regions under torch.no_grad, or an autocast that does nothing, into the graph itself."""
    for node in list(work.graph.nodes):
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name == "wrap_with_set_grad_enabled":
            body, arguments = node.args[1], node.args[2:]
        elif name == "wrap_with_autocast":
            if node.args[2]:  # (device, dtype, enabled, cache, body, *arguments)
                raise unsupported(node, "an autocast region", "export in float32, outside torch.autocast")
            body, arguments = node.args[4], node.args[5:]
        else:
            continue
        inner = getattr(work.root, body.target).graph
        values: dict[Node, Any] = dict(
            zip((n for n in inner.nodes if n.op == "placeholder"), arguments, strict=True)
        )
        with work.graph.inserting_before(node):
            result: Any = work.graph.graph_copy(inner, values)
        for user in list(node.users):  # getitem of each result
            work.replace(user, result[user.args[1]])
        work.graph.erase_node(node)


def drop_no_ops(work: Work) -> None:
    """Take out what does not change a value: dropout in eval, copies, casts to the same type, assertions."""
    for node in list(work.graph.nodes):
        if node.op != "call_function":
            continue
        target = node.target
        if target in _DROPOUT:
            if len(node.args) > 2 and node.args[2] and node.args[1] > 0:
                raise unsupported(
                    node,
                    "dropout in training mode",
                    "call model.eval(), or write F.dropout(x, p, self.training)",
                )
            work.replace(node, node.args[0])
        elif target in _SAME or (target in _CASTS and _changes_nothing(work, node)):
            work.replace(node, node.args[0])
        elif "assert" in str(target) or str(target).startswith(("aten.sym_constrain", "aten._assert")):
            work.graph.erase_node(node)
    work.clean()


def _changes_nothing(work: Work, node: Node) -> bool:
    before, after = node.args[0].meta["val"], node.meta["val"]
    if node.target is aten.permute.default:
        return list(node.args[1]) == sorted(node.args[1])
    if node.target is aten.slice.Tensor and len(node.args) > 4 and node.args[4] != 1:
        return False
    return before.dtype == after.dtype and same_shape(before.shape, after.shape)


def spell(work: Work) -> None:
    """Give every operation one name, with its sizes written out."""
    for node in list(work.graph.nodes):
        if node.op != "call_function" or not work.is_dynamic(node):
            continue
        x = node.args[0] if node.args else None
        new = None
        if node.target in _PERMUTES:
            new = work.permute(node, x, _permutation(node))
        elif node.target in _RESHAPES:
            new = work.reshape(node, x, work.shape(node))
        elif node.target in _SPELLINGS:
            new = _SPELLINGS[node.target](work, node)
        if new is not None and new is not node:
            work.replace(node, new)
    work.clean()


def _permutation(node: Node) -> list[int]:
    """Return which axis of the input each axis of the output is."""
    rank = node.args[0].meta["val"].dim()
    axes = torch.empty([*range(2, 2 + rank)], device="meta")  # sizes that name the axes
    return [size - 2 for size in node.target(axes, *node.args[1:]).shape]


def _parts(node: Node, sizes: list[int], dim: int, squeeze: bool) -> list[tuple[int, list[int], int, bool]]:
    return [(i, sizes, dim, squeeze) for i in range(len(sizes))]


def _split(work: Work, node: Node) -> None:
    """Rewrite split, chunk and unbind: split_with_sizes, and for unbind a reshape of each part."""
    x = node.args[0]
    dim = node.args[-1] if node.target is aten.unbind.int and len(node.args) > 1 else 0
    if node.target is not aten.unbind.int:
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    dim %= len(work.shape(x))
    sizes = [part.shape[dim] if node.target is not aten.unbind.int else 1 for part in node.meta["val"]]
    if not all(isinstance(s, int) for s in sizes):
        raise unsupported(node, f"{_name(node)} along the batch or time axis", "split along the width only")
    if node.target is aten.split_with_sizes.default and node.args == (x, sizes, dim):
        return
    parts = work.call(node, aten.split_with_sizes.default, x, sizes, dim)
    for user in list(node.users):
        index = user.args[1] % len(sizes)
        part = work.item(user, parts, index)
        work.replace(user, work.reshape(user, part, work.shape(user)))
    work.graph.erase_node(node)


def _part(work: Work, node: Node) -> Node:
    """Rewrite slice, narrow and select with fixed bounds: one part of a split."""
    x = node.args[0]
    arguments = dict(zip(("dim", "start", "end", "step"), node.args[1:], strict=False)) | dict(node.kwargs)
    dim = arguments.get("dim", 0) % len(work.shape(x))
    size = work.shape(x)[dim]
    if not isinstance(size, int):
        raise unsupported(
            node,
            f"{_name(node)} along the batch or time axis",
            "return the logits of every position, and keep the time axis whole inside the model",
        )
    if node.target is aten.select.int:
        start, step = arguments["start"] % size, 1
        end = start + 1
    elif node.target is aten.narrow.default:
        start, step = arguments["start"] % size, 1
        end = start + arguments["end"]
    else:
        start, end, step = slice(
            arguments.get("start"), arguments.get("end"), arguments.get("step", 1)
        ).indices(size)
    if step != 1:
        if size % step or end <= size - step or start >= step:
            raise unsupported(
                node, f"a slice of {size} elements in steps of {step}", "reshape the axis to (-1, step) first"
            )
        shape = work.shape(x)  # (.., size, ..) seen as (.., size / step, step, ..): a part of the new axis
        pairs = work.reshape(node, x, (*shape[:dim], size // step, step, *shape[dim + 1 :]))
        split = _shared_split(work, node, pairs, [1] * step, dim + 1)
        return work.reshape(node, work.item(node, split, start), work.shape(node))
    if end <= start:
        return node  # an empty part: the cat that reads it leaves it out
    sizes = [n for n in (start, end - start, size - end) if n]
    split = _shared_split(work, node, x, sizes, dim)
    part = work.item(node, split, int(start > 0))
    return work.reshape(node, part, work.shape(node))


def _shared_split(work: Work, node: Node, x: Node, sizes: list[int], dim: int) -> Node:
    for user in x.users:
        if user.target is aten.split_with_sizes.default and user.args == (x, sizes, dim):
            return user
    place = x.next
    while place.op == "placeholder":
        place = place.next
    split = work.call(place, aten.split_with_sizes.default, x, sizes, dim)
    split.meta.update({k: node.meta[k] for k in ("nn_module_stack", "stack_trace") if k in node.meta})
    return split


def _stack(work: Work, node: Node) -> Node:
    parts = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else 0
    rank = len(work.shape(node))
    shape = list(work.shape(node))
    shape[dim % rank] = 1
    return work.call(node, aten.cat.default, [work.reshape(node, part, shape) for part in parts], dim % rank)


def _cat(work: Work, node: Node) -> Node:
    """Leave out empty parts, and a cat of one."""
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    parts = [p for p in node.args[0] if not any(isinstance(s, int) and s == 0 for s in work.shape(p))]
    if len(parts) == 1:
        return parts[0]
    return node if len(parts) == len(node.args[0]) else work.call(node, aten.cat.default, parts, dim)


def _scaled(work: Work, node: Node, x: Any, factor: Any) -> Any:
    if factor == 1:
        return x
    return x * factor if not is_node(x) else work.call(node, aten.mul.Tensor, x, factor)


def _add(work: Work, node: Node) -> Node:
    """Rewrite add and sub of scalars or with alpha: two plain operands."""
    x, y = node.args[:2]
    alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
    target = aten.add.Tensor if node.target in (aten.add.Tensor, aten.add.Scalar) else aten.sub.Tensor
    if node.target in (aten.rsub.Scalar, aten.rsub.Tensor):
        x, y = y, _scaled(work, node, x, alpha)
        if not is_node(x):  # number - y
            return work.call(node, aten.add.Tensor, work.call(node, aten.mul.Tensor, y, -1.0), x)
        return work.call(node, target, x, y)
    if node.target is target and alpha == 1:
        return node
    return work.call(node, target, x, _scaled(work, node, y, alpha))


def _product(work: Work, node: Node) -> Node:
    return work.call(node, aten.matmul.default, *node.args[:2])


def _baddbmm(work: Work, node: Node) -> Node:
    """Rewrite beta * bias + alpha * (x @ y); with beta = 0 the bias is not read."""
    bias, x, y = node.args
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    product = _scaled(work, node, work.call(node, aten.matmul.default, x, y), alpha)
    return (
        product if beta == 0 else work.call(node, aten.add.Tensor, product, _scaled(work, node, bias, beta))
    )


def _addmm(work: Work, node: Node) -> Node:
    if any(node.kwargs.get(k, 1) != 1 for k in ("beta", "alpha")):
        return _baddbmm(work, node)
    bias, x, y = node.args
    return work.call(node, aten.add.Tensor, work.call(node, aten.matmul.default, x, y), bias)


def _einsum(work: Work, node: Node) -> Node:
    """Rewrite a sum over products of two tensors as a matmul between permutes."""
    equation, operands = node.args[0].replace(" ", ""), node.args[1]
    advice = "write it with matmul, and transpose in front of it"
    if len(operands) != 2 or "." in equation or "->" not in equation:
        raise unsupported(node, f"einsum {equation!r}", advice)
    inputs, out = equation.split("->")
    left, right = inputs.split(",")
    batch = [c for c in left if c in right and c in out]
    rows, columns = [c for c in left if c not in right], [c for c in right if c not in left]
    summed = [c for c in left if c in right and c not in out]
    plain = len(set(left)) == len(left) and len(set(right)) == len(right) and set(rows + columns) <= set(out)
    shared_weight = not batch and not work.is_dynamic(operands[1])  # any number of rows in front of a matrix
    if not plain or len(summed) != 1 or len(columns) != 1 or not (len(rows) == 1 or shared_weight):
        raise unsupported(node, f"einsum {equation!r}", advice)
    order_left, order_right = batch + rows + summed, batch + summed + columns
    x = work.permute(node, operands[0], [left.index(c) for c in order_left])
    y = work.permute(node, operands[1], [right.index(c) for c in order_right])
    product, order = work.call(node, aten.matmul.default, x, y), batch + rows + columns
    return work.permute(node, product, [order.index(c) for c in out])


_SPELLINGS: dict[Any, Any] = {
    aten.chunk.default: _split, aten.split.Tensor: _split, aten.split.sizes: _split,
    aten.split_with_sizes.default: _split, aten.unbind.int: _split, aten.tensor_split.sections: _split,
    aten.unsafe_split.Tensor: _split, aten.unsafe_chunk.default: _split,
    aten.slice.Tensor: _part, aten.narrow.default: _part, aten.select.int: _part,
    aten.stack.default: _stack, aten.cat.default: _cat, aten.concat.default: _cat,
    aten.add.Tensor: _add, aten.add.Scalar: _add, aten.sub.Tensor: _add, aten.sub.Scalar: _add,
    aten.rsub.Scalar: _add, aten.rsub.Tensor: _add,
    aten.mul.Scalar: lambda w, n: w.call(n, aten.mul.Tensor, *n.args),
    aten.div.Scalar: lambda w, n: w.call(n, aten.div.Tensor, *n.args),
    aten.true_divide.Tensor: lambda w, n: w.call(n, aten.div.Tensor, *n.args),
    aten.multiply.Tensor: lambda w, n: w.call(n, aten.mul.Tensor, *n.args),
    aten.bmm.default: _product, aten.mm.default: _product,
    aten.baddbmm.default: _baddbmm, aten.addmm.default: _addmm, aten.einsum.default: _einsum,
}  # fmt: skip


def _name(node: Node) -> str:
    return str(node.target).removeprefix("aten.").split(".")[0]


def settle(work: Work) -> None:
    """Let permutes and reshapes that follow each other become one, or none, until nothing changes."""
    changed = True
    while changed:
        changed = False
        for node in list(work.graph.nodes):
            rule = _SETTLING.get(node.target) if node.op == "call_function" and node.users else None
            new = rule(work, node) if rule and work.is_dynamic(node) else None
            if new is not None:
                work.replace(node, new)
                changed = True
        work.clean()


def _settle_permute(work: Work, node: Node) -> Node | None:
    x, dims = node.args
    rank = len(work.shape(x))
    dims = [d % rank for d in dims]
    if dims == sorted(dims):
        return x
    if x.target is aten.permute.default:
        return work.permute(node, x.args[0], [x.args[1][d] for d in dims])
    moved = [d for d in dims if not _is_one(work.shape(x)[d])]
    if moved == sorted(moved):  # only axes of size 1 change place: the memory stays
        return work.reshape(node, x, work.shape(node))
    return None


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _settle_reshape(work: Work, node: Node) -> Node | None:
    x = node.args[0]
    if same_shape(work.shape(x), work.shape(node)):
        return x
    if x.target is aten.reshape.default:
        return work.reshape(node, x.args[0], work.shape(node))
    if x.target is aten.permute.default:
        # Axes of size 1 that disappear can do so in front of the permute, which then meets its inverse.
        inner, dims = x.args[0], list(x.args[1])
        kept = [j for j, size in enumerate(work.shape(x)) if not _is_one(size)]
        if len(kept) < len(dims) and same_shape([work.shape(x)[j] for j in kept], work.shape(node)):
            axes = sorted(dims[j] for j in kept)
            small = work.reshape(node, inner, [work.shape(inner)[a] for a in axes])
            return work.permute(node, small, [axes.index(dims[j]) for j in kept])
        rules = (_apart_again, _split_first, _join_first)
        return next((new for rule in rules if (new := rule(work, node, inner, dims)) is not None), None)
    return None


def _apart_again(work: Work, node: Node, inner: Node, dims: list[int]) -> Node | None:
    """Leave two axes apart that were joined in front of a permute, if what follows it is a reshape anyway.

    nn.MultiheadAttention keeps the batch and the heads in one axis, (B H, T, D), and moves it.
    """
    if inner.target is not aten.reshape.default:
        return None
    apart, joined = work.shape(inner.args[0]), work.shape(inner)
    place = _taken_apart(joined, apart)
    return (
        None
        if place is None
        else work.reshape(node, _permute_pair(work, node, inner.args[0], dims, place), work.shape(node))
    )


def _split_first(work: Work, node: Node, inner: Node, dims: list[int]) -> Node | None:
    """Take an axis apart in front of a permute: where a reshape is that it meets, or where the last axis stays."""
    before, after = work.shape(node.args[0]), work.shape(node)
    axis = _taken_apart(before, after)
    last = len(before) - 1
    if axis is None or not (inner.target is aten.reshape.default or axis == dims[axis] == last):
        return None
    place, shape = dims[axis], list(work.shape(inner))
    shape[place : place + 1] = after[axis : axis + 2]
    return _permute_pair(work, node, work.reshape(node, inner, shape), dims, place)


def _join_first(work: Work, node: Node, inner: Node, dims: list[int]) -> Node | None:
    """Join the last two axes in front of a permute that leaves them where they are."""
    before, after = work.shape(node.args[0]), work.shape(node)
    last = len(before) - 1
    if dims[last - 1 :] != [last - 1, last] or _taken_apart(after, before) != last - 1:
        return None
    small = work.reshape(node, inner, (*work.shape(inner)[: last - 1], after[-1]))
    return work.permute(node, small, dims[:last])


def _taken_apart(joined: Sequence[Any], apart: Sequence[Any]) -> int | None:
    """Return the axis that is two axes in the second shape, which is otherwise equal, else None."""
    if len(apart) != len(joined) + 1:
        return None
    axis = next(
        (j for j, size in enumerate(joined) if not same_shape((size,), apart[j : j + 1])), len(joined) - 1
    )
    return axis if same_shape(joined[axis + 1 :], apart[axis + 2 :]) else None


def _permute_pair(work: Work, node: Node, x: Node, dims: list[int], place: int) -> Node:
    """Permute x, in which the axis `place` of what dims permutes is two axes that stay together."""
    order = [d + (d > place) for d in dims]
    at = dims.index(place)
    order[at : at + 1] = [place, place + 1]
    return work.permute(node, x, order)


def _settle_item(work: Work, node: Node) -> Node | None:
    """Move a split in front of the permute or reshape whose result it takes apart."""
    split, index = node.args
    if split.target is not aten.split_with_sizes.default:
        return None
    x, sizes, dim = split.args
    if x.target is aten.permute.default:
        inner, dims = x.args
        parts = _shared_split(work, split, inner, list(sizes), dims[dim])
        return work.permute(node, work.item(node, parts, index), dims)
    if x.target is aten.reshape.default:
        inner = x.args[0]
        last = len(work.shape(inner)) - 1
        if dim == last and same_shape(work.shape(inner)[:last], work.shape(x)[:last]):
            each = math.prod(work.shape(x)[last + 1 :])  # a part of the wide axis, before it was taken apart
            parts = _shared_split(work, split, inner, [s * each for s in sizes], last)
            return work.reshape(node, work.item(node, parts, index), work.shape(node))
    return None


def _settle_linear(work: Work, node: Node) -> Node | None:
    """Move a permute of the rows behind a linear map of each row."""
    x, weight, bias = node.args
    if x.target is not aten.permute.default or x.args[1][-1] != len(x.args[1]) - 1:
        return None
    inner = work.call(node, portlm.linear.default, x.args[0], weight, bias)
    return work.permute(node, inner, x.args[1])


_SETTLING: dict[Any, Any] = {
    portlm.linear.default: _settle_linear,
    aten.permute.default: _settle_permute,
    aten.reshape.default: _settle_reshape,
    operator.getitem: _settle_item,
}
