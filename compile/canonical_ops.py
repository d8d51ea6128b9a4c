"""Passes that put portlm's ops in the place of what they compute: linear, rotary, swiglu, gelu_mlp, residual norms."""

from __future__ import annotations

from collections.abc import Iterator
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
from portlm.compile.canonical_static import at_positions, position_table


def linears(work: Work) -> None:
    """Map products with a weight, and the bias added to them, to portlm::linear."""
    for node in list(work.graph.nodes):
        if not node.users or not work.is_dynamic(node):
            continue
        if node.target is aten.linear.default:
            x, weight = node.args[:2]
            bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
            if work.is_dynamic(weight) or (bias is not None and work.is_dynamic(bias)):
                raise unsupported(
                    node, "a linear layer whose weight is computed from the input", "use matmul"
                )
        elif node.target is aten.matmul.default:
            x, weight, bias = node.args[0], node.args[1], None
            if work.is_dynamic(weight) or not work.is_dynamic(x) or len(work.shape(weight)) != 2:
                continue
            weight = _transposed(work, node, weight)
        else:
            continue
        work.replace(node, work.call(node, portlm.linear.default, x, weight, bias))
    for node in list(work.graph.nodes):
        if node.target is not aten.add.Tensor:
            continue
        for product, bias in (node.args, node.args[::-1]):
            if (
                is_node(product) and product.target is portlm.linear.default
                and product.args[2] is None and len(product.users) == 1
                and is_node(bias) and work.is_static(bias)
                and work.shape(bias) == work.shape(product)[-1:]
            ):  # fmt: skip
                work.replace(node, work.call(node, portlm.linear.default, *product.args[:2], bias))
                break
    work.clean()


def _transposed(work: Work, node: Node, weight: Node) -> Node:
    """Return the transpose of a static matrix: its origin where it is one, else a node that is folded later."""
    if weight.target in (aten.permute.default, aten.transpose.int, aten.t.default, aten.numpy_T.default):
        inner = weight.args[0]
        if len(work.shape(inner)) == 2 and weight.args[1:] != (0, 0):
            return inner
    return work.call(node, aten.permute.default, weight, [1, 0])


def rows_apart(work: Work) -> None:
    """Let a linear map of (B T, K) work on (B, T, K): the reshapes around it then meet others and vanish."""
    for node in list(work.graph.nodes):
        if node.target is not portlm.linear.default or not node.users:
            continue
        x, weight, bias = node.args
        shape = work.shape(x)
        if len(shape) == 2 and same_shape(shape[:1], (work.batch * work.length,)):
            rows = (work.batch, work.length)
            if x.target is aten.reshape.default and same_shape(work.shape(x.args[0])[:1], (work.length,)):
                rows = rows[::-1]  # as modules that keep time first have them
            apart = work.reshape(node, x, (*rows, shape[1]))
            inner = work.call(node, portlm.linear.default, apart, weight, bias)
            work.replace(node, work.reshape(node, inner, work.shape(node)))
    work.clean()


def gates(work: Work) -> None:
    """Map silu(gate) * up to portlm::swiglu."""
    for node in list(work.graph.nodes):
        if node.target is not aten.mul.Tensor:
            continue
        for gate, up in (node.args, node.args[::-1]):
            if (
                is_node(gate) and gate.target is aten.silu.default
                and is_node(up) and work.is_dynamic(up) and same_shape(work.shape(gate), work.shape(up))
            ):  # fmt: skip
                work.replace(node, work.call(node, portlm.swiglu.default, gate.args[0], up))
                break
    work.clean()


def perceptrons(work: Work) -> None:
    """Map linear, GELU, linear to portlm::gelu_mlp_value, where nothing else reads what lies between."""
    for node in list(work.graph.nodes):
        if node.target is not portlm.linear.default or node.args[0].target is not aten.gelu.default:
            continue
        act = node.args[0]
        first = act.args[0]
        if first.target is not portlm.linear.default or len(act.users) != 1 or len(first.users) != 1:
            continue
        biases = []
        for bias, weight in ((first.args[2], first.args[1]), (node.args[2], node.args[1])):
            if bias is None:  # the op's graph form has both
                size = work.shape(weight)[0]
                bias = work.constant(f"zeros.{size}", torch.zeros(size))
            biases.append(bias)
        tanh = act.kwargs.get("approximate", act.args[1] if len(act.args) > 1 else "none") == "tanh"
        arguments = (first.args[0], first.args[1], biases[0], node.args[1], biases[1], tanh)
        work.replace(node, work.call(node, portlm.gelu_mlp_value.default, *arguments))
    work.clean()


def residual_norms(work: Work) -> None:
    """Let a norm that reads a sum do the addition itself, and give the sum to its other readers."""
    fused = {
        portlm.layer_norm.default: portlm.add_layer_norm.default,
        portlm.rms_norm.default: portlm.add_rms_norm.default,
    }
    for node in list(work.graph.nodes):
        if node.target not in fused:
            continue
        total = node.args[0]
        if total.target is not aten.add.Tensor or not all(is_node(a) for a in total.args):
            continue
        x, residual = total.args
        if not same_shape(work.shape(x), work.shape(residual)) or not work.is_dynamic(x):
            continue
        if not work.is_dynamic(residual) or any(not _is_after(user, node) for user in total.users):
            continue
        new = work.call(node, fused[node.target], x, residual, *node.args[1:])
        y, h = work.item(node, new, 0), work.item(node, new, 1)
        for user in list(node.users):
            work.replace(user, y)
        work.graph.erase_node(node)
        work.replace(total, h)
    work.clean()


def _is_after(node: Node, other: Node) -> bool:
    return node is other or other < node


def rotaries(work: Work) -> None:
    """Map x cos + rotate_half(x) sin, or its two halves written out, to portlm::rotary with tables by position."""
    for node in list(work.graph.nodes):
        if not node.users or node.op != "call_function" or not work.is_dynamic(node):
            continue
        for x, cos, sin in _rotations(work, node):
            new = _emit_rotary(work, node, x, cos, sin)
            if new is not None:
                work.replace(node, new)
                break
    work.clean()


def _rotations(work: Work, node: Node) -> Iterator[tuple[Node, Node, Node]]:
    """Yield every (x, cos, sin) of which the node may be the rotation."""
    if node.target is aten.add.Tensor:
        for a, b in (node.args, node.args[::-1]):
            for x, cos in _products(work, a):
                for turned, sin in _products(work, b):
                    if _half(work, turned) is x:
                        yield x, cos, sin
    elif node.target is aten.cat.default and len(node.args[0]) == 2:  # [x1 cos - x2 sin, x2 cos + x1 sin]
        first, second = node.args[0]
        if first.target is aten.sub.Tensor and second.target is aten.add.Tensor:
            for x1, cos in _products(work, first.args[0]):
                for x2, sin in _products(work, first.args[1]):
                    parts = {(x2, cos), (x1, sin)}
                    written = [set(_products(work, term)) for term in second.args]
                    fits = any((x2, cos) in a and (x1, sin) in b for a, b in (written, written[::-1]))
                    x = _joined(work, x1, x2)
                    if parts and fits and x is not None:
                        yield x, cos, sin


def _products(work: Work, node: Any) -> list[tuple[Node, Node]]:
    """Return (dynamic, static) factors of a product."""
    if not is_node(node) or node.target is not aten.mul.Tensor:
        return []
    return [
        (x, table)
        for x, table in (node.args, node.args[::-1])
        if is_node(x) and is_node(table) and work.is_dynamic(x) and work.is_static(table)
    ]


def _half(work: Work, node: Node) -> Node | None:
    """Return x if the node is cat(-x2, x1) of its halves."""
    if node.target is not aten.cat.default or len(node.args[0]) != 2:
        return None
    rank = len(work.shape(node))
    if (node.args[1] if len(node.args) > 1 else 0) % rank != rank - 1:
        return None
    negative, x1 = node.args[0]
    if negative.target is aten.neg.default:
        return _joined(work, x1, negative.args[0])
    if negative.target is aten.mul.Tensor and negative.args[1] == -1:
        return _joined(work, x1, negative.args[0])
    return None


def _joined(work: Work, x1: Node, x2: Node) -> Node | None:
    """Return x if x1 and x2 are its halves along the last axis."""
    split, other = x1.args[0], x2.args[0]
    if (x1.args[1:], x2.args[1:]) != ((0,), (1,)) or split is not other:
        return None
    if split.target is not aten.split_with_sizes.default:
        return None
    x, sizes, dim = split.args
    return x if len(sizes) == 2 and sizes[0] == sizes[1] and dim == len(work.shape(x)) - 1 else None


def _emit_rotary(work: Work, node: Node, x: Node, cos: Node, sin: Node) -> Node | None:
    shape = work.shape(x)
    if len(shape) not in (3, 4) or not isinstance(shape[-1], int) or shape[-1] % 2:
        return None
    tables = []
    for value in (cos, sin):
        table = position_table(work, value, len(shape))
        if table is None:
            return None
        axis, rows = table  # rows: (context, *the other axes)
        half = shape[-1] // 2
        if rows[0].numel() != rows.shape[-1] or rows.shape[-1] not in (half, 2 * half):
            return None
        rows = rows.reshape(rows.shape[0], -1)
        if rows.shape[1] == 2 * half:
            if node.target is not aten.add.Tensor or not torch.equal(rows[:, :half], rows[:, half:]):
                return None
            rows = rows[:, :half]
        tables.append((axis, rows))
    axis = tables[0][0]
    if tables[1][0] != axis or axis not in (1, 2) or not same_shape((shape[axis],), (work.length,)):
        return None
    if len(shape) == 3:  # one head
        order, heads = None, work.reshape(node, x, (*shape[:2], 1, shape[2]))
    else:
        order = [0, 2, 1, 3] if axis == 2 else [0, 1, 2, 3]
        heads = work.permute(node, x, order)
    names = ("rotary.cos", "rotary.sin")
    looked_up = [at_positions(work, node, name, rows) for name, (_, rows) in zip(names, tables, strict=True)]
    out = work.call(node, portlm.rotary.default, heads, *looked_up, False)
    return work.reshape(node, out, shape) if order is None else work.permute(node, out, order)
