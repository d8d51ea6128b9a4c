"""The run's diary: one JSON object per line in ``metrics.jsonl``, appended as things happen.

A process may die at any byte of the file. Each line is therefore one write to a file opened for
appending, and a resumed run first drops a torn last line and every line after the step it resumes from, so
that the finished diary of an interrupted run reads like that of an undisturbed one.
"""

import contextlib
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from portlm.errors import FormatError, StorageError
from portlm.files import write_atomic

Record = dict[str, Any]

# What differs between two runs that learned exactly the same: clocks, and lines about the run itself.
CLOCK_FIELDS = ("seconds", "tokens_per_second")
RUN_KINDS = ("run", "resume", "interrupt")


class MetricsLog:
    """An append-only metrics file.

    Every record has ``kind`` and ``step``. Opening keeps the records up to and including ``resume_step`` and
    drops the rest; with ``resume_step=None`` the file starts empty. Records of the kinds in ``redo`` are dropped
    at ``resume_step`` itself as well: the run is about to write them again.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None, redo: Collection[str] = ()):
        self.path = Path(path)
        if resume_step is None:
            write_atomic(self.path, b"")
        else:
            _drop_after(self.path, resume_step, redo)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one record.

        Raises:
            StorageError: The disk refuses the line. The file is cut back to whole lines.
            ValueError: A value is NaN or infinite, which JSON cannot hold.
        """
        line = json.dumps({"kind": kind, "step": step, **values}, ensure_ascii=False, allow_nan=False)
        data = f"{line}\n".encode()
        size = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, data)
            if written != len(data):
                raise OSError(28, os.strerror(28))  # a short write to a regular file: ENOSPC comes next
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, size)
            raise StorageError(
                f"cannot write {self.path}: {error.strerror}; free some space and resume"
            ) from error

    def sync(self) -> None:
        """Wait until every record is on the disk: a checkpoint must not outlive the lines before it."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise StorageError(
                f"cannot write {self.path}: {error.strerror}; free some space and resume"
            ) from error

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[Record]:
    """Return the records of a metrics file; a torn last line is ignored.

    Raises:
        FormatError: The file is missing, or a line other than the last is no record.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from error
    records = []
    for number, line in enumerate(_whole_lines(data), start=1):
        record = _parse(line)
        if record is None:
            raise FormatError(f"{path}, line {number}: not a metrics record; delete that line")
        records.append(record)
    return records


def comparable(records: list[Record]) -> list[Record]:
    """Return what two bit-identical trainings agree on: no clocks, no lines about the process itself."""
    return [
        {key: value for key, value in record.items() if key not in CLOCK_FIELDS}
        for record in records
        if record["kind"] not in RUN_KINDS
    ]


def _drop_after(path: Path, step: int, redo: Collection[str]) -> None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        data = b""
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from error
    kept = []
    for line in _whole_lines(data):
        record = _parse(line)
        # An unreadable line in the middle is worth less than the run: it goes too.
        if record is None or record["step"] > step:
            continue
        if record["step"] < step or record["kind"] not in redo:
            kept.append(line + b"\n")
    if (clean := b"".join(kept)) != data or not path.exists():
        write_atomic(path, clean)


def _whole_lines(data: bytes) -> Iterator[bytes]:
    yield from data.split(b"\n")[:-1]


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    fits = (
        isinstance(record, dict)
        and isinstance(record.get("step"), int)
        and isinstance(record.get("kind"), str)
    )
    return record if fits else None
