"""Measures whether an engine gives the answer of the model, and writes the result into the artifact.

The model's answer is eager PyTorch in float32 on a probe of each role. A decoder reads a ragged, left-padded batch in
several steps (a prefill, some tokens at once on a filled cache, single tokens) and continues it greedily, after the
encoder has read sources if it is given what that makes of them; any other role is called once or twice
(parity_calls.py). Probe and answer are kept (parity_file.py), so a machine without PyTorch can measure its engines
against them.

No engine is imported here. They are objects with the attributes and methods of portlm.engine.Engine.
"""

import dataclasses
import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from portlm.agreement import within
from portlm.artifact import (
    ParityRow,
    read_manifest,
    refresh_files,
    replace,
    write_manifest,
)
from portlm.compile.parity_calls import (
    Calls,
    answer_calls,
    continues_text,
    make_calls,
    make_source,
    meaningful,
)
from portlm.compile.parity_file import DECODER, REFERENCE, Probe, Reference, load_reference, save_reference
from portlm.engine import Engine
from portlm.errors import FormatError, ParityError
from portlm.memory import giver_of, remembered
from portlm.quantization import BYTE_CACHE, FIFTEEN_BITS
from portlm.rows import Rows, rows_shown

Pair = tuple[np.ndarray, np.ndarray]

PROBE_TOKENS = 12  # of the longest row
GREEDY_TOKENS = 128
TOLERANCE = 1e-4  # of a float32 logit
RELATIVE_TOLERANCE = 6e-5  # of the largest logit, see allowed_error
ROUNDED_TOLERANCE = 1e-2  # the same for activations of 15 bits
# Nats for each token, with activations of 15 bits: of the same 90 models the largest was 2.6e-5.
ALLOWED_DIVERGENCE = 1e-4


def allowed_error(scale: float, precision: str = "fp32") -> float:
    """How far a logit may be from the model's answer.

    In float32: 1e-4, or 6e-5 of the largest logit if that is more.

    Rounding grows with what is rounded. Measured on 93 random models of three families, heads 64 to 256 wide, logits
    up to 31: eager PyTorch is up to 3.0e-5 of the largest logit from the same model in float64, and engines up to
    5.2e-5 from eager PyTorch (most of them below 1e-5), as attention that is sharp enough turns the rounding of large
    scores into another mixture. One matrix rounded to half precision moves 1.1e-4 of it. Faults that move less than
    rounding does, such as an epsilon of 1e-5 for 1e-6 (3.1e-5 at logits of 29), cannot be told from it by logits.

    With activations of 15 bits: 1e-2 of the largest logit, and see ALLOWED_DIVERGENCE. Measured in the same way on 90
    random models with quantized weights, logits up to 31: up to 6.8e-3, in nine of ten below 1e-3, half of them 2e-4.

    Args:
        scale: the largest absolute value that the model itself gives.
        precision: "fp32", "a15" or "kv8".
    """
    relative = (RELATIVE_TOLERANCE if precision == "fp32" else ROUNDED_TOLERANCE) * scale
    return TOLERANCE if relative < TOLERANCE else relative  # also NaN, which no error is within


@dataclass(frozen=True)
class Measurement:
    """A certificate row, and what is needed to judge it."""

    row: ParityRow
    margin: float  # by how much the reference preferred its token where greedy decoding first differs; 0 if nowhere

    def problem(self) -> str | None:
        """What is wrong, in a clause, or None.

        Float32 is judged, and 15 bits, which are meant to stand for it: what a lower precision costs is for its user to
        decide, from the numbers. A greedy difference is no fault where the reference itself was undecided within twice
        the allowed error.
        """
        if self.row.precision not in ("fp32", FIFTEEN_BITS, BYTE_CACHE):
            return None
        scale = self.row.logit_scale or 0.0
        limit = allowed_error(scale, self.row.precision)
        if self.row.precision != "fp32" and not within(self.row.kl, ALLOWED_DIVERGENCE):
            return (
                f"its answers diverge by {self.row.kl:.2g} nats a token, allowed are {ALLOWED_DIVERGENCE:.2g}"
            )
        if not within(self.row.max_logit_error, limit):
            return (
                f"its logits are off by {self.row.max_logit_error:.2g}, allowed are {limit:.2g} "
                f"for logits up to {scale:.3g}"
            )
        if not within(self.margin, 2 * limit):
            agreed = f"{self.row.greedy_match} of {self.row.greedy_total}"
            return f"greedy decoding agrees on {agreed} tokens, and the difference is no near tie ({self.margin:.2g})"
        return None


@dataclass(frozen=True)
class Verification:
    """What was measured now, and what the artifact's certificate says, if it has a row for this engine."""

    measured: ParityRow
    recorded: ParityRow | None


def make_probe(vocab_size: int, context_length: int, shown: int = 0) -> Probe:
    """A probe that fits the model: three rows of different lengths, read in four steps.

    Where a model is shown pictures, every other token is one of so many rows of it (portlm.rows).
    """
    T = max(1, min(PROBE_TOKENS, context_length // 2))
    lengths = (T, max(1, 2 * T // 3), max(1, T // 3))
    ids = np.arange(3 * T, dtype=np.int64).reshape(3, T) * 7919 % vocab_size  # a prime: no short repetition
    if shown:
        ids[:, 1::2] = vocab_size + np.arange(ids[:, 1::2].size).reshape(3, -1) * 7919 % shown
    mask = np.array([[0] * (T - n) + [1] * n for n in lengths], dtype=np.int64)
    cuts = sorted({max(1, T // 2), max(1, T - 2), max(1, T - 1), T})
    return Probe(ids * mask, mask, tuple(cuts))


def make_reference(
    engine: Engine, vocab_size: int, context_length: int, role: str = DECODER
) -> Reference | Calls:
    """Ask the reference engine, eager PyTorch in float32.

    Raises:
        ParityError: its answer holds NaN or infinity, with which nothing can agree.
    """
    spec, source = engine.roles[role], {}
    if role == DECODER and (giver := giver_of(engine.roles)):
        source = make_source(engine.roles[giver], vocab_size, context_length)
    elif not continues_text(spec):
        calls = make_calls(spec, vocab_size, context_length)
        answers = answer_calls(engine, role, calls)
        _check_finite(engine, role, *(value for answer in answers for value in answer.values()))
        return Calls(calls.given, calls.inputs, answers)
    probe = dataclasses.replace(make_probe(vocab_size, context_length, rows_shown(spec)), source=source)
    steps = min(GREEDY_TOKENS, context_length - probe.input_ids.shape[1])
    logits, greedy, margins = _answer(engine, probe, steps, role)
    _check_finite(engine, role, logits, margins)
    return Reference(probe, logits, greedy, margins)


def _check_finite(engine: Engine, role: str, *values: np.ndarray) -> None:
    if not all(np.isfinite(value).all() for value in values):
        raise ParityError(
            f"{_label(engine)}: the model's own answer as {role} holds NaN or infinity, so no engine can be compared "
            "with it; look for weights or values that overflow float32"
        )


def measure(engine: Engine, reference: Reference | Calls, role: str = DECODER) -> Measurement:
    """Compare an engine with the reference.

    For a role that does not continue a text, max_logit_error and logit_scale are of the output that comes closest to
    what it is allowed, KL and top-1 agreement of outputs called logits (0 and 1 where there are none), and no tokens
    are compared.

    Raises:
        ParityError: what the engine gives is not finite, or of another shape.
        FormatError: the reference says nothing of an output.
    """
    if isinstance(reference, Calls):
        return _measure_calls(engine, reference, role)
    logits, greedy, own_margins = _answer(engine, reference.probe, reference.greedy.shape[1], role)
    expected = reference.logits
    if logits.shape != expected.shape or not (np.isfinite(logits).all() and np.isfinite(own_margins).all()):
        raise ParityError(
            f"{_label(engine)}: logits have shape {logits.shape} or are not finite, see `portlm verify`"
        )
    same = np.logical_and.accumulate(greedy == reference.greedy, axis=1)  # up to each row's first difference
    matched = same.sum(1)
    ended = matched < greedy.shape[1]
    margins = reference.margins[ended, matched[ended]]
    # The prompt that differs first counts.
    tokens = int(matched.min()), greedy.shape[1]
    return _measurement(engine, role, {"logits": [(expected, logits)]}, tokens, float(margins.max(initial=0)))


def _measure_calls(engine: Engine, reference: Calls, role: str) -> Measurement:
    spec = engine.roles[role]
    pairs: dict[str, list[Pair]] = {}
    for inputs, expected, found in zip(
        reference.inputs, reference.answers, answer_calls(engine, role, reference), strict=True
    ):
        for name, value in expected.items():
            if name not in found or found[name].shape != value.shape or not np.isfinite(found[name]).all():
                raise ParityError(f"{_label(engine)}: {role} gives a {name} of another shape, or not finite")
            pair = meaningful(spec, name, inputs, value), meaningful(spec, name, inputs, found[name])
            pairs.setdefault(name, []).append(pair)
    return _measurement(engine, role, pairs, (0, 0), 0.0)


def _measurement(
    engine: Engine, role: str, pairs: Mapping[str, Sequence[Pair]], tokens: tuple[int, int], margin: float
) -> Measurement:
    """A row from finite (expected, found) values of each output, and the greedy tokens that agree of all."""
    for name, each in pairs.items():
        if not any(expected.size for expected, _ in each):  # of padding alone, with which everything agrees
            raise FormatError(f"{_label(engine)}: the stored answer as {role} has no {name} to compare with")
    placement, logits = engine.placement(), pairs.get("logits", ())
    distances = [_distance(each) for each in pairs.values()]
    error, scale = max(distances, key=lambda pair: pair[0] / allowed_error(pair[1], engine.precision))
    agree = [expected.argmax(1) == found.argmax(1) for expected, found in logits]
    row = ParityRow(
        engine=engine.name,
        device=engine.device,
        profile=engine.profile,
        precision=engine.precision,
        max_logit_error=error,
        kl=max((_divergence(expected, found) for expected, found in logits), default=0.0),
        top1=float(np.concatenate(agree).mean()) if agree else 1.0,
        greedy_match=tokens[0],
        greedy_total=tokens[1],
        placement=dict(placement.nodes),
        fallback=tuple(placement.fallback),
        versions=engine.versions(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        role=role,
        logit_scale=scale,
    )
    return Measurement(row, margin)


def _distance(pairs: Sequence[Pair]) -> tuple[float, float]:
    """The largest difference of (expected, found) values, and the largest expected one."""
    wide = [(expected.astype(np.float64), found) for expected, found in pairs]
    error = max(float(np.abs(found - expected).max(initial=0)) for expected, found in wide)
    return error, max(float(np.abs(expected).max(initial=0)) for expected, _ in wide)


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
        ParityError: the model's own answer is not finite, or an engine does not give it. The rows of those before it
            are kept.
        FormatError: the stored answer is damaged.
    """
    root = Path(folder)
    manifest = read_manifest(root)
    if reference is not None:
        sizes = manifest.model.vocab_size, manifest.model.context_length
        answers = {role: make_reference(reference, *sizes, role) for role in manifest.roles}
        save_reference(root, answers)
        manifest = refresh_files(root, manifest, [REFERENCE])
        write_manifest(root, manifest)
    else:
        answers = load_reference(root, manifest)
    rows: list[ParityRow] = []
    for engine in engines:
        found = [_judged(measure(engine, answer, role), engine) for role, answer in answers.items()]
        record(root, found)
        rows += found
    return rows


def record(folder: str | Path, rows: Iterable[ParityRow]) -> None:
    """Write rows into the artifact's certificate, replacing older rows of the same engines."""
    manifest = read_manifest(folder)
    for row in rows:
        others = tuple(other for other in manifest.parity if _key(other) != _key(row))
        manifest = replace(manifest, parity=(*others, row))
    write_manifest(Path(folder), manifest)


def recheck(folder: str | Path, engine: Engine) -> list[Verification]:
    """Measure an engine on this machine against the answers stored in the artifact. Nothing is written.

    Returns:
        One for each role.

    Raises:
        UsageError: the artifact holds no answer.
        ParityError: the engine does not give the model's answer here.
        FormatError: the stored answer is damaged.
    """
    root = Path(folder)
    manifest = read_manifest(root)
    found = []
    for role, answer in load_reference(root, manifest).items():
        row = _judged(measure(engine, answer, role), engine)
        recorded = [other for other in manifest.parity if _key(other) == _key(row)]
        found.append(Verification(row, recorded[0] if recorded else None))
    return found


def _judged(measurement: Measurement, engine: Engine) -> ParityRow:
    if problem := measurement.problem():
        raise ParityError(f"{_label(engine)}: {problem}; `portlm verify --bisect` names the node")
    return measurement.row


def _answer(
    engine: Engine, probe: Probe, steps: int, role: str = DECODER
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of the probe's tokens (N, V), then greedy tokens (B, steps) and by how much each won (B, steps)."""
    mask, parts, start = probe.attention_mask, [], 0
    given = remembered(engine, probe.source) if probe.source else None
    rows = Rows(engine, len(mask), role, given)
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
        with np.errstate(invalid="ignore"):  # infinity minus infinity; who asked looks for what is not finite
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


def _key(row: ParityRow) -> tuple[str, str, str, str, str]:
    return row.engine, row.device, row.profile, row.precision, row.role


def _label(engine: Engine) -> str:
    return f"{engine.name}:{engine.device}, profile {engine.profile}"
