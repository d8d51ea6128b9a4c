"""Weights on disk: the safetensors format, read with every declared number checked before any value is.

The layout is 8 bytes of header length (little-endian), a JSON header, then the values end to end. What the
format's own library leaves open is closed here: limits on every count, no bytes without an owner, durable
writes that keep the file's mode (the library renames without fsync and turns every file into 0600).

Format: https://github.com/huggingface/safetensors#format
"""

import json
import math
import mmap
import os
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from typing import TYPE_CHECKING, Any

import numpy as np

from portlm.errors import FormatError, UsageError
from portlm.files import atomic_file, check_space, open_regular, parse_json, shown

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 65_536
MAX_RANK = 8
MAX_DIM = 2**31
MAX_NAME_BYTES = 256

# safetensors name -> (bytes per element, numpy dtype or None where numpy has no such type, torch dtype)
_DTYPES: dict[str, tuple[int, str | None, str]] = {
    "BOOL": (1, "|b1", "bool"),
    "U8": (1, "|u1", "uint8"),
    "I8": (1, "|i1", "int8"),
    "U16": (2, "<u2", "uint16"),
    "I16": (2, "<i2", "int16"),
    "F16": (2, "<f2", "float16"),
    "BF16": (2, None, "bfloat16"),
    "U32": (4, "<u4", "uint32"),
    "I32": (4, "<i4", "int32"),
    "F32": (4, "<f4", "float32"),
    "U64": (8, "<u8", "uint64"),
    "I64": (8, "<i8", "int64"),
    "F64": (8, "<f8", "float64"),
}
_FROM_NUMPY = {numpy_name: name for name, (_, numpy_name, _) in _DTYPES.items() if numpy_name is not None}
_FROM_TORCH = {f"torch.{torch_name}": name for name, (_, _, torch_name) in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in its file.

    Attributes:
        dtype: the safetensors name, such as "F32".
        shape: the dimensions, () for a scalar.
        start: offset of the first byte, from the beginning of the file.
        end: offset after the last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.end - self.start


def save_tensors(
    path: str | os.PathLike[str],
    tensors: "Mapping[str, np.ndarray | torch.Tensor]",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors as one safetensors file, streamed one tensor at a time and durable when this returns.

    The same tensors give the same bytes whatever the order of the mapping: the widest elements come first,
    then by name, so that every tensor is aligned to its element. Replacing a file that is memory-mapped is
    safe, also when the tensors are views of that mapping. transformers expects the metadata {"format": "pt"}.

    Args:
        path: the file to create or replace; its mode is kept.
        tensors: numpy arrays or torch tensors on any device. Shared memory is written in full each time.
        metadata: text to put into the header.

    Raises:
        UsageError: a name, dtype or shape that the format or its limits do not allow.
        StorageError: the disk is full or refuses the write; the old file is untouched.
    """
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = _checked_metadata(metadata)
    described = {name: _describe(name, value) for name, value in tensors.items()}
    order = sorted(described, key=lambda name: (-_DTYPES[described[name][0]][0], name))
    if len(order) > MAX_TENSORS:
        raise UsageError(
            f"{path}: {len(order)} tensors are too many for one file, the limit is {MAX_TENSORS}"
        )
    offset = 0
    for name in order:
        dtype, shape = described[name]
        end = offset + math.prod(shape) * _DTYPES[dtype][0]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER_BYTES:
        raise UsageError(f"{path}: the header takes {len(raw)} bytes and {MAX_HEADER_BYTES} are allowed")
    total = 8 + len(raw) + offset
    check_space(path, total)
    with atomic_file(path, need=total) as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name in order:
            file.write(_bytes_of(tensors[name]))


def read_header(path: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """Read and check the header. No value is read.

    Returns:
        The tensors in the order of their bytes.

    Raises:
        FormatError: the file is missing or truncated, or a number in it contradicts another or passes a
            limit.
    """
    with open_regular(path) as file:
        return _read_header(file, str(path))[0]


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the header's text, {} when there is none, after the checks of `read_header`.

    Raises:
        FormatError: as `read_header`.
    """
    with open_regular(path) as file:
        return _read_header(file, str(path))[1]


def load_numpy(path: str | os.PathLike[str], bfloat16: np.dtype | None = None) -> dict[str, np.ndarray]:
    """Map a file into memory and return its tensors as read-only arrays.

    Nothing is copied, with one exception: numpy has no bfloat16, so BF16 comes back as float32, which holds
    each of its values exactly, unless the caller has a type for it.

    Args:
        path: the file.
        bfloat16: a type of 2 bytes for BF16, such as that of ml_dtypes.

    Raises:
        FormatError: as `read_header`.
    """
    with open_regular(path) as file:
        infos, _ = _read_header(file, str(path))
        size = os.fstat(file.fileno()).st_size
        try:
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise FormatError(f"{path} cannot be mapped into memory: {error}") from error
    arrays = {}
    for name, info in infos.items():
        numpy_name = _DTYPES[info.dtype][1] or "<u2"
        array = np.ndarray(info.shape, numpy_name, mapped, info.start)
        if info.dtype == "BF16" and bfloat16 is not None:
            array = array.view(bfloat16)
        elif info.dtype == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
            array.flags.writeable = False
        elif info.dtype == "BOOL":
            _check_bool(array.view(np.uint8), name, str(path))
        arrays[name] = array
    return arrays


def load_torch(path: str | os.PathLike[str]) -> "dict[str, torch.Tensor]":
    """Read a file into freshly allocated CPU tensors, which no later change of the file can reach.

    Raises:
        FormatError: as `read_header`.
    """
    import torch

    tensors = {}
    with open_regular(path) as file:
        infos, _ = _read_header(file, str(path))
        for name, info in infos.items():
            values = torch.empty(info.nbytes, dtype=torch.uint8)
            _read_into(file, values.numpy(), info.start, str(path))
            if info.dtype == "BOOL":
                _check_bool(values.numpy(), name, str(path))
            tensors[name] = values.view(getattr(torch, _DTYPES[info.dtype][2])).view(info.shape)
    return tensors


def _read_header(file: BufferedReader, path: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read the header of an open file; return its tensors in byte order, and its metadata."""
    if sys.byteorder != "little":
        raise FormatError(f"{path}: safetensors values are little-endian and this machine is not")
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise FormatError(
            f"{path} has {size} bytes: too short for the 8 bytes of a safetensors header length"
        )
    prefix = np.empty(8, np.uint8)
    _read_into(file, prefix, 0, path)
    (length,) = struct.unpack("<Q", prefix.data)
    if length > MAX_HEADER_BYTES:
        raise FormatError(
            f"{path} declares a header of {length} bytes at offset 0 and {MAX_HEADER_BYTES} are allowed: "
            "this is no safetensors file, or a damaged one"
        )
    if 8 + length > size:
        raise FormatError(f"{path} is truncated: the header ends at byte {8 + length}, the file at {size}")
    raw = np.empty(length, np.uint8)
    _read_into(file, raw, 8, path)
    if raw.tobytes()[:1] != b"{":
        raise FormatError(f"{path}: the safetensors header at offset 8 does not begin with a brace")
    header = parse_json(raw.tobytes(), f"{path}, header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{path}: __metadata__ must map text to text")
    if len(header) > MAX_TENSORS:
        raise FormatError(f"{path} declares {len(header)} tensors and {MAX_TENSORS} are allowed")
    infos = {name: _checked_entry(name, entry, 8 + length, path) for name, entry in header.items()}
    # An empty tensor sorts before the one that begins where it lies, so that ends and starts meet.
    infos = dict(sorted(infos.items(), key=lambda item: (item[1].start, item[1].end)))
    expected = 8 + length
    for name, info in infos.items():
        if info.start != expected:
            problem = "overlaps the tensor before it" if info.start < expected else "leaves a gap before it"
            raise FormatError(
                f"{path}: tensor {shown(name)} {problem}, it begins at byte {info.start} and not {expected}"
            )
        expected = info.end
    if expected > size:
        raise FormatError(f"{path} is truncated: its tensors end at byte {expected}, the file at {size}")
    if expected < size:
        raise FormatError(
            f"{path} holds {size - expected} bytes that belong to no tensor, from byte {expected}"
        )
    return infos, metadata


def _checked_entry(name: str, entry: object, base: int, path: str) -> TensorInfo:
    """Check one entry of the header by itself: types, limits, and size against shape."""
    where = f"{path}: tensor {shown(name)}"
    if not 1 <= len(name.encode()) <= MAX_NAME_BYTES:
        raise FormatError(f"{where} has a name that is empty or longer than {MAX_NAME_BYTES} bytes")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise FormatError(f"{where} has the dtype {shown(dtype)}: known are {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK:
        raise FormatError(f"{where} needs a list of at most {MAX_RANK} dimensions as its shape")
    if not all(type(dim) is int and 0 <= dim <= MAX_DIM for dim in shape):  # type(): True is an int too
        raise FormatError(f"{where} has a dimension that is no integer from 0 to {MAX_DIM}")
    # Without the zeros: torch and numpy multiply in 64 bits even when the tensor is empty.
    if math.prod(dim or 1 for dim in shape) * 8 >= 2**63:
        raise FormatError(f"{where} has more elements than memory can address")
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise FormatError(f"{where} needs two data_offsets")
    if not all(type(offset) is int and 0 <= offset < 2**63 for offset in offsets):
        raise FormatError(f"{where} has a data offset that is no integer from 0 to 2^63 - 1")
    start, end = offsets
    declared = math.prod(shape) * _DTYPES[dtype][0]
    if end - start != declared:
        raise FormatError(f"{where} has {end - start} bytes, but its dtype and shape make {declared}")
    return TensorInfo(dtype, tuple(shape), base + start, base + end)


def _read_into(file: BufferedReader, values: np.ndarray, start: int, path: str) -> None:
    """Fill a flat array of bytes from an offset of the file."""
    view = values.data
    try:
        file.seek(start)
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise FormatError(f"{path} is truncated: it ended at byte {start + done} while it was read")
            done += count
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}") from error


def _check_bool(values: np.ndarray, name: str, path: str) -> None:
    """Refuse bytes other than 0 and 1, which both numpy and torch would treat as undefined."""
    if values.size and values.max() > 1:
        raise FormatError(f"{path}: tensor {shown(name)} is BOOL but holds a byte other than 0 and 1")


def _checked_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Check that the text of a header is text."""
    for key, value in metadata.items():
        if not _is_text(key) or not _is_text(value):
            raise UsageError(f"metadata maps text to text, got {shown(key)}: {shown(value)}")
    return dict(sorted(metadata.items()))


def _describe(name: str, value: "np.ndarray | torch.Tensor") -> tuple[str, tuple[int, ...]]:
    """Return the safetensors dtype and the shape of a value to be written."""
    if not _is_text(name) or name == "__metadata__" or not 1 <= len(name.encode()) <= MAX_NAME_BYTES:
        raise UsageError(f"{shown(name)} cannot name a tensor: 1 to {MAX_NAME_BYTES} bytes are allowed")
    if isinstance(value, np.ndarray):
        # ml_dtypes' bfloat16 is recognised by its name, so that this module needs no ml_dtypes.
        bfloat16 = value.dtype.name == "bfloat16" and value.dtype.itemsize == 2
        dtype = "BF16" if bfloat16 else _FROM_NUMPY.get(value.dtype.newbyteorder("<").str)
    elif _is_torch(value):
        if value.layout is not sys.modules["torch"].strided or value.is_meta:
            raise UsageError(
                f"tensor {shown(name)} has no plain values in memory: make it dense and real first"
            )
        dtype = _FROM_TORCH.get(str(value.dtype))
    else:
        raise UsageError(
            f"tensor {shown(name)} is a {type(value).__name__}: give a numpy array or torch tensor"
        )
    if dtype is None:
        raise UsageError(f"tensor {shown(name)} has the dtype {value.dtype}: known are {', '.join(_DTYPES)}")
    shape = tuple(value.shape)
    if len(shape) > MAX_RANK or any(dim > MAX_DIM for dim in shape):
        raise UsageError(
            f"tensor {shown(name)} has the shape {shape}: the limits are rank {MAX_RANK} and 2^31"
        )
    return dtype, shape


def _is_text(value: object) -> bool:
    """Tell whether a value is text that UTF-8 can hold: half of a surrogate pair is not."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _is_torch(value: object) -> bool:
    """Tell a torch tensor without importing torch: who has one has imported it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _bytes_of(value: "np.ndarray | torch.Tensor") -> memoryview:
    """Return the little-endian bytes of a value in C order, without a copy where it has that form already."""
    if isinstance(value, np.ndarray):
        flat = np.ascontiguousarray(value).reshape(-1)
        if flat.dtype.byteorder == ">":
            flat = flat.astype(flat.dtype.newbyteorder("<"))
        return flat.view(np.uint8).data
    flat_torch = value.detach().cpu().contiguous().view(-1)
    return flat_torch.view(sys.modules["torch"].uint8).numpy().data
