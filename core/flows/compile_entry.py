"""Writes an entry of the cache of compiled files (portlm.flows.compile_cache): complete, or not at all."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from portlm.artifact import Manifest, check_files, read_manifest, replace, write_manifest
from portlm.compile.build import build
from portlm.compile.isolated import ensure_checked
from portlm.errors import EngineUnavailableError, StorageError
from portlm.files import check_space, safe_join

UNFINISHED = ".building-"
STALE_SECONDS = 24 * 3600  # an unfinished entry as old as this was given up


def write_entry(folder: Path, manifest: Manifest, key: tuple[str, str, str], entry: Path) -> None:
    """Compile an artifact into a folder of the cache.

    Args:
        folder: the artifact.
        manifest: its manifest.
        key: engine, device and profile.
        entry: the folder to appear; one that is there is damaged, and can be made again.

    Raises:
        EngineUnavailableError: a package or a compiler is missing.
        FormatError: the artifact is damaged.
        StorageError: the cache cannot be written.
    """
    if entry.exists():
        shutil.rmtree(entry, ignore_errors=True)
    root = entry.parent
    _tidy(root)
    try:
        scratch = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=root))
    except OSError as error:
        raise StorageError(
            f"{root}: cannot be written ({error.strerror}); set PORTLM_HOME elsewhere"
        ) from error
    try:
        _build(folder, manifest, key, scratch)
        try:
            scratch.rename(entry)
        except OSError:
            if not entry.exists():
                raise
            shutil.rmtree(scratch)  # another process was faster
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _build(folder: Path, manifest: Manifest, key: tuple[str, str, str], scratch: Path) -> None:
    """Compile in a copy of the artifact that has no more than what compiling reads; keep the results alone."""
    ensure_checked(folder, manifest, [role.profiles[key[2]] for role in manifest.roles.values()])
    names = {name for role in manifest.roles.values() for name in (*role.profiles.values(), role.weights)}
    check_files(folder, sorted(names), manifest)
    for name in names:
        target = scratch / name
        target.parent.mkdir(parents=True, exist_ok=True)
        _copy(safe_join(folder, name), target)
    write_manifest(scratch, replace(manifest, compiled=(), parity=()))
    try:
        build(scratch, [key])
    except ImportError as error:
        raise EngineUnavailableError(
            f"{key[0]}: compiling needs the package {error.name}, try pip install 'portlm[onnx]'"
        ) from error
    kept = {name for entry in read_manifest(scratch).compiled for name in entry.files}
    for name in names - kept:
        (scratch / name).unlink()


def _copy(source: Path, target: Path) -> None:
    """Copy a file: ONNX's own check refuses weights that are links of either kind."""
    check_space(target.parent, source.stat().st_size)
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise StorageError(f"{target}: cannot be written ({error.strerror})") from error


def _tidy(root: Path) -> None:
    """Remove what processes that were killed left behind."""
    for path in root.glob(f"{UNFINISHED}*"):
        if time.time() - path.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
