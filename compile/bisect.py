"""Looks at what an engine computes on the way to its answer, and names the first node that is wrong.

`bisect` is for an engine that does not give the model's answer. The portable graph is evaluated in float64 by onnx's
reference implementation, value by value, and the engine runs its own graph with the values of the same names exposed
as extra outputs. The first that differs, in the order of the graph, names the node.

Exposing a value keeps an engine from fusing across it, so a fault inside a fused kernel can vanish when everything
is exposed. Then values are exposed one at a time, and halving finds the first wrong one with all other fusions in
place.

`look_inside` is for an engine that does give the answer: an operator such as Relu may have turned a NaN into a number.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from portlm.agreement import within
from portlm.artifact import RoleSpec, StateSpec, TensorSpec, check_files, read_manifest
from portlm.compile.check import check_model
from portlm.compile.parity import RELATIVE_TOLERANCE, make_probe
from portlm.compile.runners import Runner
from portlm.compile.source import read_source
from portlm.errors import FormatError

Values = dict[str, np.ndarray]
TOLERANCE = (
    RELATIVE_TOLERANCE  # of a value's largest element, or of 1 if that is larger: what is allowed of a logit
)
MOVEMENT = (
    "Reshape",
    "Transpose",
    "Unsqueeze",
)  # compute nothing, and TVM cannot both fuse and expose a Transpose


@dataclass(frozen=True)
class Divergence:
    """The first value that differs from the reference.

    `error` is the largest absolute difference, `scale` the largest element of the true value, `situation` the
    step in which it happened, `alone` whether it needed the engine's fusions to happen. Where NaN or infinity is what
    is wrong, `unfinite` says so in a clause, and `error` is NaN or infinite.
    """

    node: str
    operator: str
    value: str
    error: float
    scale: float
    situation: str
    alone: bool
    unfinite: str = ""

    def __str__(self) -> str:
        how = ", only when fused with its neighbours" if self.alone else ""
        what = self.unfinite or f"differs, by {self.error:.3g} on values up to {self.scale:.3g}"
        return f"{self.node} ({self.operator}) is the first node that {what}, at the {self.situation}{how}"


@dataclass(frozen=True)
class Case:
    """One step to compare: its inputs, and for which tokens (B, T) the values mean something."""

    situation: str
    inputs: Values
    real: np.ndarray


def bisect(
    folder: str | Path, run: Runner, graph: str, tolerance: float = TOLERANCE, role: str = "decoder"
) -> Divergence | None:
    """Compare an engine with the float64 reference, node by node.

    Args:
        folder: the artifact; the role must have the portable profile.
        run: the engine under test.
        graph: what the engine runs, relative to the artifact, such as "onnx/decoder.portable.onnx".
        tolerance: relative to each value's largest element.
        role: whose graph it is.

    Returns:
        The first divergence in graph order, or None if every step agrees.

    Raises:
        UsageError: the artifact lacks the portable profile.
        FormatError: a file is damaged, or the engine returns something of another size.
    """
    root = Path(folder)
    _, manifest = read_source(root, role, "portable")
    spec = manifest.roles[role]
    check_files(root, [graph], manifest)
    subject = check_model(root / graph)
    reference = _Reference(root / spec.profiles["portable"])
    for case in _cases(reference, spec, manifest.model.vocab_size, manifest.model.context_length):
        expected = reference.values(case.inputs)
        found = _first_difference(_Subject(subject, root / graph, run, case), expected, tolerance)
        if found is not None:
            return found
    return None


def look_inside(folder: str | Path, run: Runner, graph: str, role: str = "decoder") -> Divergence | None:
    """Look for NaN and infinity among all values that an engine computes for one prompt.

    The engine runs once, with all of them exposed. The reference is evaluated only if one is not finite: infinity is
    no fault where the model's own value is too large for float32. NaN always is one, whatever the reference says, as
    operators that hide it do so on one engine and not on another.

    Args:
        folder: the artifact.
        run: the engine under test.
        graph: what the engine runs, relative to the artifact.
        role: whose graph it is.

    Returns:
        The first such value in graph order, or None if there is none.

    Raises:
        FormatError: a file is damaged.
    """
    root = Path(folder)
    manifest = read_manifest(root)
    spec = manifest.roles[role]
    check_files(root, [spec.weights, graph], manifest)
    case = _prompt(spec, manifest.model.vocab_size, manifest.model.context_length)
    subject = _Subject(check_model(root / graph), root / graph, run, case)
    odd = {
        name: value for name, value in subject.values(subject.shown).items() if not np.isfinite(value).all()
    }
    if not odd:
        return None
    expected: Values = {}
    if "portable" in spec.profiles:
        check_files(root, [spec.profiles["portable"]], manifest)
        expected = _Reference(root / spec.profiles["portable"]).values(case.inputs)
    for name, value in odd.items():
        found = subject.compare(name, value, expected.get(name))
        if found.unfinite:
            return found
    return None


def _steps(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes that compute: a weight that is turned, or put together from small numbers, is no step."""
    constant = {tensor.name for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if set(node.input) - {""} <= constant:
            constant |= set(node.output)
        else:
            found.append(node)
    return found


class _Reference:
    """The portable graph in float64: its weights are widened once, and every value that a node computes is kept."""

    def __init__(self, path: Path):
        from onnx.reference import ReferenceEvaluator

        check_model(path)
        model = onnx.load(path)
        for tensor in model.graph.initializer:
            if tensor.data_type == TensorProto.FLOAT:
                tensor.CopyFrom(
                    numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name)
                )
        for node in model.graph.node:
            for attribute in node.attribute:
                if node.op_type == "Cast":
                    attribute.i = TensorProto.DOUBLE
        self._names = [value for node in _steps(model) for value in node.output]
        self._evaluator = ReferenceEvaluator(model)

    def values(self, inputs: Values) -> Values:
        """Every value by name, float64."""
        wide = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in inputs.items()}
        with np.errstate(all="ignore"):  # what is not finite is found by who asked
            return dict(zip(self._names, self._evaluator.run(self._names, wide), strict=True))


class _Subject:
    """The engine's graph at one step, and its values by name."""

    def __init__(self, model: onnx.ModelProto, path: Path, run: Runner, case: Case):
        self._model, self._path, self._run, self._case = model, path, run, case
        self.results = frozenset(value.name for value in model.graph.output)
        self._nodes = {
            value: node
            for node in _steps(model)
            if node.op_type not in MOVEMENT
            for value in node.output
            if value
        }
        self.shown = tuple(self._nodes)

    def values(self, exposed: Sequence[str]) -> Values:
        """What the engine computes for these names, when they are exposed."""
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        model.graph.output.extend(
            onnx.ValueInfoProto(name=name) for name in exposed if name not in self.results
        )
        return dict(
            zip(exposed, self._run(model, self._path.parent, exposed, self._case.inputs), strict=True)
        )

    def difference(
        self, exposed: Sequence[str], expected: Values, tolerance: float, alone: bool = False
    ) -> Iterator[Divergence]:
        """The exposed values that differ, in order."""
        for name, actual in self.values(exposed).items():
            found = self.compare(name, actual, expected[name], alone=alone)
            if not within(found.error, tolerance * max(1.0, found.scale)):
                yield found

    def compare(
        self, name: str, actual: np.ndarray, reference: np.ndarray | None, alone: bool = False
    ) -> Divergence:
        """How far a value is from the reference, which is float64 and may lack it.

        Infinity where the true value is too large for float32 is no difference. NaN always is, also beside NaN.
        """
        expected = np.zeros(actual.shape) if reference is None else reference
        if actual.size != expected.size:
            raise FormatError(
                f"{self._path}: {name} has shape {actual.shape}, the reference {expected.shape}"
            )
        node = self._nodes[name]
        operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        actual, expected = self._meaningful(actual.reshape(expected.shape), expected)
        with np.errstate(over="ignore", invalid="ignore"):
            agreed = np.isinf(actual) & (actual == expected.astype(np.float32))
            error = float(np.abs(np.where(agreed, 0, actual - expected)).max(initial=0))
            scale = float(np.abs(np.where(agreed, 0, expected)).max(initial=0))
        unfinite = "" if np.isfinite(error) else f"gives {_kind(actual)}"
        if unfinite and reference is not None:
            unfinite += f" where the reference has {_kind(expected)}"
        return Divergence(node.name, operator, name, error, scale, self._case.situation, alone, unfinite)

    def _meaningful(self, actual: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The elements to compare, float64; with padding, those of values laid out by token only."""
        real = self._case.real
        if not real.all():
            kept = real if expected.shape[:2] == real.shape else np.zeros(expected.shape, bool)
            actual, expected = actual[kept], expected[kept]
        return actual.astype(np.float64), expected.astype(np.float64)  # booleans have no minus


def _kind(values: np.ndarray) -> str:
    if np.isfinite(values).all():
        return f"numbers up to {np.abs(values).max(initial=0):.3g}"
    return "NaN" if np.isnan(values).any() else "infinity"


def _first_difference(subject: _Subject, expected: Values, tolerance: float) -> Divergence | None:
    names = [name for name in subject.shown if name in expected]
    for found in subject.difference(names, expected, tolerance):
        return found

    def wrong(name: str) -> Divergence | None:
        return next(subject.difference([name], expected, tolerance, alone=True), None)

    last = next((name for name in names if name in subject.results and wrong(name)), None)
    if last is None:
        return None
    low, high = 0, names.index(last)  # the answer lies in names[low..high]
    while low < high:
        middle = (low + high) // 2
        if wrong(names[middle]):
            high = middle
        else:
            low = middle + 1
    return wrong(names[low])


def _prompt(role: RoleSpec, vocab_size: int, context_length: int) -> Case:
    """One row without padding, read at once before anything else."""
    probe = make_probe(vocab_size, context_length)
    ids, mask = probe.input_ids[:1], probe.attention_mask[:1]
    make = _Inputs(ids, mask, vocab_size)
    inputs = {spec.name: make.input(spec, 0, ids.shape[1]) for spec in role.inputs}
    return Case("prompt", inputs | {spec.name: make.state(spec) for spec in role.state}, mask == 1)


def _cases(reference: _Reference, role: RoleSpec, vocab_size: int, context_length: int) -> Iterator[Case]:
    """A first call and one on the state that it left, first of one row, then of a ragged batch."""
    probe = make_probe(vocab_size, context_length)
    rows = [(probe.input_ids[:1], probe.attention_mask[:1], "")]
    if any(spec.name == "attention_mask" for spec in role.inputs):
        rows.append((probe.input_ids, probe.attention_mask, "ragged "))
    for ids, mask, kind in rows:
        make = _Inputs(ids, mask, vocab_size)
        state = {spec.name: make.state(spec) for spec in role.state}
        steps = ((probe.cuts[0], "prefill"), (ids.shape[1], "cached step"))
        start = 0
        for end, step in steps if role.state else steps[1:]:
            if start == end:
                continue
            inputs = {spec.name: make.input(spec, start, end) for spec in role.inputs}
            yield Case(kind + step if role.state else f"{kind}call", inputs | state, mask[:, start:end] == 1)
            values = reference.values(inputs | state)
            for spec in role.state:
                if spec.output:
                    state[spec.name] = values[spec.output].astype(spec.dtype)
            start = end


class _Inputs:
    """Arrays for the inputs and states of any role, the same on every run."""

    def __init__(self, ids: np.ndarray, mask: np.ndarray, vocab_size: int):
        """Take the tokens of the rows (B, L), and which of them are no padding."""
        self._ids, self._mask, self._vocab_size = ids, mask, vocab_size
        self._positions = np.maximum(mask.cumsum(1) - 1, 0)
        self._rng = np.random.default_rng(0)

    def input(self, spec: TensorSpec, start: int, end: int) -> np.ndarray:
        """One input of the call that reads tokens [start, end)."""
        shape = self._shape(spec.shape, start, end)
        if spec.name == "logits_to_keep":
            return np.arange(end - start)
        if spec.name == "attention_mask":
            width = shape[-1]
            return self._mask[:, end - width : end] if width <= end else np.ones(shape, np.int64)
        if shape == (len(self._ids), end - start):
            if spec.name == "input_ids":
                return self._ids[:, start:end]
            if spec.name == "position_ids":
                return self._positions[:, start:end]
        return self._random(spec, shape)

    def state(self, spec: StateSpec) -> np.ndarray:
        """One state before the first call."""
        shape = self._shape(spec.shape, 0, 0)
        return self._random(spec, shape) if spec.initial == "given" else np.zeros(shape, spec.dtype)

    def _random(self, spec: TensorSpec | StateSpec, shape: tuple[int, ...]) -> np.ndarray:
        if np.issubdtype(np.dtype(spec.dtype), np.integer):
            if spec.name.endswith("input_ids"):
                return self._rng.integers(0, self._vocab_size, shape).astype(spec.dtype)
            # Anything else indexes a table of unknown length, but a mask, which hides nothing.
            return np.full(shape, int(spec.name.endswith("attention_mask")), spec.dtype)
        return self._rng.standard_normal(shape).astype(spec.dtype)

    def _shape(self, shape: Sequence[int | str], start: int, end: int) -> tuple[int, ...]:
        """A shape in numbers; a symbol that says nothing of tokens or rows is as long as the longest row."""
        sizes: dict[str, int] = {"batch": len(self._ids), "past": start, "sequence": end - start}
        sizes["kept"] = end - start
        other = int(self._ids.shape[1])

        def size(part: int | str) -> int:
            if isinstance(part, int):
                return part
            names = [name.strip() for name in part.split("+")]
            return sum(sizes.setdefault(name, other) for name in names)

        return tuple(size(part) for part in shape)
