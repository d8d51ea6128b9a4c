"""Looks at an ONNX file before any library does more than parse it.

Only what portlm's exporter writes is accepted: its operators with its attributes, weights in one sibling file
inside that file's bounds, payloads as large as their shapes. The general checkers come last, because they and the
runtimes behind them have crashed on graphs that this list refuses.

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
from google.protobuf.message import DecodeError, Message
from onnx import AttributeProto, TensorProto

from portlm.compile.forms import CONTRIB_OPS, FUSED_OPS, PORTABLE_OPS
from portlm.compile.graph import OPSET
from portlm.errors import FormatError
from portlm.files import open_regular, safe_join
from portlm.ops.spec import DOMAIN, DOMAIN_VERSION

MAX_GRAPH_BYTES = 64 * 2**20  # without weights: 1024 layers take 8 MB
MAX_NODES = 2**17
MAX_INITIALIZERS = 65_536
MAX_RANK = 8
MAX_DIMENSION = 2**31
MAX_NAME = 256  # characters
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

# The fields that the exporter sets, by message; any other is refused, known to us or not.
FIELDS = {
    "ModelProto": {"ir_version", "opset_import", "producer_name", "graph", "metadata_props"},
    "GraphProto": {"name", "input", "output", "initializer", "node"},
    "NodeProto": {"name", "domain", "op_type", "input", "output", "attribute"},
    "AttributeProto": {"name", "type", "i", "f", "s", "ints"},
    "TensorProto": {"name", "dims", "data_type", "raw_data", "data_location", "external_data"},
}

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
    _check_fields(model)
    _check_fields(graph)
    _text(graph.name)
    if len(graph.node) > MAX_NODES or len(graph.initializer) > MAX_INITIALIZERS:
        raise _RefusedError("has too many nodes or weights")
    for opset in model.opset_import:
        if OPSETS.get(_text(opset.domain)) != opset.version:
            raise _RefusedError(f"asks for operator set {opset.domain!r} {opset.version}")
    for value in (*graph.input, *graph.output):
        kind, name = value.type.tensor_type, _text(value.name)
        if kind.elem_type not in ITEM_BYTES or len(kind.shape.dim) > MAX_RANK:
            raise _RefusedError(f"value {name!r} has a type or rank that no graph of ours has")


def _check_fields(message: Message) -> None:
    kind = message.DESCRIPTOR.name
    for field, _ in message.ListFields():
        if field.name not in FIELDS[kind]:
            raise _RefusedError(f"a {kind} has the field {field.name}, which export never writes")


def _check_nodes(graph: onnx.GraphProto) -> None:
    names: set[str] = set()
    for node in graph.node:
        _check_fields(node)
        name, domain, operator = _text(node.name), _text(node.domain), _text(node.op_type)
        if name in names:
            raise _RefusedError(f"two nodes are called {name!r}")
        names.add(name)
        allowed = OPERATORS.get(domain, {}).get(operator)
        if allowed is None:
            raise _RefusedError(f"operator {operator!r} of {domain!r} is not one of ours (node {name!r})")
        if max(len(node.input), len(node.output), len(node.attribute)) > MAX_VALUES_PER_NODE:
            raise _RefusedError(f"node {name!r} has too many inputs, outputs or attributes")
        for value in (*node.input, *node.output):
            _text(value)
        for attribute in node.attribute:
            _check_fields(attribute)
            if _text(attribute.name) not in allowed or attribute.type not in ATTRIBUTE_TYPES:
                raise _RefusedError(f"node {name!r} has the attribute {attribute.name!r}")
            if attribute.name == "num_outputs" and attribute.i != len(node.output):
                raise _RefusedError(f"node {name!r} has {len(node.output)} outputs and says {attribute.i}")


def _check_weights(graph: onnx.GraphProto, path: Path) -> None:
    locations: dict[str, int] = {}  # file name -> size; one at most
    for tensor in graph.initializer:
        _check_fields(tensor)
        name, item = _text(tensor.name), ITEM_BYTES.get(tensor.data_type)
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


def _check_external(tensor: TensorProto, size: int, path: Path, locations: dict[str, int]) -> None:
    name, entries = tensor.name, {_text(entry.key): _text(entry.value) for entry in tensor.external_data}
    if (
        tensor.raw_data
        or len(entries) != len(tensor.external_data)
        or entries.keys() != {"location", "offset", "length"}
    ):
        raise _RefusedError(f"weight {name!r} does not say location, offset and length, each once")
    location = entries["location"]
    if location not in locations:
        if locations or "/" in location:
            raise _RefusedError(f"weight {name!r} is in a second file or another folder: {location!r}")
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


def _text(value: str | bytes) -> str:
    """A name as text of bounded length. Where it is not UTF-8, protobuf hands out the bytes."""
    if not isinstance(value, str) or len(value) > MAX_NAME:
        raise _RefusedError(f"a name is not text, or longer than {MAX_NAME} characters: {value[:80]!r}")
    return value


def _decimal(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 15:
        raise _RefusedError(f"offset or length is {text!r}")
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
