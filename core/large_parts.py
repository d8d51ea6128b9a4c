"""Writing in large parts, so that a file is kept in large pages of memory.

Linux keeps a file's pages as they were written: one call that writes 2 MB at a multiple of 2 MB can make one page of
2 MB, where many small calls make 512 of 4 KB, and so does a large one that begins between two multiples. Who maps the
file reads it the faster for it (docs/performance-log.md, "Large pages of mapped files").
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

PART = 8 << 20  # bytes; a multiple of every large page that file systems have today


class LargeParts:
    """Collects what is written until it makes a part; whole parts of a large piece are not copied."""

    def __init__(self, file: BinaryIO):
        self._file, self._part, self._filled = file, memoryview(bytearray(PART)), 0

    def write(self, data: bytes | memoryview) -> None:
        """Take more bytes.

        Raises:
            OSError: the file refuses a part.
        """
        left = memoryview(data).cast("B")
        while left:
            if not self._filled and len(left) >= PART:
                self._file.write(left[:PART])
                left = left[PART:]
                continue
            count = min(PART - self._filled, len(left))
            self._part[self._filled : self._filled + count] = left[:count]
            self._filled, left = self._filled + count, left[count:]
            if self._filled == PART:
                self.flush()

    def flush(self) -> None:
        """Write what there is."""
        self._file.write(self._part[: self._filled])
        self._filled = 0


@contextmanager
def in_large_parts(file: BinaryIO) -> Iterator[LargeParts]:
    """Write to a file, which nothing was written to yet, in parts that begin at multiples of PART."""
    parts = LargeParts(file)
    yield parts
    parts.flush()
