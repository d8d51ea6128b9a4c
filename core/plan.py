"""A plan: one role of a model as plain data, for an engine that brings its own operators.

A graph of ONNX needs the package onnx to be read, and a model of a user's own is Python code that must not run on
another machine. A plan is neither: a JSON file that lists nodes in the order they run, small constants, where each
weight lies in the artifact's weight file, and what the role takes, returns and remembers. It is written by
compile/torch_plan.py and run by runtimes/torch_plan.py.

Reading checks everything that can be said without knowing the operators: every name is defined once and before it is
used, constants are as large as their shapes, numbers are in range. What the operators make of it is checked by the
engine, which has the closed table of them, and whether weights lie inside their file.
"""

import json
import math
import struct
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from portlm.artifact import MAX_FILE_BYTES, Manifest
from portlm.errors import FormatError
from portlm.files import MAX_JSON_BYTES, read_json, shown
from portlm.roles import MAX_DIMENSION, StateSpec, TensorSpec, Text, one_of

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "Constant",
    "Node",
    "Plan",
    "Weight",
    "has_code",
    "needs_plan",
    "read_plan",
    "to_bytes",
]

FORMAT, FORMAT_VERSION = "portlm-plan", 1
CHECKPOINT = ("config.json", "model.safetensors")

MAX_NODES = 2**17
MAX_TENSORS = 65_536  # weights, or constants, or inputs
MAX_VALUES = 64  # inputs, outputs or attributes of a node
MAX_RANK = 8
ITEM_BYTES = {"float32": 4, "int64": 8, "uint8": 1, "float16": 2, "bfloat16": 2}
INT64 = 2**63
FLOAT32_MAX = struct.unpack("<f", b"\xff\xff\x7f\x7f")[0]

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Operand = Annotated[str, Meta(max_length=256)]  # "" for an input that is absent
Dtype = Annotated[str, one_of(tuple(ITEM_BYTES))]
Shape = Annotated[tuple[Annotated[int, Meta(ge=0, le=MAX_DIMENSION)], ...], Meta(max_length=MAX_RANK)]
Ints = Annotated[tuple[int, ...], Meta(max_length=MAX_VALUES)]
Attribute = int | float | Text | Ints


class Weight(Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor in the weight file, in C order, little-endian."""

    dtype: Dtype
    shape: Shape
    offset: Annotated[int, Meta(ge=0, le=MAX_FILE_BYTES)]


class Constant(Struct, frozen=True, forbid_unknown_fields=True):
    """A small tensor, its elements in C order."""

    dtype: Annotated[str, one_of(("float32", "int64"))]
    shape: Shape
    values: tuple[int | float, ...]


class Node(Struct, frozen=True, forbid_unknown_fields=True):
    """One operator applied once.

    Attributes:
        operator: a standard one of ONNX, or "ai.portlm." and one of portlm's own.
        inputs: names; "" for one that is absent.
        outputs: names.
        attributes: by name.
    """

    operator: Name
    inputs: Annotated[tuple[Operand, ...], Meta(max_length=MAX_VALUES)]
    outputs: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=MAX_VALUES)]
    attributes: Annotated[dict[Name, Attribute], Meta(max_length=MAX_VALUES)] = {}


class Plan(Struct, frozen=True, forbid_unknown_fields=True):
    """What a plan's file says, beside its format.

    Attributes:
        role: its name.
        profile: of the graph it was made from.
        weights_file: relative to the artifact.
        inputs: of one call, beside the state.
        outputs: of one call, beside the state.
        state: as in the manifest.
        weights: by name.
        constants: by name.
        nodes: in the order they run.
    """

    role: Text
    profile: Text
    weights_file: Text
    inputs: Annotated[tuple[TensorSpec, ...], Meta(max_length=MAX_TENSORS)]
    outputs: Annotated[tuple[TensorSpec, ...], Meta(max_length=MAX_TENSORS)]
    state: Annotated[tuple[StateSpec, ...], Meta(max_length=MAX_TENSORS)]
    weights: Annotated[dict[Name, Weight], Meta(max_length=MAX_TENSORS)]
    constants: Annotated[dict[Name, Constant], Meta(max_length=MAX_TENSORS)]
    nodes: Annotated[tuple[Node, ...], Meta(max_length=MAX_NODES)]

    def taken(self) -> tuple[TensorSpec | StateSpec, ...]:
        """Return what the role is given: its inputs, and then its states."""
        return (*self.inputs, *self.state)


def needs_plan(manifest: Manifest) -> bool:
    """Say whether the torch engine runs an artifact's graphs, unless it is told otherwise.

    There is no checkpoint of a known family, or the graphs keep their cache in 8 bits and the model's code would not.
    """
    return manifest.cache is not None or not _has_checkpoint(manifest)


def has_code(manifest: Manifest) -> bool:
    """Say whether portlm has the code of an artifact's model and the artifact all that it needs to run.

    That is a checkpoint or, where weights are quantized, config.json and the graphs' weights.
    """
    quantized = manifest.quantization is not None and manifest.model.family != "module"
    return _has_checkpoint(manifest) or (quantized and CHECKPOINT[0] in manifest.files)


def _has_checkpoint(manifest: Manifest) -> bool:
    return manifest.model.family != "module" and manifest.files.keys() >= set(CHECKPOINT)


def to_bytes(plan: Plan) -> bytes:
    """Return the content of a plan's file: the same bytes for the same plan.

    Raises:
        FormatError: it would be larger than a plan may be, or does not pass the checks of reading.
    """
    fields = msgspec.to_builtins(plan)
    try:
        text = json.dumps(
            {"format": FORMAT, "format_version": FORMAT_VERSION, **fields},
            ensure_ascii=False, allow_nan=False, separators=(",", ":"),
        )  # fmt: skip
    except ValueError as error:  # infinity or NaN
        raise FormatError(f"the plan of {plan.role} holds what JSON has no word for: {error}") from error
    raw = text.encode() + b"\n"
    if len(raw) > MAX_JSON_BYTES:
        raise FormatError(
            f"the plan of {plan.role} takes {len(raw)} bytes and {MAX_JSON_BYTES} are allowed: "
            "make large constants of the model parameters or buffers"
        )
    _check(plan, f"the plan of {plan.role}")
    return raw


def read_plan(path: str | Path) -> Plan:
    """Read and check a plan's file. That weights lie inside their file is for whoever opens that one.

    Raises:
        FormatError: it is missing, damaged, of another version, or says something that cannot be.
    """
    data = read_json(path)
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise FormatError(f"{path}: not a {FORMAT} file; compile again")
    version = data.pop("format_version", None)
    if type(version) is not int or version != FORMAT_VERSION:
        raise FormatError(
            f"{path}: format version {shown(version)}, this portlm reads {FORMAT_VERSION}; compile again"
        )
    try:
        plan = msgspec.convert(data, Plan)
    except msgspec.ValidationError as error:
        raise FormatError(f"{path}: {str(error)[:200]}; compile again") from error
    _check(plan, str(path))
    return plan


def _check(plan: Plan, where: str) -> None:
    def refuse(problem: str) -> FormatError:
        return FormatError(f"{where}: {problem}; compile again")

    defined: set[str] = set()

    def define(name: str) -> None:
        if name in defined:
            raise refuse(f"{shown(name)} is defined twice")
        defined.add(name)

    for spec in plan.taken():
        define(spec.name)
    for name, weight in plan.weights.items():
        define(name)
        if weight.offset % ITEM_BYTES[weight.dtype]:
            raise refuse(f"weight {shown(name)} does not begin where a {weight.dtype} can")
    for name, constant in plan.constants.items():
        define(name)
        if problem := _wrong_values(constant):
            raise refuse(f"constant {shown(name)} {problem}")
    for i, node in enumerate(plan.nodes):
        for name in node.inputs:
            if name and name not in defined:
                raise refuse(
                    f"node {i} ({shown(node.operator)}) reads {shown(name)}, which nothing before it computes"
                )
        for name in node.outputs:
            define(name)
    for name in (*(spec.name for spec in plan.outputs), *(s.output for s in plan.state if s.output)):
        if name not in defined:
            raise refuse(f"nothing computes the output {shown(name)}")


def _wrong_values(constant: Constant) -> str:
    size = math.prod(constant.shape)
    if len(constant.values) != size:
        return f"has {len(constant.values)} elements, its shape asks for {size}"
    kind: Any = int if constant.dtype == "int64" else float
    bound = INT64 - 1 if kind is int else FLOAT32_MAX
    for value in constant.values:
        if type(value) is not kind or not abs(value) <= bound:
            return f"holds {shown(value)}, which is no {constant.dtype}"
    return ""
