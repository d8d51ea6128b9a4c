"""How far the values of a graph's inputs may go: what they look up has so many rows.

Beyond them engines differ. Some refuse, some read the last row instead, and say nothing. So export writes the number
into the manifest, where the check of every call finds it, and a manifest from elsewhere is compared with its graph.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from msgspec.structs import replace

from portlm.artifact import Manifest, RoleSpec
from portlm.engine import limit_of
from portlm.ops.spec import DOMAIN
from portlm.roles import StateSpec, TensorSpec

Spec = TypeVar("Spec", TensorSpec, StateSpec)

# Operators that look rows up, with the place of the indices and those of the tables. Gather has an axis.
LOOKUPS = {
    ("", "Gather"): (1, (0,)),
    (DOMAIN, "Embedding"): (0, (1,)),
    (DOMAIN, "QuantizedEmbedding"): (0, (1, 2)),
    (DOMAIN, "Rotary"): (1, (2, 3)),
    ("com.microsoft", "GatherBlockQuantized"): (1, (2,)),
    ("com.microsoft", "RotaryEmbedding"): (1, (2, 3)),
}
# Operators that give all values of their first input in another shape. What is looked up after it was taken apart, or
# put together with other values, is not followed: no one number says how far the whole may go.
MOVING = ("Reshape", "Transpose", "Unsqueeze")


def table_limits(graph: Any) -> dict[str, int]:
    """Return by input the number of rows of the smallest table that it looks something up in, if it does.

    Args:
        graph: a GraphProto, or the same as compile/onnx_reader.py reads it; already checked.
    """
    sizes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    origins = {value.name: value.name for value in graph.input}  # value -> the input whose values it holds
    limits: dict[str, int] = {}
    for node in graph.node:
        where, tables = LOOKUPS.get((node.domain, node.op_type), (0, ()))
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        for table in (node.input[place] for place in tables):
            name = origins.get(node.input[where])
            if name and table in sizes and -len(sizes[table]) <= axis < len(sizes[table]):
                limits[name] = min(sizes[table][axis], limits.get(name, sizes[table][axis]))
        if not node.domain and node.op_type in MOVING and node.input[0] in origins:
            origins[node.output[0]] = origins[node.input[0]]
    return limits


def with_limits(specs: Sequence[Spec], limits: Sequence[Mapping[str, int]]) -> tuple[Spec, ...]:
    """Return the inputs or the state of a role with what the tables of its graphs say of them."""
    found = []
    for spec in specs:
        known = [rows[spec.name] for rows in limits if spec.name in rows]
        known += [] if spec.below is None else [spec.below]
        found.append(replace(spec, below=min(known)) if known else spec)
    return tuple(found)


def beyond(manifest: Manifest, role: RoleSpec, graph: Any) -> str:
    """Say what a manifest would let through that a graph of this role has no row for, or ""."""
    limits, sizes = table_limits(graph), (manifest.model.vocab_size, manifest.model.context_length)
    taken: list[TensorSpec | StateSpec] = [*role.inputs, *role.state]
    for spec in taken:
        said, rows = limit_of(spec, *sizes), limits.get(spec.name)
        if rows is not None and (said is None or said > rows):
            until = "does not say how far they go" if said is None else f"lets them go to {said - 1}"
            return (
                f"the values of {spec.name[:80]!r} look up a table of {rows} rows, and the manifest {until}"
            )
    return ""
