"""Looks at an ONNX file before any library does more than parse it.

Only what portlm's exporter writes is accepted: its operators with its attributes, weights in one sibling file
inside that file's bounds, payloads as large as their shapes. The general checkers come last, because they and the
runtimes behind them have crashed on graphs that this list refuses (a Split with fewer num_outputs than outputs
ends the process in onnx 1.23 and in ONNX Runtime 1.31).

Who calls this: export and lowering, on every file they write, and whoever receives an artifact from elsewhere,
through check_isolated. The runtimes do not, because they do not import onnx: they compare the file with the hash in
the manifest, so they run what was checked when the manifest was written.
"""

import math
import resource
import subprocess
import sys
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, TensorProto

from portlm.compile.forms import (
    CONTRIB_OPS,
    DOMAIN,
    DOMAIN_VERSION,
    FUSED_OPS,
    PORTABLE_OPS,
)
from portlm.compile.graph import OPSET
from portlm.errors import FormatError
from portlm.files import open_regular, safe_join

MAX_GRAPH_BYTES = 64 * 2**20  # without weights: 1024 layers take 8 MB
MAX_NODES = 2**17
MAX_INITIALIZERS = 65_536
MAX_RANK = 8
MAX_DIMENSION = 2**31
MAX_NAME = 256  # bytes
MAX_VALUES_PER_NODE = 64  # inputs, outputs or attributes

CONTRIB = "com.microsoft"
OPERATORS: dict[str, dict[str, tuple[str, ...]]] = {
    "": PORTABLE_OPS,
    DOMAIN: FUSED_OPS,
    CONTRIB: CONTRIB_OPS,
}
OPSETS = {"": OPSET, DOMAIN: DOMAIN_VERSION, CONTRIB: 1}
ITEM_BYTES = {TensorProto.FLOAT: 4, TensorProto.INT64: 8}
ATTRIBUTE_TYPES = (
    AttributeProto.INT,
    AttributeProto.INTS,
    AttributeProto.FLOAT,
    AttributeProto.STRING,
)

ISOLATED_BYTES = 4 * 2**30  # address space of the checking child
ISOLATED_SECONDS = 60


def check_model(path: str | Path) -> onnx.ModelProto:
    """Parse a graph and return it if it is one that portlm could have written.

    Args:
        path: the .onnx file; its weight file lies beside it.

    Returns:
        The model, its weights not loaded.

    Raises:
        FormatError: the file is missing, truncated, too large, or holds anything that the exporter never writes.
    """
    path = Path(path)
    with open_regular(path) as file:
        raw = file.read(MAX_GRAPH_BYTES + 1)
    if len(raw) > MAX_GRAPH_BYTES:
        raise FormatError(f"{path}: larger than the {MAX_GRAPH_BYTES} bytes a graph may have")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(raw)
    except DecodeError as error:
        raise FormatError(f"{path}: truncated or not ONNX; export again") from error
    try:
        _check_structure(model)
        _check_nodes(model.graph)
        _check_weights(model.graph, path)
        onnx.checker.check_model(str(path))
    except (_RefusedError, onnx.checker.ValidationError) as error:
        raise FormatError(
            f"{path}: {str(error).splitlines()[0]}; export again from the checkpoint"
        ) from error
    return model


def check_isolated(path: str | Path) -> None:
    """Run check_model on a file from elsewhere in a child process with little memory and time.

    Raises:
        FormatError: the file is refused, or the child died of it.
    """
    command = [sys.executable, "-m", "portlm.compile.check", str(path)]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=ISOLATED_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise FormatError(
            f"{path}: checking it took more than {ISOLATED_SECONDS} s; do not use this file"
        ) from error
    if child.returncode == FormatError.exit_code and child.stdout:
        raise FormatError(child.stdout.strip())
    if child.returncode != 0:
        raise FormatError(
            f"{path}: the process that checked it died ({child.returncode}); do not use this file"
        )


class _RefusedError(Exception):
    """Something the exporter never writes."""


def _check_structure(model: onnx.ModelProto) -> None:
    graph = model.graph
    if model.functions or model.training_info or model.configuration:
        raise _RefusedError("holds functions, training or device information")
    if graph.sparse_initializer or graph.quantization_annotation:
        raise _RefusedError("holds sparse or annotated weights")
    if len(graph.node) > MAX_NODES or len(graph.initializer) > MAX_INITIALIZERS:
        raise _RefusedError("has too many nodes or weights")
    for opset in model.opset_import:
        if OPSETS.get(opset.domain) != opset.version:
            raise _RefusedError(f"asks for operator set {opset.domain[:80]!r} {opset.version}")
    for value in (*graph.input, *graph.output):
        kind = value.type.tensor_type
        if kind.elem_type not in ITEM_BYTES or len(kind.shape.dim) > MAX_RANK:
            raise _RefusedError(f"value {value.name[:80]!r} has a type or rank that no graph of ours has")


def _check_nodes(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        allowed = OPERATORS.get(node.domain, {}).get(node.op_type)
        if allowed is None:
            raise _RefusedError(f"operator {node.domain[:80]}:{node.op_type[:80]} is not one of ours")
        if max(len(node.input), len(node.output), len(node.attribute)) > MAX_VALUES_PER_NODE:
            raise _RefusedError(f"node {node.name[:80]!r} has too many inputs, outputs or attributes")
        for name in (node.name, *node.input, *node.output):
            if len(name.encode()) > MAX_NAME:
                raise _RefusedError(f"a name is longer than {MAX_NAME} bytes: {name[:80]!r}")
        for attribute in node.attribute:
            if (
                attribute.name not in allowed
                or attribute.type not in ATTRIBUTE_TYPES
                or attribute.ref_attr_name
            ):
                raise _RefusedError(f"node {node.name[:80]!r} has the attribute {attribute.name[:80]!r}")
            if attribute.name == "num_outputs" and attribute.i != len(node.output):
                raise _RefusedError(
                    f"node {node.name[:80]!r} has {len(node.output)} outputs and says {attribute.i}"
                )


def _check_weights(graph: onnx.GraphProto, path: Path) -> None:
    locations: dict[str, int] = {}  # file name -> size; one at most
    for tensor in graph.initializer:
        name, item = tensor.name[:80], ITEM_BYTES.get(tensor.data_type)
        if item is None:
            raise _RefusedError(f"weight {name!r} is of a type that no graph of ours has")
        if len(tensor.dims) > MAX_RANK or not all(0 <= d <= MAX_DIMENSION for d in tensor.dims):
            raise _RefusedError(f"weight {name!r} has an impossible shape")
        size = math.prod(tensor.dims) * item
        if tensor.data_location == TensorProto.EXTERNAL:
            _check_external(tensor, size, path, locations)
        elif len(tensor.raw_data) != size or tensor.external_data:
            raise _RefusedError(
                f"weight {name!r} has {len(tensor.raw_data)} bytes, its shape asks for {size}"
            )
        fields = {field.name for field, _ in tensor.ListFields()}
        if fields - {"name", "dims", "data_type", "raw_data", "data_location", "external_data"}:
            raise _RefusedError(f"weight {name!r} is not stored as raw bytes")


def _check_external(tensor: TensorProto, size: int, path: Path, locations: dict[str, int]) -> None:
    name, entries = tensor.name[:80], {entry.key: entry.value for entry in tensor.external_data}
    if (
        tensor.raw_data
        or len(entries) != len(tensor.external_data)
        or entries.keys() != {"location", "offset", "length"}
    ):
        raise _RefusedError(f"weight {name!r} does not say location, offset and length, each once")
    location = entries["location"]
    if location not in locations:
        if locations or "/" in location:
            raise _RefusedError(f"weight {name!r} is in a second file or another folder: {location[:80]!r}")
        sibling = safe_join(path.parent, location)
        if not sibling.is_file():
            raise _RefusedError(f"the weight file {location} beside it is missing")
        locations[location] = sibling.stat().st_size
    offset, length = (_decimal(entries[key]) for key in ("offset", "length"))
    if length != size:
        raise _RefusedError(f"weight {name!r} has {length} bytes, its shape asks for {size}")
    if offset + length > locations[location]:
        raise _RefusedError(
            f"weight {name!r} ends at byte {offset + length} of {location}, which has {locations[location]}"
        )


def _decimal(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 15:
        raise _RefusedError(f"offset or length is {text[:80]!r}")
    return int(text)


def _main() -> int:
    """The child of check_isolated: silent if the file is accepted, else the reason on stdout."""
    resource.setrlimit(resource.RLIMIT_AS, (ISOLATED_BYTES, ISOLATED_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        check_model(sys.argv[1])
    except FormatError as error:
        print(error)
        return FormatError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_main())
