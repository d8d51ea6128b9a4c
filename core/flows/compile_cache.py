"""What was compiled at first use: a private folder of the user's, one entry for each graph, engine and machine.

An entry is keyed by everything that its content depends on: the graphs' hashes, the sizes in the manifest, the versions
of the packages, the compiler's own code, and the processor. It holds the compiled files and a manifest with their
hashes; weights stay in the artifact. An entry appears by rename, complete or not at all. Deleting the folder
($PORTLM_HOME/compiled, otherwise portlm/compiled in the cache folder) costs the time to compile again, nothing else.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from portlm.artifact import Manifest, check_files, read_manifest, replace, write_manifest
from portlm.engines import ENGINES
from portlm.errors import EngineUnavailableError, FormatError, StorageError
from portlm.files import check_space, safe_join
from portlm.plan import needs_plan
from portlm.quantization import FLOATS, activations, at_activations, kept_activations
from portlm.seen_files import check_data_files
from portlm.trust import NATIVE_SUFFIXES, is_ours, private_folder

Key = tuple[str, str, str]
"""Engine, device and profile."""

FOLDER = "compiled"
UNFINISHED = ".building-"
STALE_SECONDS = 24 * 3600  # an unfinished entry as old as this was given up


@dataclass(frozen=True)
class Found:
    """An entry: the artifact's manifest with its compiled files, and the folder that they lie in."""

    manifest: Manifest
    folder: Path


def needed(engine: str, device: str, profile: str, manifest: Manifest) -> str | None:
    """Return the profile to compile, or None if the artifact has what it takes, or nothing can be compiled for it.

    Native code that was compiled on another machine does not count: it is never run.
    """
    compilers = ENGINES[engine].compilers
    if engine == "torch" and profile == "auto" and not needs_plan(manifest):
        return None  # it runs the checkpoint
    if engine == "torch" and profile == "native" and manifest.quantization is not None:
        profile = "auto"  # any plan says where the weights are
    for name in ("fused", "portable") if profile == "auto" else (profile,):
        key = (engine, device, name)
        if key[1:] in compilers and _has(manifest, key):
            return None
    for name in ("fused", "portable") if profile == "auto" else (profile,):
        exported = manifest.roles and all(name in role.profiles for role in manifest.roles.values())
        if (device, name) in compilers and exported:
            return name
    return None


def find_or_build(folder: Path, manifest: Manifest, key: Key, progress: Callable[[], None]) -> Found:
    """Return the entry for an artifact, compiled now if there is none.

    Args:
        folder: the artifact.
        manifest: its manifest.
        key: what to compile, one of the table of compilers.
        progress: called before compiling.

    Raises:
        EngineUnavailableError: a package or a compiler is missing.
        FormatError: the artifact is damaged, or the cache is open to others.
        StorageError: the cache cannot be written.
    """
    entries = [e.target for e in manifest.compiled if (e.engine, e.device, e.profile) == key]
    with at_activations(kept_activations(entries)):  # of code that another machine compiled
        return _find_or_build(folder, manifest, key, progress)


def _find_or_build(folder: Path, manifest: Manifest, key: Key, progress: Callable[[], None]) -> Found:
    root = private_folder(FOLDER)
    entry = root / _digest(manifest, key)
    try:
        return _read(entry, manifest, key)
    except FormatError:
        if entry.exists():
            shutil.rmtree(entry, ignore_errors=True)  # damaged: what is there can be made again
    progress()
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
    return _read(entry, manifest, key)


def _has(manifest: Manifest, key: Key) -> bool:
    """Whether an artifact has something compiled for every role, that this machine may run."""
    entries = [e for e in manifest.compiled if (e.engine, e.device, e.profile) == key]
    return {e.role for e in entries} == manifest.roles.keys() and all(is_ours(manifest, e) for e in entries)


def _digest(manifest: Manifest, key: Key) -> str:
    """Everything that the compiled files depend on, as one number."""
    from portlm import _C
    from portlm.engines import versions_of

    graphs = {
        name: [role.weights, manifest.files[role.profiles[key[2]]].sha256]
        for name, role in manifest.roles.items()
    }
    taken = activations() if manifest.quantization is not None else FLOATS
    facts = [
        key,
        taken,
        graphs,
        msgspec.to_builtins(manifest.model),
        versions_of(*key[:2]),
        _C.isa(),
        _compiler(),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _compiler() -> str:
    """A digest of portlm.compile itself, which changes without a version while somebody works on it."""
    from portlm import compile as package

    digest = hashlib.sha256()
    for path in sorted(Path(str(package.__file__)).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _build(folder: Path, manifest: Manifest, key: Key, scratch: Path) -> None:
    """Compile in a copy of the artifact that has no more than what compiling reads; keep the results alone."""
    from portlm.compile.build import build
    from portlm.compile.isolated import ensure_checked

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


def _read(entry: Path, manifest: Manifest, key: Key) -> Found:
    """Read an entry and compare its files with their hashes."""
    cached = read_manifest(entry)
    compiled = tuple(e for e in cached.compiled if (e.engine, e.device, e.profile) == key)
    names = [name for e in compiled for name in e.files]
    if any(name.endswith(NATIVE_SUFFIXES) for name in names):
        check_files(entry, names, cached)
    else:
        check_data_files(entry, names, cached)
    if not _has(cached, key):
        raise FormatError(f"{entry}: holds code that is not trusted any more")
    files = {**manifest.files, **{name: cached.files[name] for name in names}}
    return Found(replace(manifest, compiled=compiled, files=files), entry)


def _tidy(root: Path) -> None:
    """Remove what processes that were killed left behind."""
    for path in root.glob(f"{UNFINISHED}*"):
        if time.time() - path.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
