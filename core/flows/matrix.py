"""Every family on every engine: small models of random weights, all roles, both profiles, against eager PyTorch.

What a cell holds is measured by the flow behind ``portlm verify``. An engine that is not here, and a graph that a
compiler refuses, are in the result with the reason. Beside it, the number of parameters of every published size.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from portlm.artifact import read_manifest
from portlm.compile.build import COMPILERS, build
from portlm.engines import ENGINES, versions_of
from portlm.errors import FormatError, PortlmError, UsageError
from portlm.files import read_json, shown, write_atomic
from portlm.flows.targets import Choice, Target
from portlm.models import FAMILIES, Config, Model

if TYPE_CHECKING:
    from portlm.flows.verify import Result

Progress = Callable[[int, int, str], None]
REFERENCE = Target("torch", "cpu", "native")
BEAMS, BEAM_TOKENS = 3, 8
_PROMPTS = ((5, 17, 3, 42, 8), (200, 6), (9,))  # token ids, which every small model has


class Cell(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One role on one engine.

    Attributes:
        target: Engine, device and profile.
        role: The function of the model.
        verdict: "agrees", "differs" or "refused".
        error: The largest difference from eager PyTorch, of logits or of what else the role gives.
        allowed: How large it may be.
        greedy: Tokens of greedy decoding that agree, and of how many; (0, 0) for a role that writes none.
        beams: The same for a beam search.
        off_device: Nodes that ran on another device than the one asked for.
        reason: Of a difference or a refusal.
    """

    target: str
    role: str
    verdict: str
    error: float | None = None
    allowed: float | None = None
    greedy: tuple[int, int] = (0, 0)
    beams: tuple[int, int] = (0, 0)
    off_device: int = 0
    reason: str = ""

    @property
    def agrees(self) -> bool:
        """Whether the answer is the model's, and all of it was computed where it was asked for."""
        return self.verdict == "agrees" and self.beams[0] == self.beams[1] and not self.off_device


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One small model.

    Attributes:
        family: Its family.
        heads: The heads it has, where the family has heads.
        key: Of what the cells depend on; another one is measured again.
        searched: What eager PyTorch finds in a beam search, token ids by prompt; none if the model writes no text.
        cells: One for each target and role.
    """

    family: str
    heads: tuple[str, ...]
    key: str
    searched: list[list[int]]
    cells: list[Cell]

    @property
    def name(self) -> str:
        """Family and heads."""
        return " ".join((self.family, "+".join(self.heads))).strip()


class Preset(msgspec.Struct, frozen=True):
    """A published size: the number of parameters that it has here, and that it must have."""

    family: str
    name: str
    counted: int
    expected: int


class Matrix(msgspec.Struct, frozen=True):
    """The whole.

    Attributes:
        variants: What was measured.
        presets: What was counted.
        absent: Target -> why it was not measured: this machine does not have it, or it was not asked for.
        versions: Of the packages that computed.
    """

    variants: list[Variant]
    presets: list[Preset]
    absent: dict[str, str]
    versions: dict[str, str]

    @property
    def wrong(self) -> list[str]:
        """What is not as it must be, one line each."""
        cells = [
            f"{variant.name} {cell.role} on {cell.target}: {cell.reason or 'another beam, or off the device'}"
            for variant in self.variants
            for cell in variant.cells
            if cell.verdict != "refused" and not cell.agrees
        ]
        return cells + [
            f"{p.name} has {p.counted:,} parameters, expected {p.expected:,}"
            for p in self.presets
            if p.counted != p.expected
        ]


def measure(
    families: Sequence[str],
    out: Path,
    *,
    only: Sequence[Choice] = (),
    seed: int = 0,
    anew: bool = False,
    progress: Progress = lambda done, total, text: None,
) -> Matrix:
    """Measure families on everything that runs here. What ``out`` already has of the same versions is kept.

    Args:
        families: Keys of FAMILIES; none for all.
        out: The folder of the results, one file for each small model.
        only: The engines to measure beside eager PyTorch; none for all that run here.
        seed: Of the weights.
        anew: Measure again what is there.
        progress: Takes how many models are behind, of how many, and what is going on.

    Raises:
        UsageError: There is no such family.
        StorageError: A result cannot be written.
    """
    for family in families:
        if family not in FAMILIES:
            raise UsageError(f"there is no family {shown(family)}: choose one of {', '.join(FAMILIES)}")
    names = list(families) or list(FAMILIES)
    here, absent = targets(only)
    versions: dict[str, str] = {}
    for target in here:
        versions |= versions_of(target.engine, target.device)
    models = [(name, config) for name in names for config in variants(name)]
    found = []
    out.mkdir(parents=True, exist_ok=True)
    for done, (name, config) in enumerate(models):
        heads = tuple(getattr(config, "heads", ()))
        path = out / ("-".join((name, *heads)).replace(":", "-") + ".json")
        empty = Variant(name, heads, _key(config, seed), [], [])
        variant = empty if anew else _kept(path, empty)
        known = {cell.target for cell in variant.cells}
        missing = [target for target in here if str(target) not in known]
        label = empty.name

        def tell(text: str, done: int = done, label: str = label) -> None:
            progress(done, len(models), f"{label}: {text}")

        if missing:
            for grown in _measured(variant, random_model(config, seed), missing, tell):
                variant = grown
                write_atomic(path, json.dumps(msgspec.to_builtins(variant), indent=2) + "\n")
        order = {str(target): place for place, target in enumerate(here)}
        cells = sorted((c for c in variant.cells if c.target in order), key=lambda c: order[c.target])
        found.append(msgspec.structs.replace(variant, cells=cells))
        progress(done + 1, len(models), f"{label}: done")
    return Matrix(found, [preset for name in names for preset in presets(name)], absent, versions)


def targets(only: Sequence[Choice] = ()) -> tuple[list[Target], dict[str, str]]:
    """Return every target that this machine can run, or those of a choice, and why the others are not among them."""
    from portlm.runtimes.probe import probe

    profiles: dict[tuple[str, str], list[str]] = {}
    for engine, device, profile in COMPILERS:
        profiles.setdefault((engine, device), []).append(profile)
    here, absent = [], {}
    for row in probe():
        engine, device = row["engine"], row["device"]
        if engine == "null":
            continue  # answers nothing
        own = {"torch": ["native"], "ort": ["portable"]}.get(engine, [])  # which need no compiler
        each = [
            Target(engine, device, profile)
            for profile in dict.fromkeys((*own, *profiles.get((engine, device), ())))
        ]
        for target in each:
            if only and target != REFERENCE and not any(choice.fits(target) for choice in only):
                absent[str(target)] = "not asked for"
            elif not row["available"]:
                absent[str(target)] = row["reason"]
            else:
                here.append(target)
    return sorted(here, key=lambda target: target != REFERENCE), absent


def variants(family: str) -> list[Config]:
    """Return the small configurations of a family: one, or one for each set of heads that its checkpoints may have."""
    config = FAMILIES[family].config_class().tiny()
    architectures: Mapping[str, tuple[str, ...]] = getattr(config, "ARCHITECTURES", {})
    if not hasattr(config, "heads"):
        return [config]
    from portlm.models.encoder_config import LABELLED

    return [
        replace(config, heads=heads, labels=("a", "b", "c") if {*heads} & {*LABELLED} else ())  # type: ignore[type-var]
        for heads in dict.fromkeys(architectures.values())
    ]


def random_model(config: Config, seed: int) -> Model:
    """Return a model whose answers are far enough apart that two engines which differ by rounding choose the same.

    Matrices have the spread 1.5 / sqrt(inputs); vectors, where gains are 1 and biases 0, move by a tenth.
    """
    import torch

    from portlm.models import build as make

    torch.manual_seed(seed)
    model = make(config)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape)
            p.copy_(1.5 * p.shape[-1] ** -0.5 * noise if p.dim() > 1 else p + 0.1 * noise)
    model.eval()
    return model


def presets(family: str) -> Iterator[Preset]:
    """Count the parameters of every published size of a family, without allocating any."""
    from portlm.models import build as make

    expected = FAMILIES[family].parameters()
    for name, config in FAMILIES[family].presets().items():
        yield Preset(family, name, make(config, "meta").num_parameters(), expected[name])


def _measured(
    variant: Variant, model: Model, missing: Sequence[Target], tell: Callable[[str], None]
) -> Iterator[Variant]:
    """Export a model, and yield the variant with the cells of one more target after each is compared."""
    from portlm.flows.export import export_checkpoint
    from portlm.models import save_model

    with tempfile.TemporaryDirectory(prefix="portlm-matrix-") as scratch:
        checkpoint, artifact = Path(scratch) / "checkpoint", Path(scratch) / "artifact"
        save_model(checkpoint, model)
        tell("export")
        export_checkpoint(checkpoint, artifact)
        roles = list(read_manifest(artifact).roles)
        for target in missing:
            key = (target.engine, target.device, target.profile)
            tell(str(target))
            try:
                if key in COMPILERS:
                    build(artifact, [key])
            except PortlmError as error:
                cells = [
                    Cell(str(target), role, "refused", reason=" ".join(str(error).split())) for role in roles
                ]
            else:
                cells, searched = _compare(artifact, target, roles)
                if target == REFERENCE:
                    variant = msgspec.structs.replace(variant, searched=searched)
                cells = [
                    msgspec.structs.replace(cell, beams=_agreement(cell, variant.searched, searched))
                    for cell in cells
                ]
            variant = msgspec.structs.replace(variant, cells=[*variant.cells, *cells])
            yield variant


def _compare(artifact: Path, target: Target, roles: Sequence[str]) -> tuple[list[Cell], list[list[int]]]:
    """The cells of one target without their beams, and the tokens of a beam search, [] if the model writes none."""
    import portlm
    from portlm.flows.verify import verify_artifact

    results = verify_artifact(artifact, [target], search=False)
    problem = next((result.problem for result in results if result.row is None), None)
    if problem is not None:
        return [Cell(str(target), role, "differs", reason=problem) for role in roles], []
    cells = [_cell(target, result) for result in results]
    if "decoder" not in roles:
        return cells, []
    with portlm.load(artifact, engine=target.engine, device=target.device, profile=target.profile) as session:
        searched = session.generate(
            [list(prompt) for prompt in _PROMPTS],
            num_beams=BEAMS,
            max_new_tokens=BEAM_TOKENS,
            ignore_eos=True,
        )
    return cells, [list(each.token_ids) for each in searched]


def _cell(target: Target, result: Result) -> Cell:
    from portlm.compile.parity import allowed_error

    row = result.row
    assert row is not None
    allowed = allowed_error(row.logit_scale or 0.0, row.precision)
    reason = result.problem or ("" if row.profile == target.profile else f"it ran the profile {row.profile}")
    verdict = "differs" if reason else "agrees"
    greedy = (row.greedy_match, row.greedy_total)
    return Cell(
        str(target), row.role, verdict, row.max_logit_error, allowed, greedy,
        off_device=len(row.fallback), reason=reason,
    )  # fmt: skip


def _agreement(cell: Cell, expected: list[list[int]], found: list[list[int]]) -> tuple[int, int]:
    """How many tokens of a beam search agree, row by row up to the first that does not."""
    if cell.role != "decoder" or cell.verdict != "agrees" or not expected:
        return 0, 0
    same = 0
    for theirs, ours in zip(expected, found, strict=True):
        pairs = enumerate(zip(theirs, ours, strict=False))
        same += next((at for at, (a, b) in pairs if a != b), min(len(theirs), len(ours)))
    return same, sum(map(len, expected))


def _key(config: Config, seed: int) -> str:
    """Of the model and of what computes it: its file, and the versions of all engines that are installed."""
    source = Path(inspect.getfile(type(config))).read_bytes()
    versions = {
        engine: versions_of(engine, device) for engine, entry in ENGINES.items() for device in entry.devices
    }
    facts = [config.to_hf(), seed, versions, hashlib.sha256(source).hexdigest()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _kept(path: Path, empty: Variant) -> Variant:
    """What a file holds of a model, nothing if it is another one."""
    if not path.exists():
        return empty
    try:
        variant = msgspec.convert(read_json(path), Variant)
    except msgspec.ValidationError as error:
        raise FormatError(f"{path} is no result of the matrix: {error}: remove it") from error
    return variant if variant.key == empty.key else empty


_HEAD = """# The matrix of families, roles and engines

By `portlm matrix`: a small model of every family with random weights, exported in both profiles and run on every
engine. A number is the largest difference from eager PyTorch with its own operators; "greedy" and "beams" are how many
tokens of all engines together agree, of greedy decoding and of a search with three beams. Whatever is not a number says
why below the table. No node ran off the device that was asked for, unless a cell says "differs".
""".splitlines()


def markdown(matrix: Matrix) -> str:
    """Return the matrix as a page: one row for each model and role, one column for each target, reasons beneath."""
    columns = list(dict.fromkeys(cell.target for variant in matrix.variants for cell in variant.cells))
    reasons: dict[str, int] = {}
    lines = [*_HEAD, "", f"| model | role | {' | '.join(f'`{name}`' for name in columns)} | greedy | beams |"]
    lines.append("|---" * (len(columns) + 4) + "|")
    for variant in matrix.variants:
        for role in dict.fromkeys(cell.role for cell in variant.cells):
            cells = {cell.target: cell for cell in variant.cells if cell.role == role}
            row = [_shown(cells.get(name), reasons) for name in columns]
            counts = [
                f"{sum(getattr(c, what)[0] for c in cells.values())}/{total}"
                if (total := sum(getattr(c, what)[1] for c in cells.values()))
                else ""
                for what in ("greedy", "beams")
            ]
            lines.append(f"| {variant.name} | {role} | {' | '.join((*row, *counts))} |")
    lines += ["", *(f"{number}. {reason}" for reason, number in reasons.items())]
    if matrix.absent:
        lines += ["", "Not measured:", ""]
        lines += [f"- `{target}`: {reason}" for target, reason in matrix.absent.items()]
    lines += ["", "| preset | family | parameters | expected |", "|---|---|---:|---:|"]
    for p in matrix.presets:
        expected = f"{p.expected:,}" + ("" if p.counted == p.expected else " (differs)")
        lines.append(f"| {p.name} | {p.family} | {p.counted:,} | {expected} |")
    lines += ["", "Measured with " + ", ".join(f"{k} {v}" for k, v in sorted(matrix.versions.items())) + "."]
    return "\n".join(lines) + "\n"


def _shown(cell: Cell | None, reasons: dict[str, int]) -> str:
    """A cell's error, or what is wrong with the number of its reason."""
    if cell is None:
        return ""
    text = f"{cell.error:.0e}" if cell.error is not None else cell.verdict
    if cell.error is not None and not cell.agrees:
        text += " differs"
    return f"{text} [{reasons.setdefault(cell.reason, len(reasons) + 1)}]" if cell.reason else text
