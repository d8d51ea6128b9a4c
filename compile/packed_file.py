"""Writes a packed file, byte for byte as docs/packed.md says; csrc/run/packed_file.cpp reads it."""

import hashlib
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from portlm.artifact import FileEntry
from portlm.extension import load_extension
from portlm.files import atomic_file, check_space
from portlm.large_parts import in_large_parts
from portlm.ops.half import pack_array
from portlm.ops.quantized import Layout
from portlm.panels import in_panels
from portlm.roles import StateSpec, TensorSpec

MAGIC, ORDER, VERSION = b"\x89PORTLM\n", 0x01020304, 2
ALIGNMENT, HEADER = 64, 256
NONE = 0xFFFFFFFF
SYMBOLS = {"batch": 1, "sequence": 2, "past": 4, "kept": 8}
SUM = "past + sequence"
DTYPES, QUANTIZED = {"float32": 1, "int64": 2}, {4: 4, 8: 5}
PANELS = {"float32": 6, "float16": 8, "bfloat16": 9}
STATE_DTYPES = {"float32": 1, "int8": 7}
TILES = 1  # the layout of quantized matrices
INPUT, STATE, WEIGHT, COMPUTED = 1, 2, 3, 4
OPCODES = {
    "embedding": 1, "add": 2, "view": 3, "slice": 4, "concat": 5, "rows": 6, "linear": 7, "layer_norm": 8,
    "add_layer_norm": 9, "rms_norm": 10, "add_rms_norm": 11, "swiglu": 12, "rotary": 13, "attention": 14,
    "heads": 15, "quantized_attention": 16, "linear_a8": 17,
}  # fmt: skip

Shape = Sequence[int | str]


@dataclass(frozen=True)
class Tensor:
    """A weight.

    Attributes:
        name: of the parameter or buffer.
        shape: sizes.
        read: returns it as an array of float32, of the bits of a matrix of 16 bits, or of the bytes of a quantized one;
            called once, when it is written.
        panels: a matrix that is written in panels of 64 rows.
        layout: of a quantized matrix.
        dtype: of the elements of one that is not quantized.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    panels: bool = False
    layout: Layout | None = None
    dtype: str = "float32"

    @property
    def nbytes(self) -> int:
        """How many it takes in the file."""
        if self.layout is not None:
            return self.layout.size
        item = 4 if self.dtype == "float32" else 2
        return item * math.prod((_aligned(self.shape[0]), self.shape[1]) if self.panels else self.shape)

    def numbers(self) -> tuple[int, ...]:
        """Dtype, rank, bits, zero points and group, as the table has them."""
        if self.layout is None:
            return PANELS[self.dtype] if self.panels else DTYPES["float32"], len(self.shape), 0, 0, 0
        bits, has_zeros, group = self.layout.bits, self.layout.has_zeros, self.layout.group
        return QUANTIZED[bits], len(self.shape), bits, has_zeros, group

    def content(self) -> np.ndarray:
        """What is written."""
        array = self.read()
        if self.dtype != "float32":
            array = pack_array(array)
        elif self.layout is None:
            array = array.reshape(self.shape)
            array = np.ascontiguousarray(in_panels(array) if self.panels else array, "<f4")
        assert array.nbytes == self.nbytes
        return array.reshape(-1).view(np.uint8)


@dataclass(frozen=True)
class Value:
    """A value of a role; dtype and shape of a computed one, the place of a weight's tensor."""

    name: str
    kind: int
    dtype: str = ""
    shape: tuple[int | str, ...] = ()
    tensor: int = 0


@dataclass(frozen=True)
class Step:
    """One call of a kernel; inputs and outputs are places of values, NONE for an input that is absent."""

    name: str
    operation: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    ints: tuple[int, ...] = ()
    reals: tuple[float, ...] = ()


@dataclass(frozen=True)
class Program:
    """A role; `results` are the places of the values that its outputs are."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[StateSpec, ...]
    values: tuple[Value, ...]
    steps: tuple[Step, ...]
    results: tuple[int, ...]


def unwritable(spec: TensorSpec | StateSpec) -> str:
    """Say what of an input, output or state has no form in a packed file, or ""."""
    if spec.dtype not in (STATE_DTYPES if isinstance(spec, StateSpec) else DTYPES):
        return f"is of type {spec.dtype}"
    if isinstance(spec, StateSpec) and (spec.initial, spec.update) != ("empty", "append"):
        return f"begins {spec.initial} and has the update {spec.update}, not empty and append"
    for dim in spec.shape:
        if isinstance(dim, str) and not _symbols(dim):
            return f"has the dimension {dim}, which is none of {', '.join(SYMBOLS)} and {SUM}"
    return ""


def write_packed(
    path: Path, programs: Sequence[Program], tensors: Sequence[Tensor], vocabulary: int, context: int
) -> FileEntry:
    """Write a packed file atomically; return size and sha256 of what was written.

    Raises:
        ExtensionError: portlm's kernels, which pack the matrices and would run the file, are not built.
        StorageError: the disk is full or refuses.
    """
    load_extension()
    tables = _Tables()
    for program in programs:
        tables.add_program(program)
    begins, end = tables.place(tensors)
    head = tables.to_bytes(end, begins, vocabulary, context)
    check_space(path, end)
    digest, position = hashlib.sha256(head), len(head)
    with atomic_file(path, end) as file, in_large_parts(file) as parts:
        parts.write(head)
        for tensor, begin in zip(tensors, begins, strict=True):
            content = tensor.content()
            for part in (bytes(begin - position), content.data):
                parts.write(part)
                digest.update(part)
            position = begin + content.nbytes
    return FileEntry(end, digest.hexdigest())


class _Tables:
    """The tables in the order in which they lie in the file, but for tensors as records."""

    def __init__(self) -> None:
        self._names, self._name_of = bytearray(), dict[str, bytes]()
        self._dims, self._dims_of = bytearray(), dict[tuple[int | str, ...], int]()
        self._tensors: list[Tensor] = []
        self._roles, self._specs, self._values = bytearray(), bytearray(), bytearray()
        self._steps, self._operands, self._ints, self._reals = (bytearray() for _ in range(4))

    def add_program(self, program: Program) -> None:
        p = program
        counts = (len(p.inputs), len(p.outputs), len(p.states), len(p.values), len(p.steps))
        self._roles += self._name(p.name) + struct.pack("<8I", *counts, 0, 0, 0)
        for place, spec in enumerate(p.inputs):
            self._spec(spec, "", place, 0, spec.below or 0)
        for spec, place in zip(p.outputs, p.results, strict=True):
            self._spec(spec, "", place, 0, 0)
        for place, state in enumerate(p.states, len(p.inputs)):
            self._spec(state, state.output, place, 1, state.below or 0)
        for value in p.values:
            self._values += self._name(value.name) + struct.pack(
                "<4B3I",
                value.kind, DTYPES.get(value.dtype, 0), len(value.shape), 0,
                self._shape(value.shape), value.tensor, 0,
            )  # fmt: skip
        for step in p.steps:
            lists = (step.inputs, step.outputs, step.ints, step.reals)
            sizes = (OPCODES[step.operation], *map(len, lists), 0, 0, 0)
            self._steps += self._name(step.name) + struct.pack("<8I", *sizes)
            self._operands += struct.pack(
                f"<{len(step.inputs) + len(step.outputs)}I", *step.inputs, *step.outputs
            )
            self._ints += struct.pack(f"<{len(step.ints)}q", *step.ints)
            self._reals += struct.pack(f"<{len(step.reals)}d", *step.reals)

    def place(self, tensors: Sequence[Tensor]) -> tuple[list[int], int]:
        """Find the place of each tensor; return these, and where the file ends."""
        self._tensors = list(tensors)
        for tensor in tensors:
            self._name(tensor.name)
            self._shape(tensor.shape)
        *_, (begin, size) = self._places()
        end, begins = begin + size, []
        for tensor in tensors:
            begins.append(_aligned(end))
            end = begins[-1] + tensor.nbytes
        return begins, end

    def to_bytes(self, end: int, begins: Sequence[int], vocabulary: int, context: int) -> bytes:
        """Return header and tables."""
        records = bytearray()
        for tensor, begin in zip(self._tensors, begins, strict=True):
            numbers = (*tensor.numbers(), self._shape(tensor.shape), 0, begin, tensor.nbytes)
            records += self._name(tensor.name) + struct.pack("<4B3I2Q", *numbers)
        places = self._places()
        layout = TILES if any(tensor.layout for tensor in self._tensors) else 0
        header = struct.pack("<8sIIQ3I28x", MAGIC, ORDER, VERSION, end, layout, vocabulary, context)
        items = (1, 16, 40, 40, 40, 24, 40, 4, 8, 8)
        for (begin, size), item in zip(places, items, strict=True):
            header += struct.pack("<QQ", begin, size // item)
        raw = bytearray(header.ljust(HEADER, b"\0"))
        for (begin, _), table in zip(places, self._lists(records), strict=True):
            raw += bytes(begin - len(raw)) + table
        return bytes(raw)

    def _lists(self, tensors: bytes | bytearray) -> tuple[bytes | bytearray, ...]:
        return (
            self._names, self._dims, tensors, self._roles, self._specs, self._values, self._steps,
            self._operands, self._ints, self._reals,
        )  # fmt: skip

    def _places(self) -> list[tuple[int, int]]:
        """Begin and bytes of every table."""
        found, end = [], HEADER
        for table in self._lists(bytes(40 * len(self._tensors))):
            found.append((_aligned(end), len(table)))
            end = found[-1][0] + len(table)
        return found

    def _spec(self, spec: TensorSpec | StateSpec, output: str, value: int, state: int, below: int) -> None:
        dtype = (STATE_DTYPES if state else DTYPES)[spec.dtype]
        self._specs += (
            self._name(spec.name)
            + self._name(output)
            + struct.pack(
                "<I4B2IQ", value, dtype, len(spec.shape), state, state, self._shape(spec.shape), 0, below
            )
        )

    def _name(self, name: str) -> bytes:
        if name not in self._name_of:
            raw = name.encode()
            self._name_of[name] = struct.pack("<2I", len(self._names), len(raw))
            self._names += raw
        return self._name_of[name]

    def _shape(self, shape: Shape) -> int:
        """Return the place of a shape's first dim."""
        key = tuple(shape)
        if not key:
            return 0
        if key not in self._dims_of:
            self._dims_of[key] = len(self._dims) // 16
            for size in key:
                if isinstance(size, int):
                    self._dims += struct.pack("<qII", size, 0, 0)
                else:
                    self._dims += struct.pack("<qII", 0, _symbols(size), 0)
        return self._dims_of[key]


def _symbols(text: str) -> int:
    """The bits of a symbol or of the one sum that there is; 0 for any other."""
    if sorted(text.split(" + ")) == sorted(SUM.split(" + ")):
        return SYMBOLS["past"] | SYMBOLS["sequence"]
    return SYMBOLS.get(text, 0)


def _aligned(place: int) -> int:
    return -(-place // ALIGNMENT) * ALIGNMENT
