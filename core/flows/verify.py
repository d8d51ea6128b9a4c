"""Does every engine give the model's answer on this machine? Measured, written down, and measured again.

The first time, eager PyTorch on its own operators answers a probe, the answer is stored in the artifact, and every
engine's distance from it becomes a row of the certificate in the manifest. Afterwards the same probe is put to the
engines again, wherever the artifact has gone, and no PyTorch is needed. An engine that differs is searched for the
first node that does; in one that agrees, inner values are looked at, for NaN that an operator on the way hides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from portlm.artifact import Manifest, ParityRow, check_files, read_manifest
from portlm.engines import ENGINES, resolve
from portlm.errors import EngineUnavailableError, ParityError, PortlmError, UsageError
from portlm.flows.targets import Choice, Target
from portlm.plan import has_code, needs_plan
from portlm.quantization import BYTES, EIGHT_BITS, FLOATS, at_activations
from portlm.trust import is_ours

if TYPE_CHECKING:
    from portlm.compile.bisect import Divergence
    from portlm.compile.parity import Verification
    from portlm.engine import Engine

Progress = Callable[[str], None]
EVERYTHING = Choice()


@dataclass(frozen=True)
class Result:
    """What was found for one target.

    Attributes:
        target: engine, device and profile.
        row: what was measured, None if the engine could not be measured or does not give the model's answer.
        recorded: the certificate's row for it, None if it has none.
        problem: what is wrong in one line, None if nothing is.
        node: the first node that is wrong, where the search found one.
    """

    target: Target
    row: ParityRow | None = None
    recorded: ParityRow | None = None
    problem: str | None = None
    node: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**msgspec.to_builtins(self), "target": str(self.target)}


def verify_artifact(
    folder: str | Path,
    targets: Sequence[Target] | None = None,
    *,
    only: Choice = EVERYTHING,
    certify: bool = False,
    search: bool = True,
    progress: Progress = lambda message: None,
) -> list[Result]:
    """Check every file of an artifact, then every engine against the stored answer of eager PyTorch.

    Graphs from elsewhere are first read in a child process, where one made to harm its reader can harm nothing else.

    Args:
        folder: the artifact.
        targets: what to check; None for every engine that runs here and has what it needs in the artifact.
        only: where no targets are given, those of them that fit.
        certify: make the answer and the certificate anew, as happens by itself when there is none. The answer of a
            module whose code is not here stays the one that was taken when it was exported.
        search: open each graph again with its inner values exposed: on a difference to find the first node that
            differs, otherwise to see for one prompt that all of them are finite.
        progress: called with a line before each step.

    Returns:
        One result per target and role. A problem is in the result, not raised.

    Raises:
        FormatError: a file is missing, truncated or altered.
        EngineUnavailableError: there is no stored answer and no PyTorch to make one.
        UsageError: there is nothing to check.
    """
    from portlm.compile import parity
    from portlm.compile.isolated import ensure_checked, weights_of

    root = Path(folder)
    progress("files")
    manifest = check_files(root)
    ensure_checked(root, manifest, weights_of(manifest))
    if targets is not None:
        chosen = list(targets)
    else:
        chosen = [target for target in ready_targets(manifest, progress) if only.fits(target)]
    if not chosen:
        raise UsageError(
            f"{root}: no engine of this machine can run it that way; run `portlm compile` first, or see doctor"
        )
    known = parity.REFERENCE in manifest.files
    if not known or (certify and has_code(manifest)):  # a module's own answer was taken when it was exported
        progress("the answer of eager PyTorch")
        with closing(_open(root, Target("torch", "cpu", _reference_profile(manifest)))) as engine:
            parity.certify(root, [], reference=cast("Engine", PlainPyTorch(engine)))
    certify = certify or not known or not manifest.parity
    results = []
    for target in chosen:
        progress(str(target))
        results += _check(root, target, certify, search, progress)
    return results


def _reference_profile(manifest: Manifest) -> str:
    """The model's own code; where there is none, the graph of standard operators, which says the same in PyTorch's."""
    return "native" if has_code(manifest) else "portable"


def ready_targets(manifest: Manifest, progress: Progress = lambda message: None) -> list[Target]:
    """Return what this machine has engines for and the artifact has graphs or compiled code for.

    Args:
        manifest: of the artifact.
        progress: called with a line for each engine that the artifact was compiled for and this machine lacks.
    """
    from portlm.runtimes.probe import probe

    compiled = {(entry.engine, entry.device, entry.profile) for entry in manifest.compiled}
    profiles = [role.profiles for role in manifest.roles.values()]
    targets = []
    for row in probe():
        engine, device = row["engine"], row["device"]
        if not row["available"]:
            if any(key[:2] == (engine, device) for key in compiled):
                progress(
                    f"{engine}:{device} is compiled but not checked, it does not run here: {row['reason']}"
                )
            continue
        if engine == "torch":
            plans = [name for name in ("fused", "portable") if all(name in each for each in profiles)]
            wanted = [*(plans if needs_plan(manifest) else ()), *(["native"] if has_code(manifest) else ())]
            targets += [Target(engine, device, name) for name in wanted]
            continue
        if engine == "ort" and profiles and all("portable" in profile for profile in profiles):
            targets.append(Target(engine, device, "portable"))
        for key in sorted(compiled):
            if key[:2] == (engine, device):
                if _is_foreign(manifest, key):
                    progress(
                        f"{Target(*key)} is not checked: it was compiled on another machine; run `portlm compile`"
                    )
                else:
                    targets.append(Target(*key))
    return targets


def _is_foreign(manifest: Manifest, key: tuple[str, str, str]) -> bool:
    """Say whether compiled files hold machine code that this machine did not make, which no engine loads."""
    entries = [entry for entry in manifest.compiled if (entry.engine, entry.device, entry.profile) == key]
    return not all(is_ours(manifest, entry) for entry in entries)


class PlainPyTorch:
    """The torch engine with portlm's kernels switched off: PyTorch's own operators, which every engine must match."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run(self, *arguments: Any) -> Any:
        """Run one call on the references of all ops."""
        from portlm.ops.kernel_op import without_kernels

        with without_kernels():
            return self._engine.run(*arguments)


def _open(root: Path, target: Target) -> Engine:
    import portlm

    return portlm.load(root, engine=target.engine, device=target.device, profile=target.profile).engine


def _check(root: Path, target: Target, certify: bool, search: bool, progress: Progress) -> list[Result]:
    from portlm.compile import parity

    exact, precision = target, "fp32"
    try:
        with closing(
            _open(root, target)
        ) as engine:  # also registers the device and the kernels that runners need
            exact, precision = replace(target, profile=engine.profile), engine.precision
            found = parity.recheck(root, engine)
    except ParityError as error:
        problem = str(error)
    except PortlmError as error:
        return [Result(target, problem=str(error))]
    else:
        with _compiling_at(precision):
            return _inside(root, target, exact, found, certify, search, progress)
    node = None
    if search:
        progress(f"{target} differs: looking for the first node that does")
        with _compiling_at(precision):
            node = next((str(node) for _, node in _nodes(root, exact, precision)), None)
    return [Result(target, problem=problem, node=node)]


def _compiling_at(precision: str) -> AbstractContextManager[None]:
    """Let graphs that are compiled to look into them have the activations of an engine of a precision."""
    return at_activations(BYTES if precision == EIGHT_BITS else FLOATS)


def _inside(
    root: Path,
    target: Target,
    exact: Target,
    found: Sequence[Verification],
    certify: bool,
    search: bool,
    progress: Progress,
) -> list[Result]:
    """The results of an engine that gives the model's answer, unless an inner value is not finite."""
    from portlm.compile import parity

    nodes: dict[str, str] = {}
    if search:
        for role, node in _nodes(root, exact, None):
            if isinstance(node, PortlmError):
                progress(f"{target}: its inner values were not looked at: {node}")
            else:
                nodes[role] = str(node)
    if certify and not nodes:
        parity.record(root, [each.measured for each in found])
    problem = "its answer is right, but a value on the way to it is not finite"
    return [
        Result(
            target,
            each.measured,
            None if certify else each.recorded,
            problem if each.measured.role in nodes else None,
            nodes.get(each.measured.role),
        )
        for each in found
    ]


def _nodes(
    root: Path, target: Target, precision: str | None
) -> Iterator[tuple[str, Divergence | PortlmError]]:
    """For each role, the first node that is wrong, if there is one, or why it cannot be looked for.

    Args:
        root: the artifact.
        target: with the profile that the engine really has.
        precision: of the engine: compare with the reference. None, and where answers are not judged, looks for values
            that are not finite.
    """
    from portlm.compile import bisect as search
    from portlm.compile.parity import ROUNDED_TOLERANCE

    manifest, runner = read_manifest(root), ENGINES[target.engine].runner
    for name, role in manifest.roles.items():
        if not runner or target.profile not in role.profiles:  # the model's own code has no graph
            continue
        try:
            graph = _graph(manifest, target, name)
            run = resolve(runner)(target.device, target.profile)
            if precision in (None, EIGHT_BITS):
                node = search.look_inside(root, run, graph, role=name)
            else:
                tolerance = search.TOLERANCE if precision == "fp32" else ROUNDED_TOLERANCE
                node = search.bisect(root, run, graph, tolerance, role=name)
        except (EngineUnavailableError, UsageError) as error:
            yield name, error
            continue
        if node is not None:
            yield name, node


def _graph(manifest: Manifest, target: Target, role: str) -> str:
    """The graph that an engine runs, or that it was compiled from, relative to the artifact.

    Raises:
        UsageError: it is not in the artifact.
    """
    wanted = (target.engine, target.device, target.profile, role)
    for entry in manifest.compiled:
        if (entry.engine, entry.device, entry.profile, entry.role) == wanted:
            for file in entry.files:
                if file.endswith(".onnx"):
                    return file
    if target.engine == "ort" and (target.device, target.profile) in ENGINES["ort"].compilers:
        raise UsageError("it was compiled at first use, outside the artifact; run `portlm compile`")
    return manifest.roles[role].profiles[target.profile]
