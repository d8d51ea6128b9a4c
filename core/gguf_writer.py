"""Writing GGUF: the same entries and tensors always give the same bytes. gguf_file.py describes the format."""

import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from portlm.errors import UsageError
from portlm.files import atomic_file
from portlm.gguf_file import MAGIC, TYPES

ALIGNMENT = 32
_UINT32, _INT32, _FLOAT32, _BOOL, _TEXT, _ARRAY = 4, 5, 6, 7, 8, 9
_NUMBER_OF = {kind: number for number, (kind, _, _) in TYPES.items()}


def write_gguf(
    path: str | os.PathLike[str],
    entries: Mapping[str, Any],
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    content: Callable[[str], bytes],
) -> None:
    """Write a file, which appears when it is whole.

    Args:
        path: the file to create or replace.
        entries: the metadata: bool, int (uint32), float (float32), str, or a list of str, int (int32) or float.
        tensors: for each its type, a name in :data:`portlm.gguf_file.TYPES`, and its shape, a matrix (out, in).
        content: returns the bytes of a tensor, asked for one at a time.

    Raises:
        UsageError: a value or a tensor that the format has no form for.
        StorageError: the disk is full or refuses the write; an old file is untouched.
    """
    sizes, infos, offset = {}, [], 0
    for name, (kind, shape) in tensors.items():
        _, block, size = TYPES[_NUMBER_OF[kind]]
        sizes[name] = int(np.prod(shape, dtype=np.int64)) // block * size
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        infos.append(_text(name) + dims + struct.pack("<IQ", _NUMBER_OF[kind], offset))
        offset += _padded(sizes[name])
    head = MAGIC + struct.pack("<IQQ", 3, len(infos), len(entries))
    head += b"".join(_text(key) + _value(value, key) for key, value in entries.items()) + b"".join(infos)
    head += bytes(_padded(len(head)) - len(head))
    with atomic_file(Path(path), need=len(head) + offset) as file:
        file.write(head)
        for name, size in sizes.items():
            raw = content(name)
            if len(raw) != size:
                raise UsageError(f"tensor {name} has {len(raw)} bytes, and its shape needs {size}")
            file.write(raw)
            file.write(bytes(_padded(size) - size))


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any, key: str) -> bytes:
    """Return a value with its type."""
    if isinstance(value, list):
        kinds = {type(item) for item in value}
        if kinds <= {str}:
            return struct.pack("<IIQ", _ARRAY, _TEXT, len(value)) + b"".join(map(_text, value))
        kind, dtype = (_INT32, "<i4") if kinds == {int} else (_FLOAT32, "<f4")
        if not kinds <= {int, float}:
            raise UsageError(f"{key} is a list of what GGUF has no form for")
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + np.array(value, dtype).tobytes()
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int) and 0 <= value < 2**32:
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _TEXT) + _text(value)
    raise UsageError(f"{key} = {value!r:.100} has no form in GGUF")
