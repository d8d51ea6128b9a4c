"""GGUF, llama.cpp's file of a model: metadata, and tensors of plain or block-quantized numbers.

    "GGUF" | uint32 version | uint64 tensors | uint64 entries | entries | tensor infos | padding | data

All of it is little-endian. Every count, length and offset is compared with the size of the file before anything of
that size is read or allocated; tensors may neither overlap nor leave the file. The format is described in ggml's own
documentation (gguf.md); quantized blocks are widened by the package `gguf`, which llama.cpp's authors publish.
"""

import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from portlm.errors import FormatError, UsageError
from portlm.files import open_regular, shown

MAGIC = b"GGUF"
MAX_TENSORS = MAX_ENTRIES = 2**16
MAX_NAME_BYTES = 256
MAX_TEXT_BYTES = 2**24
MAX_ITEMS = 2**22  # of one array: a vocabulary or its merges
MAX_DIMS = 4

# GGUF's number of a type -> its name, the weights of a block, the bytes of a block.
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
}  # fmt: skip
_PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q", 12: "<d"}
_BOOL, _TEXT, _ARRAY = 7, 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies.

    Attributes:
        kind: the name of its type, as in TYPES.
        shape: of its numbers, the last one contiguous: a matrix is (out, in).
        start, nbytes: its place in the file.
    """

    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """A checked GGUF file.

    Attributes:
        path: of the file.
        entries: the metadata: int, float, bool, str, or a list of those.
        tensors: by name.
    """

    path: Path
    entries: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "GgufFile":
        """Read and check all but the numbers.

        Raises:
            FormatError: the file is missing, no GGUF, damaged, or of a version or type that is not read.
        """
        place = Path(path)
        with open_regular(place) as file:
            return cls(place, *_Parser(file, place).all())

    def raw(self, name: str) -> bytes:
        """Return the bytes of a tensor."""
        tensor = self.tensors[name]
        with open_regular(self.path) as file:
            file.seek(tensor.start)
            raw = file.read(tensor.nbytes)
        if len(raw) != tensor.nbytes:
            raise FormatError(f"{self.path} was truncated while it was read: import it again")
        return raw

    def numbers(self, name: str) -> np.ndarray:
        """Return a tensor in its shape: float16 and float32 as they are, all others in float32.

        bfloat16 is widened, which is exact; float64 is rounded.

        Raises:
            UsageError: the numbers are quantized and the package gguf is missing.
            FormatError: a number is too large for float32.
        """
        tensor, raw = self.tensors[name], self.raw(name)
        if tensor.kind == "BF16":
            values = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
        elif tensor.kind in _PLAIN:
            values = np.frombuffer(raw, _PLAIN[tensor.kind])
        else:
            values = _widened(raw, tensor)
        if tensor.kind == "F64":
            with np.errstate(over="ignore"):
                rounded = values.astype(np.float32)
            if np.isinf(rounded).sum() > np.isinf(values).sum():
                raise FormatError(f"{self.path}: tensor {shown(name)} holds a number too large for float32")
            values = rounded
        return values.reshape(tensor.shape)


def _widened(raw: bytes, tensor: GgufTensor) -> np.ndarray:
    """Return the numbers that quantized blocks stand for, in float32."""
    try:
        import gguf
    except ImportError as error:
        raise UsageError(
            f"weights in {tensor.kind} need the package gguf, which is not installed: pip install portlm[gguf]"
        ) from error
    kind = gguf.GGMLQuantizationType[tensor.kind]
    rows = np.frombuffer(raw, np.uint8).reshape(-1, tensor.nbytes // max(math.prod(tensor.shape[:-1]), 1))
    with np.errstate(over="ignore", invalid="ignore"):  # a damaged scale may be infinite
        widened: np.ndarray = gguf.quants.dequantize(rows, kind)
    return widened.astype(np.float32, copy=False)


class _Parser:
    """Reads a file from its beginning, never past its end."""

    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path = file, path
        self.size = os.fstat(file.fileno()).st_size
        self.place = 0

    def all(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        if self.size < 24 or self.take(4) != MAGIC:
            raise self.error("is no GGUF file")
        version = self.number("<I")
        if version not in (2, 3):
            if version in (2 << 24, 3 << 24):
                raise self.error("is big-endian, and only little-endian files are read")
            raise self.error(f"has version {version}, and this portlm reads 2 and 3")
        tensors, count = self.number("<Q"), self.number("<Q")
        if tensors > MAX_TENSORS or count > MAX_ENTRIES:
            raise self.error(f"claims {tensors} tensors and {count} entries, more than {MAX_TENSORS}")
        entries: dict[str, Any] = {}
        for _ in range(count):
            key = self.text(MAX_NAME_BYTES, "a key")
            if not key or key in entries:
                raise self.error(f"has the key {shown(key)} twice, or an empty one")
            entries[key] = self.value(self.number("<I"), key)
        alignment = entries.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 2**16 or alignment & (alignment - 1):
            raise self.error(
                f"has the alignment {shown(alignment)}, which is no power of two from 8 to 65536"
            )
        infos = [self.info() for _ in range(tensors)]
        start = -(-self.place // alignment) * alignment
        found: dict[str, GgufTensor] = {}
        for name, kind, shape, offset in infos:
            if name in found:
                raise self.error(f"has the tensor {shown(name)} twice")
            found[name] = self.placed(name, kind, shape, start, offset, alignment)
        end = start
        for name, tensor in sorted(found.items(), key=lambda item: item[1].start):
            if tensor.start < end:
                raise self.error(f"has the tensor {shown(name)} where another one is")
            end = tensor.start + tensor.nbytes
        return entries, found

    def error(self, what: str) -> FormatError:
        return FormatError(f"{self.path} {what}")

    def take(self, count: int) -> bytes:
        """Return so many bytes, which must be there."""
        if count > self.size - self.place:
            raise self.error(f"ends early: {count} bytes are missing from byte {self.place} on")
        raw = self.file.read(count)
        if len(raw) != count:
            raise self.error("was truncated while it was read: import it again")
        self.place += count
        return raw

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, longest: int, what: str) -> str:
        length = self.number("<Q")
        if length > longest:
            raise self.error(f"has {what} of {length} bytes, the limit is {longest}")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise self.error(f"has {what} that is not UTF-8") from error

    def value(self, kind: int, key: str) -> Any:
        """Return one entry's value."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _BOOL:
            return self.boolean(key)
        if kind == _TEXT:
            return self.text(MAX_TEXT_BYTES, f"under {shown(key)} a text")
        if kind != _ARRAY:
            raise self.error(f"has under {shown(key)} a value of the unknown type {kind}")
        inner, count = self.number("<I"), self.number("<Q")
        smallest = 8 if inner == _TEXT else 1
        if count > MAX_ITEMS or count * smallest > self.size - self.place:
            raise self.error(f"claims {count} items under {shown(key)}, which is more than it can hold")
        if inner in _NUMBERS:
            dtype = np.dtype(_NUMBERS[inner])
            return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        read: Callable[[], Any]
        if inner == _TEXT:
            read = lambda: self.text(MAX_TEXT_BYTES, f"under {shown(key)} a text")  # noqa: E731
        elif inner == _BOOL:
            read = lambda: self.boolean(key)  # noqa: E731
        else:
            raise self.error(f"has under {shown(key)} a list of the type {inner}, which is not read")
        return [read() for _ in range(count)]

    def boolean(self, key: str) -> bool:
        byte = self.take(1)[0]
        if byte > 1:
            raise self.error(f"has under {shown(key)} neither true nor false but {byte}")
        return bool(byte)

    def info(self) -> tuple[str, int, tuple[int, ...], int]:
        """Return what is said of a tensor: its name, type, shape and offset."""
        name = self.text(MAX_NAME_BYTES, "a tensor's name")
        dims = self.number("<I")
        if not 1 <= dims <= MAX_DIMS:
            raise self.error(
                f"gives the tensor {shown(name)} {dims} dimensions, and 1 to {MAX_DIMS} are allowed"
            )
        shape = tuple(self.number("<Q") for _ in range(dims))[::-1]
        return name, self.number("<I"), shape, self.number("<Q")

    def placed(
        self, name: str, number: int, shape: tuple[int, ...], start: int, offset: int, alignment: int
    ) -> GgufTensor:
        """Check where a tensor lies."""
        if number not in TYPES:
            known = ", ".join(kind for kind, _, _ in TYPES.values())
            raise self.error(f"keeps the tensor {shown(name)} in numbers of type {number}, known are {known}")
        kind, block, size = TYPES[number]
        count = math.prod(shape)
        if min(shape) < 1 or max(shape) >= 2**31 or shape[-1] % block:
            raise self.error(
                f"gives the tensor {shown(name)} the shape {list(shape)}, which {kind} cannot have"
            )
        nbytes = count // block * size
        if (
            offset % alignment
            or nbytes > self.size
            or offset > self.size
            or start + offset + nbytes > self.size
        ):
            raise self.error(
                f"places the tensor {shown(name)} at {offset} with {nbytes} bytes, which is not inside it"
            )
        return GgufTensor(kind, shape, start + offset, nbytes)
