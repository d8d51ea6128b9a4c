"""Causal attention, however it was written, as one call of portlm's.

What stands between the product q k^T and the softmax is an affine map of the scores, s -> A s + C, whose A and C are
static: a scale, a mask filled in, chosen by `where`, multiplied or added. They are computed for several lengths, and
the attention is causal if A is one number and C is 0 where query i looks at key j <= i, and C is so low elsewhere that
softmax gives 0. The longest of these lengths is above every number that the mask's own computation mentions, so that
a window that hides distant keys is not mistaken for a causal mask. Any other attention stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from portlm.compile.canonical_graph import (
    Node,
    Work,
    aten,
    is_node,
    portlm,
    same_shape,
)
from portlm.compile.canonical_static import MASKED

_HIDDEN = -1e4  # as low as models write it; exp of it is 0 in float32 against any score of a sane size
_LONGEST = 2048  # the longest mask that is computed: 4 million entries


@dataclass
class _Scores:
    """softmax(A (q k) + C): the product's node and the steps from it to the softmax, the innermost first."""

    product: Node
    steps: list[tuple[str, Any, Any]]


def find_attention(work: Work) -> None:
    """Replace every causal attention by portlm::attention between permutes."""
    for node in list(work.graph.nodes):
        if node.op != "call_function" or not node.users or not work.is_dynamic(node):
            continue
        if node.target is aten.scaled_dot_product_attention.default:
            new = _from_sdpa(work, node)
        elif node.target is aten.matmul.default:
            new = _from_softmax(work, node)
        else:
            continue
        if new is not None:
            work.replace(node, new)
    work.clean()


def plain_attention(work: Work) -> None:
    """Write every portlm::attention in products with a mask, for a graph whose attentions cannot all have a cache."""
    for node in list(work.graph.nodes):
        if node.target is not portlm.attention.default:
            continue
        q, k, v, _, scale = node.args
        H, K = work.shape(q)[2], work.shape(k)[2]
        q, k, v = (work.permute(node, x, [0, 2, 1, 3]) for x in (q, k, v))
        if H != K:
            k, v = (work.call(node, aten.repeat_interleave.self_int, x, H // K, 1) for x in (k, v))
        T = work.size_argument(work.length)
        ahead = work.call(node, aten.triu.default, work.call(node, aten.ones.default, [T, T]), 1)
        q = work.call(node, aten.mul.Tensor, q, scale)
        scores = work.call(node, aten.matmul.default, q, work.permute(node, k, [0, 1, 3, 2]))
        hidden = work.call(node, aten.mul.Tensor, ahead, MASKED)
        shares = work.call(node, aten.softmax.int, work.call(node, aten.add.Tensor, scores, hidden), 3)
        out = work.permute(node, work.call(node, aten.matmul.default, shares, v), [0, 2, 1, 3])
        for user in list(node.users):
            work.replace(user, out)
    work.clean()


def _from_sdpa(work: Work, node: Node) -> Node | None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    q, k, v, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
    if given.get("dropout_p") or not work.is_static(mask):
        return None
    scale = given.get("scale")
    if scale is None:
        scale = work.shape(q)[-1] ** -0.5
    if mask is not None:
        if given.get("is_causal"):
            return None
        dtype = mask.meta["val"].dtype
        steps = [
            ("scale", scale, None),
            ("show", mask, -torch.inf) if dtype == torch.bool else ("add", mask, None),
        ]
        causal = _causal_scale(work, steps, work.sizes(q, 2, 2)[:-2])
        if causal is None:
            return None
    elif not given.get("is_causal"):
        return None
    if given.get("enable_gqa") is not True and not same_shape(work.shape(q)[:-2], work.shape(k)[:-2]):
        return None
    return _emit(work, node, q, k, v, float(scale))


def _from_softmax(work: Work, node: Node) -> Node | None:
    weights, v = node.args
    outer = None
    if is_node(weights) and weights.target is aten.reshape.default:  # (B, H, T, T) seen as (B H, T, T)
        outer, weights = weights, weights.args[0]
    if not is_node(weights) or weights.target not in (aten.softmax.int, aten._softmax.default):
        return None
    rank = len(work.shape(weights))
    if weights.args[1] % rank != rank - 1 or not is_node(v):
        return None
    scores = _scores(work, weights.args[0])
    if scores is None:
        return None
    q, keys = scores.product.args
    if len(work.shape(q)) != len(work.shape(keys)) or len(work.shape(q)) < 3:
        return None
    scale = _causal_scale(work, scores.steps, work.sizes(weights, 2, 2)[:-2])
    if scale is None:
        return None
    rank = len(work.shape(keys))
    k = work.permute(node, keys, [*range(rank - 2), rank - 1, rank - 2])
    out = _emit(work, node, q, k, v, scale)
    if out is None:
        return None
    return work.reshape(node, out, work.shape(node)) if outer is not None else out


def _scores(work: Work, node: Any) -> _Scores | None:
    """Walk from the argument of softmax back to the matrix product."""
    steps: list[tuple[str, Any, Any]] = []
    while is_node(node):
        target, args = node.target, node.args
        if target is aten.matmul.default:
            return _Scores(node, steps[::-1])
        if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor) and work.is_static(args[1]):
            steps.append(("hide", args[1], args[2]))
            node = args[0]
        elif target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
            condition, x, y = args
            if not work.is_static(condition):
                return None
            if work.is_static(y):
                steps.append(("show", condition, y))
                node = x
            elif work.is_static(x):
                steps.append(("hide", condition, x))
                node = y
            else:
                return None
        elif target in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor):
            x, y = args
            if work.is_static(y):
                steps.append(
                    ({"add": "add", "sub": "subtract", "mul": "scale", "div": "divide"}[_name(node)], y, None)
                )
                node = x
            elif work.is_static(x) and target in (aten.add.Tensor, aten.mul.Tensor):
                steps.append(({"add": "add", "mul": "scale"}[_name(node)], x, None))
                node = y
            else:
                return None
        elif target is aten.reshape.default:  # the batch and the heads in one axis or in two
            if not same_shape(work.shape(node)[-2:], work.shape(node.args[0])[-2:]):
                return None
            steps.append(("reshape", node, None))
            node = args[0]
        elif target is aten.maximum.default and work.is_static(args[1]):
            node = args[0]  # a floor of the lowest float, as some models put under their mask
            steps.append(("floor", args[1], None))
        else:
            return None
    return None


def _name(node: Node) -> str:
    return str(node.target).removeprefix("aten.").split(".")[0]


def _causal_scale(work: Work, steps: list[tuple[str, Any, Any]], leading: tuple[int, ...]) -> float | None:
    """Return the scale if the steps make a causal mask of the scores, else None."""
    lengths = _lengths(work, steps)
    if lengths is None:
        return None
    scale: float | None = None
    for T in lengths:
        B = 2 if T < 64 else 1
        try:
            A, C = _affine(work, steps, B, T)
        except (IndexError, RuntimeError):
            return None  # the mask has no such length or shape
        visible = torch.ones(T, T, dtype=torch.bool).tril()
        try:
            A, C = torch.broadcast_to(A, (*A.shape[:-2], T, T)), torch.broadcast_to(C, (*C.shape[:-2], T, T))
        except RuntimeError:
            return None
        seen = A[..., visible]
        scale = float(seen.flatten()[0]) if scale is None else scale
        if not torch.allclose(seen, torch.tensor(scale, dtype=A.dtype), rtol=1e-6, atol=0):
            return None
        if C[..., visible].ne(0).any() or not C[..., ~visible].le(_HIDDEN).all():
            return None
        if A[..., ~visible].lt(0).any() or not scale > 0:
            return None
    return scale


def _lengths(work: Work, steps: list[tuple[str, Any, Any]]) -> list[int] | None:
    """Return the lengths to look at, or None if the mask mentions a number beyond what can be computed."""
    context = work.context or _LONGEST
    longest = 8
    stack = [a for _, *arguments in steps for a in arguments if is_node(a)]
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node in seen or work.is_dynamic(node):
            continue
        seen.add(node)
        stack.extend(node.all_input_nodes)
        if node.op == "placeholder":
            sizes = [s for s in node.meta["val"].shape if isinstance(s, int)]
            longest = max([longest, *(s for s in sizes if s <= context)])
            values = work.weights[node.name][1] if node.name in work.weights else torch.empty(0)
            numbers = values.flatten().tolist() if values.numel() <= 4 else []  # a window kept in a buffer
        else:
            numbers = torch.utils._pytree.tree_leaves((node.args, node.kwargs))
        for number in numbers:
            if isinstance(number, (int, float)) and not isinstance(number, bool) and 1 < abs(number) < 1e9:
                longest = max(longest, int(abs(number)) + 2)
    longest = min(longest, context)
    if longest > _LONGEST:
        return None
    return sorted({T for T in (1, 2, 3, 5, longest) if context >= T})


def _affine(work: Work, steps: list[tuple[str, Any, Any]], B: int, T: int) -> tuple[Tensor, Tensor]:
    """Compute A and C, float64 tensors that broadcast against (..., T, T)."""
    A, C = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    for kind, argument, other in steps:
        if kind == "reshape":
            shape = work.sizes(argument, B, T)
            before = work.sizes(argument.args[0], B, T)
            A, C = (t if t.dim() <= 2 else t.expand(before).reshape(shape) for t in (A, C))
            continue
        value = work.evaluate(argument, B, T)
        value = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        if kind in ("hide", "show"):
            filled = torch.as_tensor(work.evaluate(other, B, T), dtype=torch.float64)
            hidden = value.bool() if kind == "hide" else ~value.bool()
            A, C = torch.where(hidden, 0.0, A), torch.where(hidden, filled, C)
            continue
        value = value.double()
        if kind == "floor":
            if value.gt(-1e30).any():
                raise RuntimeError("a floor that scores can reach")
        elif kind == "add":
            C = C + value
        elif kind == "subtract":
            C = C - value
        else:
            factor = value if kind == "scale" else 1 / value
            A = A * factor
            C = torch.where(C == 0, 0.0, C * factor)  # not 0 times infinity
    return A, C


def _emit(work: Work, node: Node, q: Node, k: Node, v: Node, scale: float) -> Node | None:
    """Insert portlm::attention for q, k, v with the axes (T, D) last, and give its result their layout."""
    group = _group(work, q, k)
    k, v = _before_repeat(work, k, v, group)
    heads = [_heads(work, node, x) for x in (q, k, v)]
    if None in heads:
        return None
    (q4, back), (k4, _), (v4, _) = heads  # type: ignore[misc]
    shapes = [work.shape(x) for x in (q4, k4, v4)]
    if any(not isinstance(s[2], int) or not isinstance(s[3], int) for s in shapes):
        return None
    if shapes[1] != shapes[2] or shapes[0][3] != shapes[1][3] or shapes[0][2] % shapes[1][2]:
        return None
    if any(not same_shape(s[:2], (work.batch, work.length)) for s in shapes):
        return None  # keys of another length: not attention of a sequence to itself
    q4, scale = _without_scale(work, node, q4, scale)
    result = work.call(node, portlm.attention.default, q4, k4, v4, True, scale)
    out = work.item(node, result, 0)
    return work.reshape(node, work.permute(node, out, back), work.shape(q))


def _group(work: Work, q: Node, k: Node) -> int:
    """Return how many query heads there are for each head of k, where k is not repeated in the graph."""
    if len(work.shape(q)) != 4:
        return 1
    heads, kv_heads = work.shape(q)[1], work.shape(k)[1]
    return heads // kv_heads if isinstance(heads, int) and isinstance(kv_heads, int) else 1


def _before_repeat(work: Work, k: Node, v: Node, group: int) -> tuple[Node, Node]:
    """Return keys and values as they were before their heads were repeated for grouped queries."""
    if group != 1:
        return k, v
    inner = [_unrepeated(work, x) for x in (k, v)]
    if inner[0] is None or inner[1] is None or work.shape(inner[0]) != work.shape(inner[1]):
        return k, v
    return inner[0], inner[1]


def _unrepeated(work: Work, x: Node) -> Node | None:
    """Return (B, K, T, D) if x (B, K G, T, D) repeats each of its heads G times in a row, maybe between permutes."""
    if x.target is aten.permute.default:
        found = _unrepeated_at(work, x.args[0], x.args[1][1])
        return None if found is None else work.permute(x, found, x.args[1])
    return _unrepeated_at(work, x, 1)


def _unrepeated_at(work: Work, x: Node, axis: int) -> Node | None:
    if x.target is aten.repeat_interleave.self_int:
        dim = x.args[2] if len(x.args) > 2 else x.kwargs.get("dim")
        return x.args[0] if dim is not None and dim % len(work.shape(x)) == axis else None
    if x.target is not aten.reshape.default or x.args[0].target not in (
        aten.expand.default,
        aten.repeat.default,
    ):
        return None
    expanded = x.args[0]
    wide = expanded.args[0]  # (B, K, 1, T, D)
    shape, repeated = list(work.shape(wide)), list(work.shape(expanded))
    if (
        len(shape) != len(work.shape(x)) + 1
        or shape[axis + 1] != 1
        or not isinstance(repeated[axis + 1], int)
    ):
        return None
    unchanged = [j for j in range(len(shape)) if j != axis + 1]
    if not same_shape([shape[j] for j in unchanged], [repeated[j] for j in unchanged]):
        return None
    merged = [*repeated[:axis], repeated[axis] * repeated[axis + 1], *repeated[axis + 2 :]]
    if not same_shape(merged, work.shape(x)):
        return None
    return work.reshape(x, wide, [shape[j] for j in unchanged])


def _heads(work: Work, node: Node, x: Node) -> tuple[Node, list[int]] | None:
    """Return x as (B, T, H, D), and the permutation that takes such a value back to (B, H, T, D)."""
    shape = work.shape(x)
    if len(shape) == 4:
        return work.permute(node, x, [0, 2, 1, 3]), [0, 2, 1, 3]
    if len(shape) != 3:
        return None
    if same_shape(shape[:1], (work.batch,)):  # one head
        return work.reshape(node, x, (*shape[:2], 1, shape[2])), [0, 1, 2, 3]
    heads = _ratio(work, shape[0])
    if heads is None:
        return None
    x = work.reshape(node, x, (work.batch, heads, *shape[1:]))
    return work.permute(node, x, [0, 2, 1, 3]), [0, 2, 1, 3]


def _ratio(work: Work, size: Any) -> int | None:
    """Return H if a size is B H."""
    if isinstance(size, int):
        return None
    ratio = size.node.expr / work.batch.node.expr
    return int(ratio) if ratio.is_integer and ratio.is_number else None


def _without_scale(work: Work, node: Node, q: Node, scale: float) -> tuple[Node, float]:
    """Take a factor that q was multiplied by into the scale, through the permutes and reshapes on its way."""
    path: list[Node] = []
    inner = q
    while inner.target in (aten.permute.default, aten.reshape.default):
        path.append(inner)
        inner = inner.args[0]
    if inner.target not in (aten.mul.Tensor, aten.div.Tensor):
        return q, scale
    x, factor = inner.args
    if is_node(x) and is_node(factor) and factor.meta["val"].numel() == 1:
        if not work.is_static(factor):
            return q, scale
        values = {float(work.evaluate(factor, 2, T)) for T in (2, 3)}
        if len(values) != 1:
            return q, scale
        factor = values.pop()
    if is_node(factor) or not is_node(x) or not factor > 0:
        return q, scale
    for step in reversed(path):
        if step.target is aten.permute.default:
            x = work.permute(node, x, step.args[1])
        else:
            x = work.reshape(node, x, work.shape(step))
    return x, scale * factor if inner.target is aten.mul.Tensor else scale / factor
