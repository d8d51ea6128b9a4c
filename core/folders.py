"""Folders that appear complete or not at all: built aside, on the disk in every file, and then renamed into place.

A previous folder of that name stays until then. Artifacts, checkpoints and imports are all written this way.
"""

import contextlib
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from portlm.files import free_bytes, fsync_dir, write_atomic

_LEFTOVER = re.compile(r"(?P<name>.+?)(?P<old>\.old)?\.tmp-(?P<pid>\d{1,10})")
_STALE_FILE = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")

Fill = Callable[[Path], None]


class FileOps:
    """Every operation that a save performs on the disk, one method each.

    The one seam for tests: a subclass that fails or kills the process at the Nth call shows that no moment
    exists at which the previous folder is lost.
    """

    def make_folder(self, path: Path) -> None:
        """Create one folder."""
        path.mkdir()

    def fill(self, folder: Path, write: Fill) -> None:
        """Let the caller write its files into a new folder."""
        write(folder)

    def write_file(self, path: Path, data: bytes) -> None:
        """Create a file, and wait until its contents are on the disk."""
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def seal_file(self, path: Path, hashed: bool = True) -> dict[str, Any]:
        """Wait until a file that somebody else wrote is on the disk; return its size, and its sha256 if wanted."""
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC), "rb") as file:
            os.fsync(file.fileno())
            entry: dict[str, Any] = {"size": os.fstat(file.fileno()).st_size}
            return entry | {"sha256": hashlib.file_digest(file, "sha256").hexdigest()} if hashed else entry

    def sync_folder(self, path: Path) -> None:
        """Wait until the names in a folder are on the disk."""
        fsync_dir(path)

    def rename(self, old: Path, new: Path) -> None:
        """Give a file or folder another name, atomically."""
        old.rename(new)

    def replace_file(self, path: Path, data: bytes) -> None:
        """Replace a small file atomically."""
        write_atomic(path, data)

    def remove_folder(self, path: Path) -> None:
        """Delete a folder and what is in it."""
        shutil.rmtree(path)

    def free_bytes(self, path: Path) -> int:
        """Return the free space where ``path`` lies."""
        return free_bytes(path)


FILE_OPS = FileOps()


@contextlib.contextmanager
def new_folder(
    target: Path, ops: FileOps = FILE_OPS, seal: Callable[[Path], None] | None = None
) -> Iterator[Path]:
    """Yield an empty folder beside ``target``, which takes its place when the block has ended well.

    An older folder of that name stays until the new one is complete on the disk; files of the same name keep their
    mode. If anything fails, in the block or afterwards, the older one is untouched and the new one is removed.

    Args:
        target: the folder to write; its parents are made.
        ops: the file operations; tests replace them.
        seal: makes every file in the folder durable, and may add to it; None does just that.

    Raises:
        OSError: the disk is full or refuses; the caller says what that means.
    """
    if target.name in ("", ".."):
        target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent, ops, target.name)
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    old = target.with_name(f"{target.name}.old.tmp-{os.getpid()}")
    try:
        ops.make_folder(temporary)
        yield temporary
        if target.exists():
            _copy_modes(target, temporary)
        if seal is None:
            _sync_files(temporary, ops)
        else:
            seal(temporary)
        ops.sync_folder(temporary)
        if target.exists():
            ops.rename(target, old)
        try:
            ops.rename(temporary, target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    ops.sync_folder(target.parent)
    if old.exists():
        ops.remove_folder(old)


def remove_leftovers(folder: Path, ops: FileOps = FILE_OPS, of: str = "") -> None:
    """Delete what saves that were killed left half written.

    A leftover carries the number of its process. One of a process still alive is left alone; one with our own
    number can only be from an earlier process that had it, as containers hand out the same few numbers. A folder
    that was about to be replaced, and was not, gets its name back.

    Args:
        folder: where they lie.
        ops: the file operations.
        of: the name of the folder that was to be written; all of them if empty, for a parent that is ours alone.
    """
    for entry in list(folder.iterdir()):
        match = _LEFTOVER.fullmatch(entry.name)
        if not match or not entry.is_dir() or entry.is_symlink() or _is_other_process(int(match["pid"])):
            continue
        if of and match["name"] != of:
            continue
        if match["old"] and not (folder / match["name"]).exists():
            ops.rename(entry, folder / match["name"])
        else:
            ops.remove_folder(entry)


def remove_stale_files(folder: Path) -> None:
    """Delete the temporary files of atomic writes that were killed.

    Only for a folder that nobody else is writing to: they carry no process number.
    """
    for entry in list(folder.iterdir()):
        if _STALE_FILE.fullmatch(entry.name) and entry.is_file():
            entry.unlink(missing_ok=True)


def _sync_files(folder: Path, ops: FileOps) -> None:
    """Everything below the folder is on the disk before its name is."""
    for path in folder.rglob("*"):
        if path.is_dir():
            ops.sync_folder(path)
        else:
            ops.seal_file(path, False)


def _copy_modes(old: Path, new: Path) -> None:
    for path in (new, *new.rglob("*")):
        twin = old / path.relative_to(new)
        if twin.exists():
            path.chmod(stat.S_IMODE(twin.stat().st_mode))


def _is_other_process(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
