"""Remembers which large files were compared with their hash, so that opening a model again need not read all of it.

A file is known again by the hash that it had to have, its device, inode and size, and the times, in nanoseconds, at
which it and its inode last changed. The last of these nobody sets but the system, at every write, also through a
mapping, and at every rename, link or change of permissions: a file that has it still is the one that was compared. What
a disk spoils by itself is not seen. A file that changed within moments of being compared is not remembered, because a
second change could bear the same time.

It is for data alone, whose readers survive whatever it holds: machine code is compared whenever it is loaded. The store
is a private folder of empty files, named by digest. Losing one costs the time to compare again, and where there can be
no private folder nothing is remembered.
"""

import hashlib
import json
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from portlm.artifact import Manifest, check_files
from portlm.errors import PortlmError
from portlm.files import safe_join
from portlm.trust import private_folder

FOLDER = "files"
SETTLED_SECONDS = 2  # as old a file must be, which is more than file systems round times to


def check_data_files(folder: Path, names: Iterable[str], manifest: Manifest) -> None:
    """Compare data files with a manifest, unless they are those that were compared on this machine before.

    Raises:
        FormatError: as portlm.artifact.check_files.
    """
    for name in names:
        entry = manifest.files.get(name)
        before = _identity(folder, name)
        if entry is not None and before is not None and _is_known(before, entry.sha256):
            continue
        began = time.time_ns()
        check_files(folder, [name], manifest)
        if entry is None or before is None or before != _identity(folder, name):
            continue
        if max(before[3:]) < began - SETTLED_SECONDS * 10**9:
            _record(before, entry.sha256)


def _identity(folder: Path, name: str) -> tuple[int, ...] | None:
    """What a file is known by: device, inode, size, and when it and its inode changed; None if it cannot be said."""
    try:
        found = safe_join(folder, name).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _digest(identity: tuple[int, ...], sha256: str) -> str:
    return hashlib.sha256(json.dumps([identity, sha256]).encode()).hexdigest()


def _record(identity: tuple[int, ...], sha256: str) -> None:
    with suppress(PortlmError, OSError):
        (private_folder(FOLDER) / _digest(identity, sha256)).touch()


def _is_known(identity: tuple[int, ...], sha256: str) -> bool:
    with suppress(PortlmError, OSError):
        return (private_folder(FOLDER) / _digest(identity, sha256)).is_file()
    return False
