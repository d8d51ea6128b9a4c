"""Remembers which native code was compiled on this machine, by this user, and of what.

Loading a shared library runs it, and no check of its bytes makes that safe. So a library is loaded only if compiling
has put it into this store, and only as what it was compiled for: an entry is the digest of a Build, which holds the
library's own digest, engine, device and profile, the graph, and the files that say how the library is called. The file
of that name holds the Build, for people; nothing reads it, so two processes can record at once.

The store is a folder that belongs to the user and that nobody else may enter, rename or replace, which depends on every
folder above it. The manifest of an artifact cannot stand in for it: whoever made a hostile library also wrote its
manifest.
"""

import grp
import hashlib
import json
import os
import pwd
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct
from msgspec.structs import asdict

from portlm.artifact import CompiledEntry, Manifest
from portlm.errors import FormatError, StorageError, UsageError
from portlm.files import write_atomic

# Files that are loaded as machine code.
NATIVE_SUFFIXES = (".so", ".dylib", ".dll")


class Build(Struct, frozen=True):
    """A library, and what it was compiled for.

    Attributes:
        library: sha256 of its bytes.
        engine: that loads it.
        device: that it runs on.
        profile: of the graph.
        graph: sha256 of the graph that it was made of.
        beside: sha256 of each other compiled file of the role, by the last part of its name: they say how the library
            is called.
    """

    library: str
    engine: str
    device: str
    profile: str
    graph: str
    beside: Mapping[str, str]

    def digest(self) -> str:
        """Return one number for all of it."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Return it as text, the same for the same build."""
        return json.dumps(asdict(self), sort_keys=True, indent=1) + "\n"


def builds(manifest: Manifest, entry: CompiledEntry) -> list[Build]:
    """Return what a manifest says of the native files of one of its compiled entries.

    Raises:
        FormatError: the entry is of a role or a profile that the manifest does not have.
    """
    role = manifest.roles.get(entry.role)
    graph = role.profiles.get(entry.profile) if role else None
    if graph is None:
        raise FormatError(
            f"the manifest has no {entry.profile} graph of {entry.role}, of which {entry.engine} was compiled; "
            "compile again"
        )
    native = [name for name in entry.files if name.endswith(NATIVE_SUFFIXES)]
    beside = {_last(n): manifest.files[n].sha256 for n in entry.files if n not in native}
    return [
        Build(
            manifest.files[name].sha256,
            entry.engine,
            entry.device,
            entry.profile,
            manifest.files[graph].sha256,
            beside,
        )
        for name in native
    ]


def is_ours(manifest: Manifest, entry: CompiledEntry) -> bool:
    """Whether a compiled entry holds no native code but what was compiled here, from the graph that it goes with.

    Raises:
        FormatError: the store, or a folder above it, is open to others.
        UsageError: there is no place for a store.
    """
    if not any(name.endswith(NATIVE_SUFFIXES) for name in entry.files):
        return True
    try:
        said = builds(manifest, entry)
    except FormatError:
        return False
    return all(is_trusted(build) for build in said)


def record_built(build: Build) -> None:
    """Trust a library that was just compiled here.

    Raises:
        FormatError: the store, or a folder above it, is open to others.
        UsageError: there is no place for a store.
        StorageError: the store cannot be written.
    """
    write_atomic(private_folder("trust") / build.digest(), build.to_json())


def is_trusted(build: Build) -> bool:
    """Whether this library was compiled here, for just that.

    Raises:
        FormatError: the store, or a folder above it, is open to others, so what it says is worth nothing.
        UsageError: there is no place for a store.
    """
    folder = trust_folder()
    if not os.path.lexists(folder):
        return False
    _check_private(folder)
    return (folder / build.digest()).is_file()


def was_recorded_alone(library: str) -> bool:
    """Whether an older portlm recorded this digest of a library, without what it was compiled for."""
    return len(library) == 64 and (trust_folder() / library).is_file()


def home() -> Path:
    """Where portlm keeps what is this user's: $PORTLM_HOME, or portlm in the XDG cache folder; links are resolved.

    Raises:
        UsageError: PORTLM_HOME is relative, or it is not set and the user has no home folder.
    """
    if chosen := os.environ.get("PORTLM_HOME"):
        folder = Path(chosen)
        if not folder.is_absolute():
            raise UsageError(
                f"PORTLM_HOME must be an absolute path, got {chosen!r}, which is another folder wherever you are"
            )
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
        if not cache.is_absolute():  # the XDG rule: a relative one is ignored
            cache = Path(os.path.expanduser("~/.cache"))  # noqa: PTH111 - Path.home() raises where there is none
        folder = cache / "portlm"
        if not folder.is_absolute():
            raise UsageError("this user has no home folder: set PORTLM_HOME to an absolute path")
    return Path(os.path.realpath(folder))


def trust_folder() -> Path:
    """Where the entries are. Raises what home() raises."""
    return home() / "trust"


def private_folder(name: str) -> Path:
    """Return a folder of home() that belongs to the user and that nobody else may enter, made if it is not there.

    Raises:
        FormatError: it, or a folder above it, is open to others, so what it holds is worth nothing.
        UsageError: there is no place for it.
        StorageError: it cannot be made.
    """
    folder = home() / name
    missing = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
    try:
        for place in reversed(missing):
            place.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot be made ({error.strerror}); set PORTLM_HOME elsewhere"
        ) from error
    _check_private(folder)
    return folder


@contextmanager
def private_scratch() -> Iterator[Path]:
    """Give an empty folder that nobody else may enter, rename or replace, and remove it at the end of the block.

    Raises:
        FormatError: the folder for temporary files ($TMPDIR), or one above it, is open to others.
        StorageError: it cannot be made.
    """
    import shutil
    import tempfile

    try:
        folder = Path(os.path.realpath(tempfile.mkdtemp(prefix="portlm-")))  # mode 700
    except OSError as error:
        raise StorageError(f"no folder for temporary files ({error.strerror}); set TMPDIR") from error
    try:
        _check_private(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_private(folder: Path) -> None:
    """Refuse a folder that others can enter, or whose name others can give to another folder.

    Every folder above counts, as for ssh's keys: whoever may write to one can rename what is in it. In one with the
    sticky bit, such as /tmp, only the owner of an entry can.
    """
    status = folder.lstat()
    if (
        not stat.S_ISDIR(status.st_mode)
        or status.st_uid != os.geteuid()
        or stat.S_IMODE(status.st_mode) & 0o077
    ):
        raise FormatError(
            f"{folder}: must be a folder of yours that nobody else can enter; check who made it, then chmod 700 it"
        )
    # Whoever owns / can change everything anyway. It is not always user 0: in a user namespace it has no number.
    owners = {0, os.geteuid(), Path("/").stat().st_uid}
    for place in folder.parents:
        status = place.stat()
        mode = stat.S_IMODE(status.st_mode)
        writers = "" if status.st_uid in owners else f"user {status.st_uid}, whose folder it is,"
        if not mode & stat.S_ISVTX:
            if mode & stat.S_IWGRP and not _is_own_group(status.st_gid):
                writers = f"group {status.st_gid}"
            if mode & stat.S_IWOTH:
                writers = "everybody"
        if writers:
            raise FormatError(
                f"{folder}: {writers} may write to {place} (mode {mode:o}), and so put another folder in its place: "
                f"chmod go-w {place} if it is yours, or set PORTLM_HOME or TMPDIR to another place"
            )


def _is_own_group(gid: int) -> bool:
    """Whether a group is the user's alone, as many systems make one for each user; or root's."""
    try:
        user, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(gid)
    except KeyError:
        return gid == 0
    return (gid == 0 or group.gr_name == user) and not set(group.gr_mem) - {user, "root"}


def _last(name: str) -> str:
    return name.rpartition("/")[2]
