"""Passes for what does not depend on the token ids: it becomes a number, a weight, or a table looked up by position."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from portlm.compile.canonical_graph import (
    Node,
    Work,
    aten,
    is_node,
    module_path,
    portlm,
    same_shape,
    unsupported,
)
from portlm.errors import UsageError

MASKED = -1e30  # far below any score, and still finite in float32
_PAIRS = 4096  # the longest context of which a table of all pairs is kept: 64 MiB
_PROBES = ((2, 3), (1, 1), (3, 2))  # (B, T) at which a static value is compared with its table


def bound_context(work: Work) -> None:
    """Find the longest T: no position beyond the rows of a table that is looked up by position.

    Raises:
        UsageError: nothing says how long a sequence may be.
    """
    for node in work.graph.nodes:
        if node.target is not aten.embedding.default or work.is_dynamic(node.args[1]):
            continue
        ids = [work.evaluate(node.args[1], 1, T) for T in (2, 3)]
        if ids[1].max() > ids[0].max():  # grows with T: positions, maybe with an offset
            rows = work.shape(node.args[0])[0] - (int(ids[1].max()) - 2)
            work.context = min(work.context or rows, rows)
    if not work.context:
        raise UsageError(
            "nothing in the module says how many tokens it can take: set module.context_length, the longest sequence"
        )


def position_table(work: Work, node: Node, rank: int) -> tuple[int, Tensor] | None:
    """Return (axis, rows) for a static value that is rows[t] at position t of its axis, else None.

    Args:
        work: the graph.
        node: a static value that broadcasts against a value of this rank, whose first axis is the batch.
        rank: of that value; the axis is counted in it.

    Returns:
        The time axis, and rows (context, *the sizes of the other axes without the batch).
    """
    shape = work.shape(node)
    offset = rank - len(shape)
    axes = [j for j, s in enumerate(shape) if not isinstance(s, int) and same_shape((s,), (work.length,))]
    others = [s for j, s in enumerate(shape) if j not in axes and not isinstance(s, int)]
    if len(axes) != 1 or offset < 0 or axes[0] + offset < 1:
        return None
    if others and not (offset == 0 and len(others) == 1 and same_shape(shape[:1], (work.batch,))):
        return None
    axis = axes[0] + offset

    def rows(B: int, T: int) -> Tensor | None:
        value = work.evaluate(node, B, T).detach()
        value = value.reshape((1,) * offset + tuple(value.shape))
        if value.shape[0] > 1 and not (value == value[:1]).all():
            return None
        return value[0].movedim(axis - 1, 0)

    full = rows(1, work.context)
    if full is None:
        return None
    for B, T in _PROBES:
        if work.context >= T:
            part = rows(B, T)
            if part is None or not torch.equal(part, full[:T]):
                return None
    return axis, full


def at_positions(work: Work, before: Node, name: str, rows: Tensor) -> Node:
    """Insert the rows (context, C) at position_ids, (B, T, C); equal rows are stored and looked up once."""
    weight = _same_weight(work, rows)
    if weight is None:
        weight = work.weight(name, rows.float().contiguous())
    positions = work.position_ids()
    for user in weight.users:
        if user.target is portlm.embedding.default and user.args[0] is positions:
            return user
    first = positions.next
    while first.op == "placeholder":
        first = first.next
    node = work.call(first, portlm.embedding.default, positions, weight)
    node.meta.update({k: before.meta[k] for k in ("nn_module_stack", "stack_trace") if k in before.meta})
    return node


def _same_weight(work: Work, rows: Tensor) -> Node | None:
    for node in work.graph.nodes:
        if node.op != "placeholder":
            return None
        if node.name in work.weights:
            known = work.weights[node.name][1]
            # A table may have more rows than there are positions.
            fits = known.dim() == 2 and known.shape[1:] == rows.shape[1:] and len(known) >= len(rows)
            if fits and known.dtype == rows.dtype and torch.equal(known[: len(rows)], rows):
                return node
    return None


def fold(work: Work) -> None:
    """Give every static value that a dynamic one reads its form: number, weight, or rows of a table by position.

    Raises:
        UsageError: a value that is none of them.
    """
    for node in list(work.graph.nodes):
        if (
            node.op != "call_function"
            or work.is_dynamic(node)
            or not isinstance(node.meta.get("val"), Tensor)
        ):
            continue
        readers = [u for u in node.users if u.op == "output" or _is_dynamic_call(work, u)]
        for reader in readers:
            new = _form(work, node, reader)
            reader.replace_input_with(node, new) if is_node(new) else _write(reader, node, new)
    work.clean()


def _is_dynamic_call(work: Work, node: Node) -> bool:
    return node.op == "call_function" and work.is_dynamic(node)


def _write(reader: Node, node: Node, number: float) -> None:
    reader.args = fx.map_arg(reader.args, lambda n: number if n is node else n)
    reader.kwargs = fx.map_arg(reader.kwargs, lambda n: number if n is node else n)


def _form(work: Work, node: Node, reader: Node) -> Any:
    shape = work.shape(node)
    if all(isinstance(s, int) for s in shape):
        values = [work.evaluate(node, B, T).detach() for B, T in ((2, 3), (1, 2))]
        if not torch.equal(values[0], values[1]):
            raise unsupported(
                node, f"{_name(node)} of the sequence's length", "compute it from weights and positions only"
            )
        pointwise = (aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.div.Tensor)
        if values[0].numel() == 1 and reader.target in pointwise:
            return float(values[0])
        return _constant(work, node, values[0])
    pairs = _pair_table(work, node, reader)
    if pairs is not None:
        return pairs
    rank = len(reader.meta["val"].shape) if isinstance(reader.meta.get("val"), Tensor) else len(shape)
    table = position_table(work, node, rank)
    if table is None:
        raise unsupported(
            node,
            f"{_name(node)}, a value of batch and length that is neither a row per position nor one per pair,",
            "let positions enter as rows of a table, and masks as (T, T)",
        )
    axis, rows = table
    found = at_positions(work, reader, _label(node), rows.reshape(len(rows), -1))
    others = [int(s) for s in rows.shape[1:]]
    value = work.reshape(reader, found, (work.batch, work.length, *others))
    dims = list(range(2, rank))
    return work.permute(reader, value, [0, *dims[: axis - 1], 1, *dims[axis - 1 :]])


def _pair_table(work: Work, node: Node, reader: Node) -> Node | None:
    """Return a value for each pair of positions, (..., T, T), as rows and columns of its largest."""
    shape = work.shape(node)
    times = [j for j, s in enumerate(shape) if not isinstance(s, int)]
    rank = len(shape)
    if times[-2:] != [rank - 2, rank - 1] or not same_shape(shape[-2:], (work.length, work.length)):
        return None
    if times[:-2] not in ([], [0]) or work.context > _PAIRS:
        return None

    def pairs(B: int, T: int) -> Tensor | None:
        value = work.evaluate(node, B, T).detach()
        if times[:-2]:
            if not (value == value[:1]).all():
                return None  # another mask for each sequence
            value = value[:1]
        return value.float().clamp(min=MASKED)  # the weight file holds no infinity

    full = pairs(1, work.context)
    for B, T in _PROBES:
        part = pairs(B, T) if work.context >= T else None
        if full is None or part is None or not torch.equal(part, full[..., :T, :T]):
            return None
    assert full is not None
    table = work.weight(_label(node), full.contiguous())
    queries = work.call(reader, aten.index_select.default, table, rank - 2, work.one_row())
    return work.call(reader, aten.index_select.default, queries, rank - 1, work.one_row())


def _constant(work: Work, node: Node, value: Tensor) -> Node:
    """Return the weight for a constant: the transpose of a parameter keeps its name if nothing else reads it."""
    origin: Any = node.args[0] if node.target is aten.permute.default else None
    if is_node(origin) and origin.name in work.weights:
        name = work.weights[origin.name][0]
        if all(user.target is aten.permute.default and user.args == node.args for user in origin.users):
            return _transposed_weight(work, name, value, origin)
        # Read both ways: a tensor of its own, since a file keeps no two orders of the same memory.
        both = f"{name}_transposed"
        found = next((place for place, (known, _) in work.weights.items() if known == both), None)
        if found is not None:
            return next(n for n in work.graph.nodes if n.name == found)
        return work.weight(both, value.contiguous())
    return work.weight(_label(node), value.contiguous())


def _transposed_weight(work: Work, name: str, value: Tensor, origin: Node) -> Node:
    for placeholder, (known, tensor) in work.weights.items():
        same = tensor.data_ptr() == value.data_ptr() and tensor.shape == value.shape
        if same and tensor.stride() == value.stride():
            return next(n for n in work.graph.nodes if n.name == placeholder and known)
    work.weights[origin.name] = (f"{name}_original", work.weights[origin.name][1])
    return work.weight(name, value, before=origin)


def _label(node: Node) -> str:
    """Name a constant after its module."""
    stack = node.meta.get("nn_module_stack") or {}
    path = module_path(list(stack.values())[-1][0]) if stack else ""
    return f"{path}.{_name(node)}_values".lstrip(".")


def _name(node: Node) -> str:
    return str(node.target).removeprefix("aten.").split(".")[0]


def shared_once(weights: Iterable[tuple[str, str, Tensor]]) -> dict[str, str]:
    """Return placeholder -> the first placeholder with the same tensor.

    Args:
        weights: (placeholder, name, tensor).

    Raises:
        UsageError: two weights share some of their memory, but are not the same tensor.
    """
    same: dict[tuple[Any, ...], str] = {}
    ranges: list[tuple[int, int, str]] = []
    first = {}
    for placeholder, name, tensor in weights:
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and key in same:
            first[placeholder] = same[key]
            continue
        same[key] = placeholder
        if not tensor.numel():
            continue
        extent = sum((s - 1) * abs(step) for s, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        begin, end = tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size()
        for other_begin, other_end, other in ranges:
            if begin < other_end and other_begin < end:
                raise UsageError(
                    f"{name} and {other} share memory without being the same tensor, which the weight file cannot "
                    f"say: tie them by one parameter, or give each its own with .clone()"
                )
        ranges.append((begin, end, name))
    return first
