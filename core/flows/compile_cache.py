"""What was compiled at first use: a private folder of the user's, one entry for each graph, engine and machine.

An entry is keyed by everything that its content depends on: the graphs' hashes, the sizes in the manifest, the versions
of the packages, the compiler's own code, the processor, and the GPU that machine code is for. It holds the compiled
files and a manifest with their hashes; weights stay in the artifact. An entry appears by rename, complete or not at
all. Deleting the folder ($PORTLM_HOME/compiled, otherwise portlm/compiled in the cache folder) costs the time to
compile again, nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from portlm.artifact import Manifest, check_files, read_manifest, replace
from portlm.engines import ENGINES
from portlm.errors import FormatError
from portlm.plan import needs_plan
from portlm.quantization import FLOATS, activations, at_activations, kept_activations
from portlm.seen_files import check_data_files
from portlm.trust import NATIVE_SUFFIXES, is_ours, private_folder

Key = tuple[str, str, str]
"""Engine, device and profile."""

FOLDER = "compiled"


class Found(NamedTuple):
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
        from portlm.flows.compile_entry import write_entry  # not loaded where there is an entry

    progress()
    write_entry(folder, manifest, key, entry)
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
    if key[:2] == ("tvm", "cuda"):
        from portlm.tvm_cuda import architectures  # only here: what is packed needs nothing of TVM

        facts.append(architectures())
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _compiler() -> str:
    """A digest of portlm.compile itself, which changes without a version while somebody works on it."""
    from portlm import compile as package

    digest = hashlib.sha256()
    for path in sorted(Path(str(package.__file__)).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


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
