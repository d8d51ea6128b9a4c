"""From exported graphs to compiled files: one table of what can be compiled, one way to record it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from portlm.artifact import Compiled, CompiledEntry, Manifest, read_manifest, replace, write_manifest
from portlm.compile.isolated import GRAPH, ensure_checked, graph_of
from portlm.compile.passes import Dump, ignore
from portlm.engines import ENGINES, resolve
from portlm.errors import EngineUnavailableError, UsageError
from portlm.plan import needs_plan
from portlm.quantization import BYTES, asked_activations, at_activations, kept_activations
from portlm.seen_graphs import record_written, was_written
from portlm.trust import builds, record_built

Compiler = Callable[..., Compiled]
"""(artifact, device, profile, role=, note=): writes compiled files into the artifact and describes them."""

# (engine, device, profile) -> the place of its Compiler
COMPILERS = {(name, *key): place for name, entry in ENGINES.items() for key, place in entry.compilers.items()}


def choices(
    engine: str | None = None, device: str | None = None, profile: str | None = None
) -> list[tuple[str, str, str]]:
    """Return the entries of COMPILERS that a partial choice names.

    Raises:
        UsageError: there is none; the message lists what there is.
    """
    wanted = (engine, device, profile)
    found = [key for key in COMPILERS if all(w is None or w == k for w, k in zip(wanted, key, strict=True))]
    if not found:
        asked = ":".join(part or "*" for part in wanted)
        known = ", ".join(":".join(key) for key in COMPILERS)
        raise UsageError(f"nothing to compile for {asked}: what can be compiled is {known}")
    return found


def build_choice(
    artifact: str | Path,
    engine: str | None = None,
    device: str | None = None,
    profile: str | None = None,
    *,
    note: Callable[[str], None] = lambda message: None,
    dump: Path | None = None,
) -> list[CompiledEntry]:
    """Compile everything that a partial choice names; what was not named and is not there is left out.

    Args:
        artifact: an exported folder.
        engine: None for those whose compiler is installed, without torch where it has a checkpoint to run.
        device: None for all.
        profile: None for those the artifact has a graph of.
        note: called with a line for each thing left out.
        dump: folder that takes the graph after every pass, see build().

    Raises:
        UsageError: nothing is left, be it because it cannot have the activations that were asked for.
        EngineUnavailableError: the engine was named, and its compiler is not installed or has no form for this model.
        FormatError: the artifact is damaged.
    """
    manifest = read_manifest(artifact)
    graphs = {name for role in manifest.roles.values() for name in role.profiles}
    at_bytes = manifest.quantization is not None and asked_activations() == BYTES
    entries, problem = [], None
    for key in choices(engine, device, profile):
        if engine is None and key[0] == "torch" and not needs_plan(manifest):
            continue  # it runs the checkpoint
        if profile is None and key[2] not in graphs:
            note(f"{':'.join(key)} left out: the artifact has no {key[2]} graph")
            continue
        if at_bytes and key[1:] not in ENGINES[key[0]].byte_activations:
            note(f"{':'.join(key)} left out: it does not round activations to 8 bits")
            continue
        if _kept(manifest, key) == BYTES:
            note(f"{':'.join(key)} keeps activations of 8 bits: --activations float32 goes back")
        try:
            entries += build(artifact, [key], dump)
        except EngineUnavailableError as error:
            if engine is not None and profile is not None:
                raise
            problem = error
            note(f"{':'.join(key)} left out: {error}")
    if not entries and engine is not None and problem is not None:
        raise problem
    if not entries and at_bytes:
        able = (":".join(key) for key in COMPILERS if key[1:] in ENGINES[key[0]].byte_activations)
        raise UsageError(
            f"{artifact}: nothing here rounds activations to 8 bits: choose among {', '.join(able)}"
        )
    if not entries:
        raise UsageError(
            f"{artifact}: there is nothing to compile, run portlm doctor or export more profiles"
        )
    return entries


def build(
    artifact: str | Path, keys: Sequence[tuple[str, str, str]], dump: Path | None = None
) -> list[CompiledEntry]:
    """Compile an artifact and record the result in its manifest, replacing what was compiled before.

    What was compiled for activations of 8 bits is so again, unless others are asked for.

    What goes into the manifest and the trust store are digests of the bytes that the compilers wrote. No file is looked
    at again: somebody else may have put another in its place.

    Args:
        artifact: an exported folder.
        keys: entries of COMPILERS, see choices().
        dump: folder that takes the graph after every pass, as <engine>-<device>-<profile>/NN-<pass>.*; see
            passes.Dump.

    Returns:
        One entry for each key and each role that has a graph of that profile.

    Raises:
        UsageError: no role has one.
        FormatError: the artifact is damaged, or holds a graph that portlm does not write.
        EngineUnavailableError: the engine's compiler is not installed.
    """
    folder = Path(artifact)
    entries: list[CompiledEntry] = []
    for key in keys:
        manifest = read_manifest(folder)
        roles = [name for name, role in manifest.roles.items() if key[2] in role.profiles]
        if not roles:
            raise UsageError(f"{folder}: has no {key[2]} graph, export it with that profile")
        sources = [manifest.roles[name].profiles[key[2]] for name in roles]
        ensure_checked(folder, manifest, sources)
        ours = all(was_written(graph_of(manifest, source)) for source in sources)
        passes = ignore if dump is None else Dump(dump / "-".join(key))
        compiler: Compiler = resolve(COMPILERS[key])
        asked = roles[:1] if ENGINES[key[0]].one_file else roles
        with at_activations(_kept(manifest, key)):
            made = [compiler(folder, *key[1:], role=role, note=passes) for role in asked]
        new = [compiled.entry for compiled in made]
        new += [replace(new[0], role=role) for role in roles[len(asked) :]]
        manifest = read_manifest(folder)
        files = manifest.files | {name: file for compiled in made for name, file in compiled.files.items()}
        others = [e for e in manifest.compiled if (e.engine, e.device, e.profile) != key]
        manifest = replace(manifest, compiled=(*others, *new), files=dict(sorted(files.items())))
        for entry in new:
            for build in builds(manifest, entry):
                record_built(build)
        write_manifest(folder, manifest)
        graphs = [name for entry in new for name in entry.files if name.endswith(GRAPH)]
        if ours:
            for name in graphs:
                record_written(graph_of(manifest, name))
        else:  # lowering a graph from elsewhere says nothing of what ONNX Runtime makes of the result
            ensure_checked(folder, manifest, graphs, lambda line: None)  # it was said of the graph itself
        entries += new
    return entries


def _kept(manifest: Manifest, key: tuple[str, str, str]) -> str | None:
    """Which activations the entries of a key have that are to be kept; see kept_activations()."""
    return kept_activations(
        each.target for each in manifest.compiled if (each.engine, each.device, each.profile) == key
    )
