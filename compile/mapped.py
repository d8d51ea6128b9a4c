"""A checkpoint's weight file in memory as the kernel keeps it, and from there into another file without a detour."""

import contextlib
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from portlm.weights import load_numpy

BFLOAT16 = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)


class MappedFile:
    """The tensors of a safetensors file, read when they are looked at.

    Args:
        path: of the file.

    Attributes:
        arrays: the tensors by name, views of the file.

    Raises:
        FormatError: as load_numpy.
    """

    def __init__(self, path: Path):
        self._path, before = path, _identity(path)
        self.arrays = load_numpy(path, BFLOAT16)
        self._identity = before if before == _identity(path) else None
        bases: list[Any] = [array.base for array in self.arrays.values()]
        self._map = next((base for base in bases if isinstance(base, mmap.mmap)), None)  # one, of all tensors
        self._begin = np.frombuffer(self._map, np.uint8).ctypes.data if self._map is not None else 0

    def release(self) -> None:
        """Give back the memory of what was looked at; it is read again if needed."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)

    def copy(self, array: np.ndarray, file: Any) -> int:
        """Copy the bytes of an array that is a part of this file to another, inside the kernel.

        Args:
            array: contiguous.
            file: unbuffered; its position moves on.

        Returns:
            How many of the array's bytes were copied, from the first: 0 where this cannot be done.
        """
        begin = array.ctypes.data - self._begin
        if (
            self._map is None
            or not 0 <= begin <= len(self._map) - array.nbytes
            or not hasattr(os, "sendfile")
        ):
            return 0
        done = 0
        with (
            contextlib.suppress(OSError),
            self._path.open("rb") as source,
        ):  # the caller writes the rest, or fails
            if self._identity == _identity(source.fileno()):  # another file may have taken the name
                while done < array.nbytes:
                    count = os.sendfile(file.fileno(), source.fileno(), begin + done, array.nbytes - done)
                    if not count:
                        break
                    done += count
        return done


def _identity(file: Path | int) -> tuple[int, ...] | None:
    try:
        found = os.stat(file)  # noqa: PTH116 - a descriptor, too
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
