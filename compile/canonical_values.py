"""Functions recognised by their values: activations and normalisations in any spelling.

A part of the graph that reads one value x, besides numbers and weights, is a function of x. It is evaluated in float64
on chosen points and compared with GELU, SiLU, ReLU, LayerNorm and RMSNorm; equal to 1e-6 there, it is replaced. The
points tell the two forms of GELU apart (they differ by 5e-4), LayerNorm from RMSNorm, and one epsilon from another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from portlm.compile.canonical_graph import (
    Node,
    Work,
    aten,
    is_node,
    portlm,
    same_shape,
)

_DEPTH = 14  # nodes from the first to the last of any spelling seen; LayerNorm by hand has 9

_POINTWISE = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default, aten.tanh.default,
    aten.pow.Tensor_Scalar, aten.pow.Scalar, aten.square.default, aten.erf.default, aten.sigmoid.default,
    aten.exp.default, aten.reciprocal.default, aten.relu.default, aten.silu.default, aten.gelu.default,
    aten.clamp.default, aten.clamp_min.default, aten.maximum.default, aten.abs.default,
}  # fmt: skip
_CURVED = {
    aten.tanh.default, aten.erf.default, aten.sigmoid.default, aten.exp.default, aten.clamp.default,
    aten.clamp_min.default, aten.maximum.default,
}  # fmt: skip
_OVER_ROWS = {
    aten.mean.dim, aten.sum.dim_IntList, aten.var.correction, aten.var.dim, aten.std.correction, aten.std.dim,
    aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim, aten.native_layer_norm.default,
}  # fmt: skip
_ROOTS = {aten.sqrt.default, aten.rsqrt.default}


def activations(work: Work) -> None:
    """Find GELU, SiLU and ReLU written out by hand."""
    points = torch.linspace(-9, 9, 1801, dtype=torch.float64)
    known = {
        "tanh": (F.gelu(points, approximate="tanh"), aten.gelu.default, {"approximate": "tanh"}),
        "none": (F.gelu(points), aten.gelu.default, {"approximate": "none"}),
        "silu": (F.silu(points), aten.silu.default, {}),
        "relu": (F.relu(points), aten.relu.default, {}),
    }
    for node in reversed(list(work.graph.nodes)):
        if node.target not in _POINTWISE or not node.users or not work.is_dynamic(node):
            continue
        if node.target in (aten.gelu.default, aten.silu.default, aten.relu.default):
            continue
        for x, inside in _arguments(work, node, _POINTWISE):
            if not any(n.target in _CURVED for n in inside) or not same_shape(
                work.shape(x), work.shape(node)
            ):
                continue
            value = _value(work, node, {x: points})
            match = [k for k in known.values() if value is not None and _close(value, k[0])]
            if match:
                _, target, options = match[0]
                work.replace(node, work.call(node, target, x, **options))
                break
    work.clean()


def norms(work: Work) -> None:
    """Find LayerNorm and RMSNorm, as PyTorch's operators and written out by hand."""
    for node in reversed(list(work.graph.nodes)):
        if not node.users or node.op != "call_function" or not work.is_dynamic(node):
            continue
        new = None
        if node.target is aten.layer_norm.default:
            new = _plain_norm(work, node, layer=True)
        elif node.target is aten.rms_norm.default:
            new = _plain_norm(work, node, layer=False)
        elif node.target in (aten.mul.Tensor, aten.add.Tensor, aten.div.Tensor):
            new = _norm_by_hand(work, node)
        if new is not None:
            work.replace(node, new)
    work.clean()


def _plain_norm(work: Work, node: Node, layer: bool) -> Node | None:
    names = ("input", "normalized_shape", "weight", "bias", "eps") if layer else (
        "input", "normalized_shape", "weight", "eps")  # fmt: skip
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    x, sizes = given["input"], given["normalized_shape"]
    if len(sizes) != 1:
        return None
    weight, bias = given.get("weight"), given.get("bias")
    eps = given.get("eps")
    if eps is None:
        eps = 1e-5 if layer else torch.finfo(torch.float32).eps
    return _emit_norm(work, node, x, weight, bias, float(eps), layer)


def _emit_norm(work: Work, node: Node, x: Node, weight: Any, bias: Any, eps: float, layer: bool) -> Node:
    C = work.shape(x)[-1]
    if weight is None:
        weight = work.constant(f"ones.{C}", torch.ones(C))
    if not layer:
        return work.item(node, work.call(node, portlm.rms_norm.default, x, weight, eps), 0)
    if bias is None:
        bias = work.constant(f"zeros.{C}", torch.zeros(C))
    return work.item(node, work.call(node, portlm.layer_norm.default, x, weight, bias, eps), 0)


def _norm_by_hand(work: Work, node: Node) -> Node | None:
    C = work.shape(node)[-1] if work.shape(node) else None
    if not isinstance(C, int) or C < 2:
        return None
    for layer in (True, False):  # LayerNorm first: behind its subtraction of the mean it is an RMSNorm
        for x, inside in _arguments(work, node, _POINTWISE | _OVER_ROWS | _ROOTS):
            if not any(n.target in _OVER_ROWS for n in inside) or not same_shape(
                work.shape(x), work.shape(node)
            ):
                continue
            found = _norm_of(work, node, x, inside, C, layer)
            if found is not None:
                return _emit_norm(work, node, x, *found, layer)
    return None


def _norm_of(
    work: Work, node: Node, x: Node, inside: set[Node], C: int, layer: bool
) -> tuple[Any, Any, float] | None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, C, generator=generator, dtype=torch.float64) + 0.5
    rows = rows * torch.tensor([1.0, 3.0, 1e-1, 1e-2, 1e-3, 1.0], dtype=torch.float64)[:, None]
    rows = rows.reshape(*(1 for _ in work.shape(x)[:-2]), 6, C)  # of x's rank, so that axes mean the same
    value = _value(work, node, {x: rows})
    if value is None or value.shape != rows.shape:
        return None
    ordered = [n for n in work.graph.nodes if n in inside]
    arguments = list(
        dict.fromkeys(a for n in ordered for a in torch.utils._pytree.tree_leaves((n.args, n.kwargs)))
    )
    epsilons = [_number(work, a) for a in arguments]
    vectors = [a for a in arguments if is_node(a) and work.is_static(a) and work.shape(a) == (C,)]
    for eps in sorted({e for e in epsilons if e is not None and 0 < e <= 1e-2}):
        for weight in [*vectors, None]:
            for bias in [*(v for v in vectors if v is not weight), None] if layer else [None]:
                w, b = (None if v is None else work.evaluate(v, 2, 2).double() for v in (weight, bias))
                if layer:
                    expected = F.layer_norm(rows, (C,), w, b, eps)
                else:
                    expected = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
                    expected = expected if w is None else expected * w
                if _close(value, expected):
                    return weight, bias, eps
    return None


def _number(work: Work, argument: Any) -> float | None:
    if is_node(argument):
        value = argument.meta.get("val")
        if not isinstance(value, Tensor) or value.numel() != 1 or not work.is_static(argument):
            return None
        return float(work.evaluate(argument, 2, 2))
    return float(argument) if isinstance(argument, (int, float)) and not isinstance(argument, bool) else None


def _arguments(work: Work, node: Node, allowed: set[Any]) -> Iterator[tuple[Node, set[Node]]]:
    """Yield the values x of which a node may be a function, the nearest first, and the nodes in between."""
    near: dict[Node, int] = {node: 0}
    queue = [node]
    for n in queue:  # grows while it is read: breadth first
        if n.target in allowed and near[n] < _DEPTH:
            for m in n.all_input_nodes:
                if m not in near and work.is_dynamic(m):
                    near[m] = near[n] + 1
                    queue.append(m)
    for x in queue[1:]:
        inside = _between(work, node, x, allowed, near)
        if inside is not None:
            yield x, inside


def _between(
    work: Work, node: Node, x: Node, allowed: set[Any], near: Mapping[Node, int]
) -> set[Node] | None:
    """Return the nodes from x to node, if nothing else that depends on the ids enters."""
    inside, stack = set(), [node]
    while stack:
        n = stack.pop()
        if n is x or n in inside:
            continue
        if n.target not in allowed or n not in near:
            return None
        inside.add(n)
        stack.extend(m for m in n.all_input_nodes if work.is_dynamic(m))
    return inside


def _value(work: Work, node: Node, memo: dict[Node, Tensor]) -> Tensor | None:
    """Compute a node from the value of x in float64; None where a static part has a shape that does not fit."""

    def compute(argument: Any) -> Any:
        if not is_node(argument):
            return argument
        if argument not in memo:
            if work.is_static(argument):
                value = work.evaluate(argument, 1, 2)
                memo[argument] = value.double() if isinstance(value, Tensor) else value
            else:
                kwargs = {k: compute(v) for k, v in argument.kwargs.items() if k != "dtype"}
                memo[argument] = argument.target(*(compute(a) for a in argument.args), **kwargs)
        return memo[argument]

    try:
        return compute(node)
    except (RuntimeError, TypeError, IndexError):
        return None


def _close(value: Tensor, expected: Tensor) -> bool:
    return value.shape == expected.shape and torch.allclose(value, expected, rtol=1e-6, atol=1e-9)
