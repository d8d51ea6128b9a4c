"""Measures whether an engine gives the answer of the model, and writes the result into the artifact.

The model's answer is eager PyTorch in float32 on a probe: a ragged, left-padded batch that is read in several
steps (a prefill, some tokens at once on a filled cache, single tokens) and then continued greedily. Probe and
answer are kept in parity.safetensors, so a machine without PyTorch can measure its engines against them.

No engine is imported here. They are objects with the attributes and methods of portlm.engine.Engine.
"""

import datetime
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from portlm.artifact import (
    Manifest,
    ParityRow,
    read_manifest,
    refresh_files,
    replace,
    verify_files,
    write_manifest,
)
from portlm.engine import Engine
from portlm.errors import FormatError, ParityError, UsageError
from portlm.rows import Rows
from portlm.weights import load_numpy, save_tensors

REFERENCE = "parity.safetensors"
DECODER = "decoder"  # the role that is asked

PROBE_TOKENS = 12  # of the longest row
GREEDY_TOKENS = 128
TOLERANCE = 1e-4  # of a float32 logit
RELATIVE_TOLERANCE = (
    2e-6  # of the largest logit, about 16 roundings: what float32 can promise when logits are large
)


@dataclass(frozen=True)
class Probe:
    """What every engine is asked.

    input_ids (B, T) int64 and attention_mask (B, T) int64, 0 on the padding at the left; cuts are the ends of the
    steps in which the T tokens are read.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    cuts: tuple[int, ...]

    @property
    def position_ids(self) -> np.ndarray:
        """(B, T) int64: the number of tokens before each in its own row."""
        return np.maximum(self.attention_mask.cumsum(1) - 1, 0)


@dataclass(frozen=True)
class Reference:
    """The probe and the model's answer to it; N counts the tokens that are not padding, n the greedy steps.

    logits (N, V) float32, greedy (B, n) int64, margins (B, n) float32: by how much each greedy token won.
    """

    probe: Probe
    logits: np.ndarray
    greedy: np.ndarray
    margins: np.ndarray


@dataclass(frozen=True)
class Measurement:
    """A certificate row, and what is needed to judge it."""

    row: ParityRow
    limit: float  # largest logit error that float32 is allowed here
    margin: float  # by how much the reference preferred its token where greedy decoding first differs; 0 if nowhere

    def problem(self) -> str | None:
        """What is wrong, in a clause, or None.

        Only float32 is judged: what a lower precision costs is for its user to decide, from the numbers. A greedy
        difference is no fault where the reference itself was undecided within twice the allowed error.
        """
        if self.row.precision != "fp32":
            return None
        if self.row.max_logit_error > self.limit:
            return f"its logits are off by {self.row.max_logit_error:.2g}, allowed are {self.limit:.2g}"
        if self.margin > 2 * self.limit:
            agreed = f"{self.row.greedy_match} of {self.row.greedy_total}"
            return f"greedy decoding agrees on {agreed} tokens, and the difference is no near tie ({self.margin:.2g})"
        return None


@dataclass(frozen=True)
class Verification:
    """What was measured now, and what the artifact's certificate says, if it has a row for this engine."""

    measured: ParityRow
    recorded: ParityRow | None


def make_probe(vocab_size: int, context_length: int) -> Probe:
    """A probe that fits the model: three rows of different lengths, read in four steps."""
    T = max(1, min(PROBE_TOKENS, context_length // 2))
    lengths = (T, max(1, 2 * T // 3), max(1, T // 3))
    ids = np.arange(3 * T, dtype=np.int64).reshape(3, T) * 7919 % vocab_size  # a prime: no short repetition
    mask = np.array([[0] * (T - n) + [1] * n for n in lengths], dtype=np.int64)
    cuts = sorted({max(1, T // 2), max(1, T - 2), max(1, T - 1), T})
    return Probe(ids * mask, mask, tuple(cuts))


def make_reference(engine: Engine, vocab_size: int, context_length: int) -> Reference:
    """Ask the reference engine, eager PyTorch in float32."""
    probe = make_probe(vocab_size, context_length)
    steps = min(GREEDY_TOKENS, context_length - probe.input_ids.shape[1])
    logits, greedy, margins = _answer(engine, probe, steps)
    return Reference(probe, logits, greedy, margins)


def measure(engine: Engine, reference: Reference) -> Measurement:
    """Compare an engine with the reference.

    Raises:
        ParityError: the engine's logits are not finite.
    """
    logits, greedy, own_margins = _answer(engine, reference.probe, reference.greedy.shape[1])
    expected = reference.logits
    if logits.shape != expected.shape or not (np.isfinite(logits).all() and np.isfinite(own_margins).all()):
        raise ParityError(
            f"{_label(engine)}: logits have shape {logits.shape} or are not finite, see `portlm verify`"
        )
    same = np.logical_and.accumulate(greedy == reference.greedy, axis=1)  # up to each row's first difference
    matched = same.sum(1)
    ended = matched < greedy.shape[1]
    margins = reference.margins[ended, matched[ended]]
    placement = engine.placement()
    row = ParityRow(
        engine=engine.name,
        device=engine.device,
        profile=engine.profile,
        precision=engine.precision,
        max_logit_error=float(np.abs(logits - expected).max()),
        kl=_divergence(expected, logits),
        top1=float((logits.argmax(1) == expected.argmax(1)).mean()),
        greedy_match=int(matched.min()),  # of the prompt that differs first
        greedy_total=greedy.shape[1],
        placement=dict(placement.nodes),
        fallback=tuple(placement.fallback),
        versions=engine.versions(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )
    limit = max(TOLERANCE, RELATIVE_TOLERANCE * float(np.abs(expected).max()))
    return Measurement(row, limit, float(margins.max(initial=0.0)))


def certify(
    folder: str | Path, engines: Iterable[Engine], reference: Engine | None = None
) -> list[ParityRow]:
    """Measure engines and write their rows into the artifact's certificate, replacing older rows of the same engines.

    Args:
        folder: the artifact.
        engines: measured in order.
        reference: eager PyTorch; its answer is stored. None uses the answer that the artifact already has.

    Returns:
        The new rows.

    Raises:
        UsageError: there is no stored answer and no reference engine.
        ParityError: an engine does not give the model's answer. The rows of those before it are kept.
        FormatError: the stored answer is damaged.
    """
    root = Path(folder)
    manifest = read_manifest(root)
    if reference is not None:
        answer = make_reference(reference, manifest.model.vocab_size, manifest.model.context_length)
        save_reference(root, answer)
        manifest = refresh_files(root, manifest, [REFERENCE])
        write_manifest(root, manifest)
    else:
        answer = load_reference(root, manifest)
    rows: list[ParityRow] = []
    for engine in engines:
        measurement = measure(engine, answer)
        if problem := measurement.problem():
            raise ParityError(f"{_label(engine)}: {problem}; `portlm verify --bisect` names the node")
        rows.append(measurement.row)
        others = tuple(row for row in manifest.parity if _key(row) != _key(measurement.row))
        manifest = replace(manifest, parity=(*others, measurement.row))
        write_manifest(root, manifest)
    return rows


def recheck(folder: str | Path, engine: Engine) -> Verification:
    """Measure an engine on this machine against the answer stored in the artifact. Nothing is written.

    Raises:
        UsageError: the artifact holds no answer.
        ParityError: the engine does not give the model's answer here.
        FormatError: the stored answer is damaged.
    """
    root = Path(folder)
    manifest = read_manifest(root)
    measurement = measure(engine, load_reference(root, manifest))
    if problem := measurement.problem():
        raise ParityError(f"{_label(engine)}: {problem}; `portlm verify --bisect` names the node")
    recorded = [row for row in manifest.parity if _key(row) == _key(measurement.row)]
    return Verification(measurement.row, recorded[0] if recorded else None)


def save_reference(folder: Path, reference: Reference) -> None:
    """Write parity.safetensors."""
    tensors = {
        "input_ids": reference.probe.input_ids,
        "attention_mask": reference.probe.attention_mask,
        "cuts": np.array(reference.probe.cuts, dtype=np.int64),
        "logits": reference.logits,
        "greedy": reference.greedy,
        "margins": reference.margins,
    }
    save_tensors(folder / REFERENCE, tensors, {"made_with": f"eager PyTorch, portlm {version('portlm')}"})


def load_reference(folder: Path, manifest: Manifest) -> Reference:
    """Read parity.safetensors, checked against the manifest and against itself.

    Raises:
        UsageError: there is none.
        FormatError: it is damaged or belongs to another model.
    """
    if REFERENCE not in manifest.files:
        raise UsageError(
            f"{folder}: holds no reference answer; run `portlm verify --certify` where PyTorch is installed"
        )
    verify_files(folder, [REFERENCE])
    path = folder / REFERENCE
    tensors = load_numpy(path)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    dtypes = {name: tensor.dtype.name for name, tensor in tensors.items()}
    if dtypes != dict.fromkeys(("input_ids", "attention_mask", "cuts", "greedy"), "int64") | {
        "logits": "float32",
        "margins": "float32",
    }:
        raise FormatError(f"{path}: holds other tensors than a reference answer has")
    ids, mask, cuts = (
        tensors["input_ids"],
        tensors["attention_mask"],
        tuple(int(cut) for cut in tensors["cuts"].ravel()),
    )
    vocab, context = manifest.model.vocab_size, manifest.model.context_length
    if (
        ids.ndim != 2
        or shapes["attention_mask"] != ids.shape
        or not np.isin(mask, (0, 1)).all()
        or not ((ids >= 0) & (ids < vocab)).all()
        or shapes["logits"] != (int(mask.sum()), vocab)
        or tensors["greedy"].ndim != 2
        or len(tensors["greedy"]) != len(ids)
        or shapes["margins"] != shapes["greedy"]
        or ids.shape[1] + shapes["greedy"][1] > context
        or list(cuts) != sorted(set(cuts))
        or not cuts
        or cuts[0] < 1
        or cuts[-1] != ids.shape[1]
    ):
        raise FormatError(f"{path}: its tensors do not fit each other or this model")
    return Reference(Probe(ids, mask, cuts), tensors["logits"], tensors["greedy"], tensors["margins"])


def _answer(
    engine: Engine, probe: Probe, steps: int, role: str = DECODER
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of the probe's tokens (N, V), then greedy tokens (B, steps) and by how much each won (B, steps)."""
    mask, parts, start = probe.attention_mask, [], 0
    rows = Rows(engine, len(mask), role)
    for end in probe.cuts:
        ids = np.ascontiguousarray(probe.input_ids[:, start:end])
        logits = rows.read(ids, np.ascontiguousarray(mask[:, start:end]), every=True)
        parts.append(np.array(logits, dtype=np.float32))
        start = end
    read = np.concatenate(parts, axis=1)
    last = read[:, -1]
    tokens: list[np.ndarray] = []
    margins: list[np.ndarray] = []
    while len(tokens) < steps:
        best = last.argmax(1)
        second = np.partition(last, -2, axis=1)[:, -2] if last.shape[1] > 1 else last[:, 0]
        tokens.append(best)
        margins.append(last.max(1) - second)
        if len(tokens) == steps:
            break
        last = np.array(rows.next(best), dtype=np.float32)
    empty = np.zeros((len(mask), 0))
    return (
        read[probe.attention_mask == 1],
        (np.stack(tokens, 1) if tokens else empty).astype(np.int64),
        (np.stack(margins, 1) if margins else empty).astype(np.float32),
    )


def _divergence(expected: np.ndarray, logits: np.ndarray) -> float:
    """Mean KL(reference || engine) over positions in nats, computed in float64."""
    log_p, log_q = _log_softmax(expected), _log_softmax(logits)
    return max(0.0, float((np.exp(log_p) * (log_p - log_q)).sum(1).mean()))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def _key(row: ParityRow) -> tuple[str, str, str, str]:
    return row.engine, row.device, row.profile, row.precision


def _label(engine: Engine) -> str:
    return f"{engine.name}:{engine.device}, profile {engine.profile}"
