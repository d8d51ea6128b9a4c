"""How much work a decoded token is, read from the graph: what a measured rate is compared with."""

import math
from pathlib import Path

from portlm.artifact import Manifest, check_files
from portlm.compile.check import BFLOAT16, FLOAT16, INT64, ITEM_BYTES, UINT8, examine, read_graph
from portlm.errors import FormatError

ROWS = {
    ("", "Gather"): (0,),
    ("ai.portlm", "Embedding"): (1,),
    ("ai.portlm", "HalfEmbedding"): (1,),
    ("ai.portlm", "QuantizedEmbedding"): (1, 2, 3),
    ("ai.portlm", "Rotary"): (2, 3),
}
"""Operators that read one row of a table for a token -> which inputs are tables."""


def token_work(
    folder: str | Path, manifest: Manifest, half_scales: bool = False, widened: bool = False
) -> tuple[int, int]:
    """Return (bytes of weights read, multiply-adds made) per decoded token of the role "decoder".

    Every weight is read once, and every matrix multiplied once, except a pure lookup table, of which a row is read.

    Args:
        folder: the artifact.
        manifest: of it.
        half_scales: count scales of quantized weights as portlm's kernels keep them, in 2 bytes; else as the graph
            does, in 4.
        widened: count weights of 16 bits as float32, which some engines make of them when they open a model, see
            `widens`.

    Raises:
        FormatError: there is no graph, it is not the one that the manifest lists, or none that portlm writes.
    """
    role = manifest.roles.get("decoder")
    if role is None or not role.profiles:
        raise FormatError(f"{folder}: the manifest has no graph of a decoder; export again")
    name = role.profiles.get("portable", min(role.profiles.values()))
    check_files(folder, [name], manifest)
    path = Path(folder) / name
    graph = examine(read_graph(path), path).graph
    read: set[str] = set()
    meant: dict[str, str] = {}  # what a weight is called where it is widened or cut in parts -> that weight
    weights = {tensor.name for tensor in graph.initializer}
    halves = {tensor.name for tensor in graph.initializer if tensor.data_type in (FLOAT16, BFLOAT16)}
    for node in graph.node:
        if node.op_type == "Cast" and node.input[0] in halves:
            meant[node.output[0]] = node.input[0]
            continue
        if node.op_type == "Split" and node.input[0] in weights:
            meant |= dict.fromkeys(node.output, node.input[0])
            continue
        tables = ROWS.get((node.domain, node.op_type), ())
        read |= {meant.get(name, name) for place, name in enumerate(node.input) if place not in tables}
    scales = {  # beside weights in small numbers, which they are no matrices of their own
        f"{tensor.name.removesuffix('.q')}.scale" for tensor in graph.initializer if tensor.data_type == UINT8
    }
    total = multiplies = 0
    for tensor in graph.initializer:
        if tensor.data_type == INT64:  # extents and places, no weights
            continue
        size = 4 if widened and tensor.data_type in (FLOAT16, BFLOAT16) else ITEM_BYTES[tensor.data_type]
        for extent in tensor.dims if tensor.name in read else tensor.dims[1:]:
            size *= extent
        total += size // 2 if half_scales and tensor.name in scales else size
        if tensor.name not in read or tensor.name in scales:
            continue
        if tensor.data_type == UINT8 and len(tensor.dims) == 3 and manifest.quantization is not None:
            multiplies += math.prod(tensor.dims) * 8 // manifest.quantization.bits
        elif len(tensor.dims) == 2 and tensor.data_type != UINT8:
            multiplies += tensor.dims[0] * tensor.dims[1]
    return total, multiplies


def widens(engine: str, profile: str) -> bool:
    """Whether an engine makes float32 of weights of 16 bits once for all, and so reads those for each token."""
    return engine != "packed" and (engine == "ort" or profile != "fused")
