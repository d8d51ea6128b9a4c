"""Looks at an ONNX file before any library does.

Only what portlm's exporter writes is accepted: its operators with the inputs, outputs and attributes that it gives them
(compile/forms.py), values that are computed once and before they are read, weights in one sibling file inside that
file's bounds, payloads as large as their shapes, and not one byte that is left unread (compile/onnx_reader.py). The
general checkers come last, because they and the runtimes behind them have crashed on graphs that this list refuses.

Who calls this: export and lowering, on every file they write, and compile/isolated.py on a graph from elsewhere before
this process hands it to anybody. The check itself needs no package for ONNX.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from portlm.compile.check_quantized import together, wrong_sizes
from portlm.compile.forms import (
    ALIGNMENT,
    CASTS,
    CONTRIB_OPS,
    FUSED_OPS,
    GROUPED,
    IR_VERSION,
    OPSET,
    PORTABLE_OPS,
    WHOLE_OPS,
    Form,
    Operand,
    Setting,
)
from portlm.compile.onnx_reader import MalformedError, Message, read_onnx
from portlm.errors import FormatError
from portlm.files import open_regular, safe_join
from portlm.ops.spec import DOMAIN, DOMAIN_VERSION
from portlm.plan import MAX_RANK
from portlm.roles import MAX_DIMENSION

if TYPE_CHECKING:
    import onnx

MAX_GRAPH_BYTES = 64 * 2**20  # without weights: 1024 layers take 8 MB
MAX_NODES = 2**17
MAX_TENSORS = 65_536  # weights, inputs or outputs
MAX_NAME = 256  # characters
MAX_VALUES_PER_NODE = 64  # inputs, outputs or attributes
MAX_ENTRIES = 16  # of metadata, or operator sets

CONTRIB = "com.microsoft"
OPERATORS: dict[str, dict[str, Form]] = {"": PORTABLE_OPS, DOMAIN: FUSED_OPS, CONTRIB: CONTRIB_OPS}
OPSETS = {"": OPSET, DOMAIN: DOMAIN_VERSION, CONTRIB: 1}
# Numbers of ONNX: types of elements, places of weights, types of attributes and the fields with their values.
FLOAT, UINT8, INT8, INT64, FLOAT16, BFLOAT16 = 1, 2, 3, 7, 10, 16
ITEM_BYTES = {FLOAT: 4, UINT8: 1, INT64: 8, FLOAT16: 2, BFLOAT16: 2}  # of a weight
KINDS = {
    FLOAT: "float32", INT64: "int64", UINT8: "uint8", INT8: "int8", FLOAT16: "float16", BFLOAT16: "bfloat16",
}  # fmt: skip
IN_FILE_ALONE = ("uint8", "float16", "bfloat16")  # weights of these lie in the weight file
SMALL = ("int8", *IN_FILE_ALONE)  # of few operands: weights, and a cache
IN_FILE, IN_GRAPH = 1, 0
ATTRIBUTE_TYPES: dict[type, tuple[int, str]] = {
    float: (1, "f"),
    int: (2, "i"),
    str: (3, "s"),
    tuple: (7, "ints"),
}


def check_model(path: str | Path) -> "onnx.ModelProto":
    """Parse a graph and return it if it is one that portlm could have written.

    Args:
        path: the .onnx file; its weight file lies beside it.

    Returns:
        The model, its weights not loaded.

    Raises:
        FormatError: the file is missing, truncated, too large, or holds anything that the exporter never writes.
    """
    import onnx

    path = Path(path)
    raw = read_graph(path)
    examine(raw, path)
    model = onnx.ModelProto.FromString(raw)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise _refused(path, error) from error
    return model


def read_graph(path: Path) -> bytes:
    """Return the content of a .onnx file.

    Raises:
        FormatError: it is missing or too large.
    """
    with open_regular(path) as file:
        raw = file.read(MAX_GRAPH_BYTES + 1)
    if len(raw) > MAX_GRAPH_BYTES:
        raise FormatError(f"{path}: larger than the {MAX_GRAPH_BYTES} bytes a graph may have")
    return raw


def examine(raw: bytes, path: Path) -> Message:
    """Return what a .onnx file says if portlm could have written it. No other library looks at it.

    Args:
        raw: what the file holds.
        path: where it lies, beside its weight file.

    Raises:
        FormatError: as check_model.
    """
    try:
        model = read_onnx(raw)
        _check_structure(model)
        _check_weights(model.graph, path)
        _check_nodes(model)
    except (MalformedError, _RefusedError) as error:
        raise _refused(path, error) from error
    return model


def _refused(path: Path, error: Exception) -> FormatError:
    return FormatError(f"{path}: {str(error).splitlines()[0]}; export again from the checkpoint")


class _RefusedError(Exception):
    """Something the exporter never writes."""


def _check_structure(model: Message) -> None:
    graph = model.graph
    _text(graph.name)
    _text(model.producer_name)
    if model.ir_version != IR_VERSION:
        raise _RefusedError(f"is of version {model.ir_version} of ONNX's format, export writes {IR_VERSION}")
    if (
        len(graph.node) > MAX_NODES
        or max(map(len, (graph.initializer, graph.input, graph.output))) > MAX_TENSORS
    ):
        raise _RefusedError("has too many nodes, weights, inputs or outputs")
    if max(len(model.opset_import), len(model.metadata_props)) > MAX_ENTRIES:
        raise _RefusedError("has too many operator sets or metadata")
    for entry in model.metadata_props:
        _text(entry.key)
        _text(entry.value)
    for opset in model.opset_import:
        if OPSETS.get(_text(opset.domain)) != opset.version:
            raise _RefusedError(f"asks for operator set {opset.domain!r} {opset.version}")
    for value in (*graph.input, *graph.output):
        _check_value(value)


def _check_value(value: Message) -> None:
    """An input or output of the graph: its type, and sizes that are numbers or named."""
    kind, name = value.type.tensor_type, _text(value.name)
    if not name or kind.elem_type not in (FLOAT, INT64, INT8) or "shape" not in kind.present:
        raise _RefusedError(f"value {name!r} has a type that no graph of ours has")
    if len(kind.shape.dim) > MAX_RANK:
        raise _RefusedError(f"value {name!r} has {len(kind.shape.dim)} dimensions")
    for size in kind.shape.dim:
        named = size.present == {"dim_param"} and _text(size.dim_param)
        if not named and (size.present != {"dim_value"} or not 1 <= size.dim_value <= MAX_DIMENSION):
            raise _RefusedError(f"value {name!r} has a dimension that is neither a size nor a name")


class _Values:
    """The values of a graph that are known so far: the type of each, and those that are constants in the graph."""

    def __init__(self, graph: Message):
        self.kinds: dict[str, str] = {}
        self.constants: dict[str, Message] = {}
        self.shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        for value in graph.input:
            self.define(value.name, KINDS[value.type.tensor_type.elem_type])
        for tensor in graph.initializer:
            self.define(tensor.name, KINDS[tensor.data_type])
            if tensor.data_location != IN_FILE:
                self.constants[tensor.name] = tensor

    def define(self, name: str, kind: str) -> None:
        if name in self.kinds:
            raise _RefusedError(f"value {name!r} is there twice")
        self.kinds[_text(name)] = kind


def _check_nodes(model: Message) -> None:
    graph, domains = model.graph, {opset.domain for opset in model.opset_import}
    values, names = _Values(graph), set[str]()
    given = set(values.kinds)
    for node in graph.node:
        name, domain, operator = _text(node.name), _text(node.domain), _text(node.op_type)
        if name in names:
            raise _RefusedError(f"two nodes are called {name!r}")
        names.add(name)
        form = OPERATORS[domain].get(operator) if domain in domains else None
        if CONTRIB in domains and not domain and values.kinds.get(next(iter(node.input), "")) == "int64":
            form = WHOLE_OPS.get(operator, form)
        if form is None:
            raise _RefusedError(f"operator {operator!r} of {domain!r} is not one of ours (node {name!r})")
        if max(len(node.input), len(node.output), len(node.attribute)) > MAX_VALUES_PER_NODE:
            raise _RefusedError(f"node {name!r} has too many inputs, outputs or attributes")
        _check_attributes(node, form)
        if form is PORTABLE_OPS["Cast"]:
            form = CASTS.get(node.attribute[0].i)
            if form is None:
                raise _RefusedError(f"node {name!r} makes what no Cast of ours makes")
        same = _check_inputs(node, form, values)
        if operator == "GroupQueryAttention" and not _is_grouped(node):
            raise _RefusedError(f"node {name!r} has other inputs than lowering gives it")
        if problem := wrong_sizes(node, values.shapes):
            raise _RefusedError(f"node {name!r} {problem}")
        for place, (value, wanted) in enumerate(_operands(node, node.output, form.outputs, "outputs")):
            if value:
                values.define(value, wanted.kind or same)
            elif not wanted.absent:
                raise _RefusedError(f"node {name!r} lacks output {place}")
        if form is PORTABLE_OPS["Concat"] and (shape := together(node, values.shapes)):
            values.shapes[node.output[0]] = shape
        if form is PORTABLE_OPS["Reshape"] and node.input[0] in values.shapes:
            target = np.frombuffer(values.constants[node.input[1]].raw_data, "<i8").tolist()
            if math.prod(target) == math.prod(values.shapes[node.input[0]]) and min(target, default=1) > 0:
                values.shapes[node.output[0]] = tuple(target)
    results: set[str] = set()
    for value in graph.output:
        if value.name in given or value.name not in values.kinds or value.name in results:
            raise _RefusedError(f"no node computes the output {value.name!r}, or it is there twice")
        if values.kinds[value.name] != KINDS[value.type.tensor_type.elem_type]:
            raise _RefusedError(
                f"the output {value.name!r} is {values.kinds[value.name]} and said to be otherwise"
            )
        results.add(value.name)


def _is_grouped(node: Message) -> bool:
    """Whether GroupQueryAttention has the inputs that go with its attributes."""
    rotates = next((a.i for a in node.attribute if a.name == "do_rotary"), None)
    return "".join("1" if name else "0" for name in node.input) in GROUPED.get(rotates, ())


def _operands(
    node: Message, names: Sequence[str], wanted: Sequence[Operand], what: str
) -> Iterator[tuple[str, Operand]]:
    """Yield the inputs or outputs of a node beside what its operator's form says of each, if their number is right."""
    least = sum(not operand.optional for operand in wanted)
    most = MAX_VALUES_PER_NODE if wanted[-1].many else len(wanted)
    if not least <= len(names) <= most:
        takes = f"{least}" if least == most else f"{least} to {most}"
        raise _RefusedError(f"node {node.name!r} has {len(names)} {what}, {node.op_type} has {takes}")
    for place, name in enumerate(names):
        operand = wanted[min(place, len(wanted) - 1)]
        if name and operand.absent:
            raise _RefusedError(f"node {node.name!r} has {name!r} where export leaves {what} {place} out")
        yield name, operand


def _check_inputs(node: Message, form: Form, values: _Values) -> str:
    """Check what a node takes; return the type of its operands that may be of either."""
    same = ""
    for place, (value, wanted) in enumerate(_operands(node, node.input, form.inputs, "inputs")):
        if wanted.absent:
            continue
        if not value:
            if wanted.optional and place < len(node.input) - 1:
                continue
            raise _RefusedError(f"node {node.name!r} lacks input {place}")
        kind = values.kinds.get(value)
        if kind is None:
            raise _RefusedError(
                f"node {node.name!r} reads {_text(value)!r}, which nothing before it computes"
            )
        if not wanted.kind:
            same = same or kind
        if kind not in (wanted.kind or same).split("|") or (
            kind in SMALL and not (wanted.kind or wanted.small)
        ):
            raise _RefusedError(f"node {node.name!r} has an input {place} of type {kind}")
        if wanted.constant:
            _check_constant(node, value, wanted.constant, values)
    return same


def _check_constant(node: Message, value: str, bounds: tuple[int, int], values: _Values) -> None:
    """Sizes or axes, which decide what a node does: a short list in the graph itself."""
    tensor = values.constants.get(value)
    if tensor is None or len(tensor.dims) > 1:
        raise _RefusedError(f"node {node.name!r} needs {value!r} as a list of numbers in the graph")
    numbers = np.frombuffer(tensor.raw_data, "<i8")
    if len(numbers) > MAX_VALUES_PER_NODE or not all(bounds[0] <= number <= bounds[1] for number in numbers):
        raise _RefusedError(f"node {node.name!r} has impossible numbers in {value!r}")
    if node.op_type == "Split" and len(numbers) != len(node.output):
        raise _RefusedError(f"node {node.name!r} has {len(node.output)} outputs and sizes for {len(numbers)}")


def _check_attributes(node: Message, form: Form) -> None:
    found: dict[str, Any] = {}
    for attribute in node.attribute:
        wanted = form.attributes.get(_text(attribute.name))
        if wanted is None or attribute.name in found:
            raise _RefusedError(f"node {node.name!r} has the attribute {attribute.name!r}")
        kind, payload = ATTRIBUTE_TYPES[wanted.kind]
        fields = attribute.present - {"name", "type", payload}
        if attribute.type != kind or fields or not _fits(attribute, wanted):
            raise _RefusedError(f"node {node.name!r} has a wrong {attribute.name!r}")
        found[attribute.name] = getattr(attribute, payload)
    if missing := [name for name, s in form.attributes.items() if s.required and name not in found]:
        raise _RefusedError(f"node {node.name!r} lacks the attribute {missing[0]!r}")
    if node.op_type == "Split" and (len(node.input) == 1) != ("num_outputs" in found):
        raise _RefusedError(f"node {node.name!r} must say the sizes of its parts or their number")
    if found.get("num_outputs", len(node.output)) != len(node.output):
        raise _RefusedError(
            f"node {node.name!r} has {len(node.output)} outputs and says {found['num_outputs']}"
        )


def _fits(attribute: Message, wanted: Setting) -> bool:
    """Whether an attribute of the right type has a value that its operator may have."""
    if wanted.kind is int:
        return bool(wanted.values[0] <= attribute.i <= wanted.values[1])
    if wanted.kind is float:
        return math.isfinite(attribute.f)
    if wanted.kind is str:
        return attribute.s in [value.encode() for value in wanted.values]  # type: ignore[union-attr]
    return sorted(attribute.ints) == list(range(len(attribute.ints))) and len(attribute.ints) <= MAX_RANK


def _check_weights(graph: Message, path: Path) -> None:
    locations: dict[str, int] = {}  # file name -> size; one at most
    for tensor in graph.initializer:
        name, item = _text(tensor.name), ITEM_BYTES.get(tensor.data_type)
        if item is None:
            raise _RefusedError(f"weight {name!r} is of a type that no graph of ours has")
        if len(tensor.dims) > MAX_RANK or not all(0 <= d <= MAX_DIMENSION for d in tensor.dims):
            raise _RefusedError(f"weight {name!r} has an impossible shape")
        size = math.prod(tensor.dims) * item
        if (kind := KINDS[tensor.data_type]) in IN_FILE_ALONE and tensor.data_location != IN_FILE:
            raise _RefusedError(f"weight {name!r} is {kind} and not in the weight file")
        if tensor.data_location == IN_FILE:
            _check_external(tensor, size, path, locations)
        elif tensor.data_location != IN_GRAPH or len(tensor.raw_data) != size or tensor.external_data:
            raise _RefusedError(
                f"weight {name!r} has {len(tensor.raw_data)} bytes, its shape asks for {size}"
            )


def _check_external(tensor: Message, size: int, path: Path, locations: dict[str, int]) -> None:
    name, entries = tensor.name, {}
    for entry in tensor.external_data:
        entries[_text(entry.key)] = _text(entry.value)
    if (
        tensor.raw_data
        or tensor.data_type == INT64
        or len(entries) != len(tensor.external_data)
        or entries.keys() != {"location", "offset", "length"}
    ):
        raise _RefusedError(
            f"weight {name!r} does not say float32 or less, location, offset and length, each once"
        )
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
    if offset % ALIGNMENT:
        raise _RefusedError(f"weight {name!r} begins at byte {offset}, which is no multiple of {ALIGNMENT}")
    if offset + length > locations[location]:
        raise _RefusedError(
            f"weight {name!r} ends at byte {offset + length} of {location}, which has {locations[location]}"
        )


def _text(value: str) -> str:
    """A name of bounded length."""
    if len(value) > MAX_NAME:
        raise _RefusedError(f"a name is longer than {MAX_NAME} characters: {value[:80]!r}")
    return value


def _decimal(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 15:
        raise _RefusedError(f"offset or length is {text!r}")
    return int(text)
