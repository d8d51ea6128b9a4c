"""Remembers which native code was compiled on this machine, by this user.

Loading a shared library runs it, and no check of its bytes makes that safe. So libraries are loaded only if their
sha256 is in this store, where compiling puts it. The store is a folder that belongs to the user and that nobody
else may read or write; each entry is an empty file named by the digest, so two processes can record at once.

The manifest of an artifact cannot stand in for it: whoever made a hostile library also wrote its manifest.
"""

import os
import stat
from pathlib import Path

from portlm.errors import FormatError, StorageError
from portlm.files import sha256_file, write_atomic

# Files that are loaded as machine code.
NATIVE_SUFFIXES = (".so", ".dylib", ".dll")


def home() -> Path:
    """Where portlm keeps what is this user's: $PORTLM_HOME, or portlm in the XDG cache folder."""
    chosen = os.environ.get("PORTLM_HOME")
    if chosen:
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME", "")
    base = (
        Path(cache) if cache.startswith("/") else Path.home() / ".cache"
    )  # the XDG rule: relative is ignored
    return base / "portlm"


def trust_folder() -> Path:
    """Where the digests are."""
    return home() / "trust"


def private_folder(name: str) -> Path:
    """Return a folder of home() that belongs to the user and that nobody else may enter, made if it is not there.

    Raises:
        FormatError: it is open to others, so what it holds is worth nothing.
        StorageError: it cannot be made.
    """
    folder = home() / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot be made ({error.strerror}); set PORTLM_HOME elsewhere"
        ) from error
    _check_private(folder)
    return folder


def record_built(path: str | Path) -> str:
    """Trust a file that was just compiled here; return its sha256.

    Raises:
        FormatError: the file cannot be read, or the store is open to others.
        StorageError: the store cannot be written.
    """
    folder = private_folder("trust")
    digest = sha256_file(path)
    write_atomic(folder / digest, b"")
    return digest


def is_trusted(sha256: str) -> bool:
    """Whether a file with this digest was compiled here.

    Raises:
        FormatError: the store exists but others may write to it, so what it says is worth nothing.
    """
    if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
        return False  # also keeps anything but a digest from becoming part of a path
    folder = trust_folder()
    if not os.path.lexists(folder):
        return False
    _check_private(folder)
    return (folder / sha256).is_file()


def _check_private(folder: Path) -> None:
    status = folder.lstat()
    if (
        not stat.S_ISDIR(status.st_mode)
        or status.st_uid != os.getuid()
        or stat.S_IMODE(status.st_mode) & 0o077
    ):
        raise FormatError(
            f"{folder}: must be a folder of yours that nobody else can enter; check who made it, then chmod 700 it"
        )
