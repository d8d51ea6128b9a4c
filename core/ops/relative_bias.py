"""Biases of attention scores by how far a key is from its query, in buckets that are finer for near ones.

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (arXiv:1910.10683),
section 2.1, and the code released with it. Half of the buckets of a direction hold one distance each, the others grow
by equal ratios up to a largest distance, beyond which all keys are in the last one.

N buckets, H heads, B rows, T queries, which are the last T of S keys. Positions are counted in slots, so a key is as
far from its query whatever stands in front of both, padding too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from portlm.ops import kernel_op, lazy
from portlm.ops.cached_attention import MASKED
from portlm.ops.kernel_op import KernelOp
from portlm.ops.spec import FAR, Attribute, Attributes, Builder, Input, Node, OpSpec, Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", Tensor="torch:Tensor")

__all__ = ["buckets_of", "relative_bias", "relative_bias_reference"]


def buckets_of(count: int, bidirectional: bool, max_distance: int) -> np.ndarray:
    """Return the bucket of each distance (key - query) from -max_distance to max_distance, int64.

    Beyond these ends it is that of the end. In one direction alone, keys ahead are in the bucket of distance 0.

    Args:
        count: N.
        bidirectional: half of the buckets are for keys ahead of their query.
        max_distance: from here on all keys are in the last bucket of their direction.
    """
    each = count // 2 if bidirectional else count  # of one direction
    exact = each // 2
    distances = np.arange(max_distance + 1)
    with np.errstate(divide="ignore"):
        ratios = np.log(distances.astype(np.float32) / np.float32(exact)) / np.float32(
            math.log(max_distance / exact)
        )
    grown = exact + np.maximum(ratios * np.float32(each - exact), 0).astype(np.int64)
    behind = np.where(distances < exact, distances, np.minimum(grown, each - 1))
    ahead = behind[1:] + each if bidirectional else np.zeros(max_distance, np.int64)
    return np.concatenate((behind[::-1], ahead)).astype(np.int64)


def relative_bias_reference(
    x: Tensor, keys: Tensor, table: Tensor, bidirectional: bool, max_distance: int
) -> Tensor:
    """Compute the definition in plain PyTorch."""
    T, S = x.shape[1], keys.shape[1]
    slots = torch.arange(S, device=table.device)
    distance = slots[None, :] - slots[S - T :, None]  # (T, S)
    buckets = torch.from_numpy(buckets_of(len(table), bidirectional, max_distance)).to(table.device)
    found = buckets[distance.clamp(-max_distance, max_distance) + max_distance]
    bias = table[found].permute(2, 0, 1)  # (H, T, S)
    return bias if bidirectional else bias + MASKED * distance.clamp(min=0)


def relative_bias(x: Tensor, keys: Tensor, table: Tensor, bidirectional: bool, max_distance: int) -> Tensor:
    """Return what is added to the scores of T queries with S keys, differentiable in the table.

    Args:
        x: (B, T, C), of which only T is looked at.
        keys: (B, S) int64, an attention mask, of which only S is looked at.
        table: (N, H), a bias for each bucket and head.
        bidirectional: queries see keys ahead of them; otherwise those get -1e30 times their distance.
        max_distance: of the last bucket.

    Returns:
        (H, T, S).

    Raises:
        ValueError: the shapes do not fit, or there are too few buckets.
    """
    if x.dim() != 3 or keys.dim() != 2 or table.dim() != 2 or x.shape[1] > keys.shape[1]:
        raise ValueError(
            "[relative_bias] x must be (B, T, C), keys (B, S) with S at least T and the table (N, H), "
            f"got {tuple(x.shape)}, {tuple(keys.shape)} and {tuple(table.shape)}"
        )
    least = 4 if bidirectional else 2
    if len(table) < least or len(table) % 2 or max_distance <= len(table) // least:
        raise ValueError(
            f"[relative_bias] needs an even number of buckets, at least {least}, and a distance beyond those that have "
            f"one each, got {len(table)} and {max_distance}"
        )
    if kernel_op._exporting:
        found: Tensor = _recorded(x, keys, table, bidirectional, max_distance)
        return found
    return relative_bias_reference(x, keys, table, bidirectional, max_distance)


def _forward(x: Tensor, keys: Tensor, table: Tensor, bidirectional: bool, max_distance: int) -> Tensor:
    return relative_bias_reference(x, keys, table, bidirectional, max_distance).contiguous()


def _empty(x: Tensor, keys: Tensor, table: Tensor, bidirectional: bool, max_distance: int) -> Tensor:
    return table.new_empty((table.shape[1], x.shape[1], keys.shape[1]))


_recorded = KernelOp("relative_bias", _forward, fake=_empty)


def _ranges(count: int, bidirectional: bool, max_distance: int) -> tuple[list[float], list[float]]:
    """The least and the greatest distance (key - query) of each bucket; one that is empty has them crossed."""
    found = buckets_of(count, bidirectional, max_distance)
    if not bidirectional:  # what is ahead is hidden otherwise
        found = found[: max_distance + 1]
    low, high = [FAR] * count, [-FAR] * count
    for place, bucket in enumerate(found.tolist()):
        low[bucket] = min(low[bucket], float(place - max_distance))
        high[bucket] = max(high[bucket], float(place - max_distance))
    low[found[0]] = -FAR
    high[found[-1]] = FAR
    return low, high


def _portable(g: Builder, inputs: Sequence[str], outputs: Sequence[str], attributes: Attributes) -> None:
    """Distances as float32, the bucket of each as 1 among zeros, and one product with the table.

    Nothing says how many tokens there are, so ones are counted: those of the first row, whose number all rows have.
    """
    x, keys, table = inputs
    (out,) = outputs
    bidirectional = bool(attributes["bidirectional"])
    count = int(g.weight_shape(table)[0])
    low, high = _ranges(count, bidirectional, attributes["max_distance"])

    def first_row(value: str, name: str) -> str:
        return g.op("Gather", (value, g.ints(0)), g.unique(name), axis=0)

    # Reshapes, because TVM cannot compile the product of a matrix with its own Transpose.
    def column(value: str, name: str) -> str:
        return g.op("Reshape", (value, g.ints(-1, 1)), g.unique(name))

    def row(value: str, name: str) -> str:
        return g.op("Reshape", (value, g.ints(1, -1)), g.unique(name))

    ones = g.op("Gather", (g.floats("bias.ones", [1.0, 1.0]), keys), g.unique("bias.keys"), axis=0)  # (B, S)
    key_ones = column(first_row(ones, "bias.key_row"), "bias.key_ones")
    of_first = g.op("Gather", (first_row(x, "bias.row"), g.ints(0)), g.unique("bias.column"), axis=2)
    nothing = g.op("Mul", (of_first, g.scalar(0.0)), g.unique("bias.nothing"))  # (1, T, 1)
    query_ones = g.op(
        "Add", (column(nothing, "bias.flat"), g.scalar(1.0)), g.unique("bias.query_ones")
    )  # (T, 1)

    def counted(ones: str, name: str) -> tuple[str, str]:
        """Return 1, 2, ... (n, 1) and n (1, 1)."""
        numbers = g.op("CumSum", (ones, g.axis(0)), g.unique(f"{name}_numbers"))
        return numbers, g.op("MatMul", (row(ones, f"{name}_across"), ones), g.unique(f"{name}_count"))

    key_slots, total = counted(key_ones, "bias.key")
    query_slots, new = counted(query_ones, "bias.query")
    past = g.op("Sub", (total, new), g.unique("bias.past"))
    queries = g.op("Add", (query_slots, past), g.unique("bias.queries"))  # (T, 1)
    distance = g.op("Sub", (row(key_slots, "bias.slots"), queries), g.unique("bias.distance"))  # (T, S)
    each = g.op("Unsqueeze", (distance, g.ints(2)), g.unique("bias.each"))  # (T, S, 1)

    def beyond(one: str, other: str, name: str) -> str:
        return g.op("Relu", (g.op("Sub", (one, other), g.unique(f"{name}_by")),), g.unique(name))

    kind = f"{count}.{int(bidirectional)}.{attributes['max_distance']}"
    below = beyond(g.floats(f"bias.low.{kind}", low), each, "bias.below")  # (T, S, N)
    above = beyond(each, g.floats(f"bias.high.{kind}", high), "bias.above")
    outside = g.op("Add", (below, above), g.unique("bias.outside"))
    inside = beyond(g.scalar(1.0), outside, "bias.inside")  # 1 for the bucket, and 0 for all others
    looked_up = g.op("MatMul", (inside, table), g.unique("bias.looked_up"))  # (T, S, H)
    if bidirectional:
        g.op("Transpose", (looked_up,), out, perm=[2, 0, 1])
        return
    bias = g.op("Transpose", (looked_up,), g.unique("bias.by_head"), perm=[2, 0, 1])
    ahead = g.op("Relu", (distance,), g.unique("bias.ahead"))
    g.op("Add", (bias, g.op("Mul", (ahead, g.scalar(MASKED)), g.unique("bias.hidden"))), out)


def _read(arguments: Mapping[str, Any]) -> Attributes:
    return {"bidirectional": int(arguments["bidirectional"]), "max_distance": arguments["max_distance"]}


def _shapes(shapes: Sequence[Any], attributes: Attributes) -> Sequence[Shape]:
    x, keys, table = shapes
    return [(table[1], x[1], keys[1])]


SPEC = OpSpec(
    name="relative_bias",
    summary="biases of attention scores by distance, in buckets",
    nodes=(
        Node(
            op_type="RelativeBias",
            torch=("portlm::relative_bias",),
            inputs=(Input("x"), Input("keys", dtype="int64"), Input("table")),
            outputs=("y",),
            attributes=(Attribute("bidirectional", int), Attribute("max_distance", int)),
            read=_read,
            shapes=_shapes,
            portable=_portable,
        ),
    ),
)
