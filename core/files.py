"""Files: writes that survive a crash, reads that survive a hostile file, names that stay inside their folder.

Writing is one protocol everywhere: a temporary file in the same folder, fsync, rename, fsync of the folder.
A reader therefore sees the old file or the new one and never a mixture, whatever is killed or unplugged.
"""

import errno
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from portlm.errors import FormatError, StorageError

MAX_JSON_BYTES = 16 * 2**20
MAX_JSON_VALUES = 2**20  # each takes some hundred bytes of memory, and a file may have one in three bytes
MAX_NAME_BYTES = 255  # of a relative name that was read from a file

_CONTROL = re.compile("[\x00-\x1f\x7f]")
_FULL = {errno.ENOSPC, errno.EDQUOT}
_NO_DIRECTORY_FSYNC = {errno.EINVAL, errno.ENOTSUP}  # some network file systems


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a regular file for reading. A folder, pipe or device is refused, and never waited for.

    Raises:
        FormatError: `path` is missing, unreadable, or no regular file.
    """
    try:
        # O_NONBLOCK: opening a FIFO that nobody writes to would otherwise wait for ever.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist: check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise FormatError(f"{str(path)!r} cannot be opened: {reason}") from error
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise FormatError(f"{path} is {kind}: a file is needed here")
    return os.fdopen(fd, "rb")


def check_is_folder(path: Path) -> None:
    """Raise FormatError unless a path is a folder. Of a file the message names the folder that it lies in."""
    if path.is_dir():
        return
    if path.exists():
        raise FormatError(f"{path} is a file: give the folder that holds it, {path.parent}")
    raise FormatError(f"{path}: there is no such folder")


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the sha256 of a file's bytes in lower-case hexadecimal.

    Raises:
        FormatError: the file is missing, unreadable, or no regular file.
    """
    with open_regular(path) as file:
        try:
            # Large parts, because another thread may hold Python's lock in between; a small file needs no large one.
            digest, size = hashlib.sha256(), os.fstat(file.fileno()).st_size
            part = memoryview(bytearray(min(size + 1, 2**22)))
            while count := file.readinto(part):
                digest.update(part[:count])
            return digest.hexdigest()
        except OSError as error:
            raise FormatError(f"{path} cannot be read: {error.strerror}") from error


@contextmanager
def atomic_file(path: str | os.PathLike[str], need: int | None = None) -> Iterator[BinaryIO]:
    """Open a file that appears under its name only when the block has ended well.

    Args:
        path: the file to create or replace. The mode of a replaced file is kept; a new one follows the umask.
            A symbolic link is replaced, not followed.
        need: bytes that will be written, for the message when the disk is full.

    Raises:
        StorageError: the file system fails. The old file is then untouched and no temporary file is left.
    """
    target = Path(path)
    # os.open and not tempfile.mkstemp, which would make every file 0600.
    temporary = target.with_name(f".{target.name[:32]}.{os.urandom(8).hex()}.tmp")
    try:
        keep = _mode_of(target)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with os.fdopen(fd, "wb") as file:
                if keep is not None:
                    os.fchmod(fd, keep)
                yield file
                file.flush()
                os.fsync(fd)
            temporary.replace(target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        fsync_dir(target.parent)
    except OSError as error:
        raise _storage_error(target, error, need) from error


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write a whole file (a str as UTF-8) so that a crash leaves the old content or the new, never a part.

    Raises:
        StorageError: the disk is full, read-only, or refuses the write; the old file is untouched.
    """
    raw = data.encode() if isinstance(data, str) else data
    with atomic_file(path, need=len(raw)) as file:
        file.write(raw)


def fsync_dir(path: str | os.PathLike[str]) -> None:
    """Make the names in a folder durable: a rename is only safe from power loss after this.

    Raises:
        StorageError: the folder cannot be opened or synchronised.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in _NO_DIRECTORY_FSYNC:
                raise
        finally:
            os.close(fd)
    except OSError as error:
        raise _storage_error(Path(path), error, None) from error


def free_bytes(path: str | os.PathLike[str]) -> int:
    """Return the bytes an ordinary user may still write where `path` is, or will be.

    Raises:
        StorageError: no existing folder above `path` can be examined.
    """
    place = Path(path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        status = os.statvfs(place)
    except OSError as error:
        raise StorageError(f"{place} cannot be examined: {error.strerror}") from error
    return status.f_bavail * status.f_frsize


def check_space(path: str | os.PathLike[str], need: int) -> None:
    """Refuse early when `need` bytes will not fit.

    Raises:
        StorageError: naming the path, the bytes needed and the bytes free.
    """
    free = free_bytes(path)
    if free < need:
        raise StorageError(
            f"{path}: {need} bytes are needed but {free} are free: make room or choose another folder"
        )


def safe_join(root: str | os.PathLike[str], name: str) -> Path:
    """Join a name that was read from a file to the folder it must stay in.

    `root` is the user's own choice and may be a symbolic link; nothing below it may be one. A name that does
    not exist yet is returned as it is, so writers can use this too. A hard link is an ordinary file: what
    binds the content is the sha256 in the manifest, not the name.

    Args:
        root: the folder.
        name: a relative name with forward slashes, at most 255 bytes of UTF-8.

    Raises:
        FormatError: the name is not a plain relative name, passes through a symbolic link, or names a folder,
            pipe or device.
    """
    check_name(root, name)
    parts = name.split("/")
    path = os.fspath(root)
    for i, part in enumerate(parts):
        path = os.path.join(path, part)  # noqa: PTH118 - a Path of every part takes longer than looking at it
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            break  # nothing here, so nothing below it either
        except OSError as error:
            raise FormatError(f"{root}: {shown(name)} cannot be examined: {error.strerror}") from error
        if stat.S_ISLNK(mode):
            raise FormatError(
                f"{root}: {shown(name)} passes through a symbolic link: put the file itself there"
            )
        expected = stat.S_ISREG if i == len(parts) - 1 else stat.S_ISDIR
        if not expected(mode):
            kind = "a regular file" if i == len(parts) - 1 else "a folder"
            raise FormatError(f"{root}: {shown('/'.join(parts[: i + 1]))} is not {kind}")
    return Path(root, *parts)


def check_name(root: str | os.PathLike[str], name: str) -> None:
    """Refuse a name that `safe_join` would refuse whatever lies in the folder, without looking there.

    Raises:
        FormatError: the name is not a plain relative name.
    """
    problem = _name_problem(name)
    if problem is not None:
        raise FormatError(f"{root}: the file name {shown(name)} is refused, {problem}: use a relative name")


def read_bytes(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """Read a whole file that may not be larger than a number of bytes.

    Raises:
        FormatError: the file is missing, larger, or cannot be read.
    """
    with open_regular(path) as file:
        try:
            raw = file.read(max_bytes + 1)
        except OSError as error:
            raise FormatError(f"{path} cannot be read: {error.strerror}") from error
    if len(raw) > max_bytes:
        raise FormatError(f"{path} is larger than the {max_bytes} bytes allowed for it")
    return raw


def read_json(
    path: str | os.PathLike[str], max_bytes: int = MAX_JSON_BYTES, max_values: int = MAX_JSON_VALUES
) -> object:
    """Read a JSON file strictly: UTF-8, bounded, without duplicate keys, NaN, infinities or lone surrogates.

    Raises:
        FormatError: the file is missing, larger than `max_bytes`, holds more than `max_values`, or is not such JSON.
    """
    return parse_json(read_bytes(path, max_bytes), str(path), max_values)


def parse_json(raw: bytes, name: str, max_values: int = MAX_JSON_VALUES) -> Any:
    """Parse JSON as strictly as `read_json` does.

    Args:
        raw: UTF-8 text.
        name: what to call it in an error.
        max_values: a limit for its commas, braces and brackets, which are counted before anything is made of them.

    Raises:
        FormatError: anything but plain JSON with one meaning.
    """
    if (
        sum(map(raw.count, (b",", b"{", b"["))) > max_values
    ):  # a value comes after one of them, or is the whole
        raise FormatError(f"{name} holds more than the {max_values} JSON values allowed for it")
    try:
        value = json.loads(
            raw.decode(), object_pairs_hook=_object, parse_float=_finite, parse_constant=_no_constant
        )
        if b"\\u" in raw:  # the only way to smuggle in half a surrogate pair, which no file can then hold
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{name} is not UTF-8 at byte {error.start}") from error
    except UnicodeEncodeError as error:
        raise FormatError(f"{name} holds half of a surrogate pair, which is no character") from error
    except RecursionError as error:
        raise FormatError(f"{name} is nested too deeply") from error
    except ValueError as error:  # JSONDecodeError, the hooks below, an integer of thousands of digits
        raise FormatError(f"{name} is not valid JSON: {error}") from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {shown(key)} appears twice in one object")
            seen.add(key)
    return value


def _finite(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise ValueError(f"the number {shown(literal)} is out of range")
    return value


def _no_constant(literal: str) -> float:
    raise ValueError(f"{literal} is no JSON number")


def _name_problem(name: object) -> str | None:
    """Say what is wrong with a relative name, or None."""
    if not isinstance(name, str):
        return "it is not text"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    if not name:
        return "it is empty"
    if size > MAX_NAME_BYTES:
        return f"it has {size} bytes and {MAX_NAME_BYTES} are allowed"
    if _CONTROL.search(name):
        return "it holds a control character"
    if "\\" in name or ":" in name:
        return "it holds a backslash or a colon"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return "it is absolute or leaves the folder"
    return None


def shown(value: object) -> str:
    """Quote something read from a file, short and on one line."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _mode_of(path: Path) -> int | None:
    """Return the permission bits of an existing regular file."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return None
    return stat.S_IMODE(mode) if stat.S_ISREG(mode) else None


def _storage_error(path: Path, error: OSError, need: int | None) -> StorageError:
    """Translate a failed write into one line."""
    if isinstance(error, FileNotFoundError):
        return StorageError(f"{path} cannot be written: the folder {path.parent} does not exist")
    if error.errno in _FULL:
        with suppress(StorageError):
            needed = "" if need is None else f"{need} bytes are needed, "
            free = f"{free_bytes(path)} bytes are free"
            return StorageError(f"{path} cannot be written, the disk or quota is full: {needed}{free}")
    if error.errno == errno.EROFS:
        return StorageError(f"{path} cannot be written: the file system is read-only, choose another folder")
    return StorageError(f"{path} cannot be written: {error.strerror or error}")
