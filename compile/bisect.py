"""Finds the first node whose result is wrong, when an engine does not give the model's answer.

The portable graph is evaluated in float64 by onnx's reference implementation, value by value, and the engine runs
its own graph with the values of the same names exposed as extra outputs. The first that differs, in the order of
the graph, names the node.

Exposing a value keeps an engine from fusing across it, so a fault inside a fused kernel can vanish when everything
is exposed. Then values are exposed one at a time, and halving finds the first wrong one with all other fusions in
place.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from portlm.artifact import RoleSpec, StateSpec, TensorSpec, check_files
from portlm.compile.check import check_model
from portlm.compile.parity import make_probe
from portlm.compile.source import read_source
from portlm.errors import EngineUnavailableError, FormatError
from portlm.trust import private_scratch

Values = dict[str, np.ndarray]
Runner = Callable[[onnx.ModelProto, Path, Sequence[str], Mapping[str, np.ndarray]], list[np.ndarray]]
"""(graph with the wanted values among its outputs, folder of its weight file, wanted names, inputs) -> values."""

TOLERANCE = 2e-5  # of a value's largest element, or of 1 if that is larger; float32 noise is below 1e-5 here
MOVEMENT = (
    "Reshape",
    "Transpose",
    "Unsqueeze",
)  # compute nothing, and TVM cannot both fuse and expose a Transpose


@dataclass(frozen=True)
class Divergence:
    """The first value that differs from the reference.

    `error` is the largest absolute difference, `scale` the largest element of the true value, `situation` the
    step in which it happened, `alone` whether it needed the engine's fusions to happen.
    """

    node: str
    operator: str
    value: str
    error: float
    scale: float
    situation: str
    alone: bool

    def __str__(self) -> str:
        how = ", only when fused with its neighbours" if self.alone else ""
        return (
            f"{self.node} ({self.operator}) is the first node that differs, by {self.error:.3g} on values up to "
            f"{self.scale:.3g}, at the {self.situation}{how}"
        )


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
        found = _first_difference(_Subject(subject, root / graph, run, case, expected, tolerance))
        if found is not None:
            return found
    return None


def ort_runner(device: str = "cpu", profile: str = "") -> Runner:
    """Run graphs in ONNX Runtime as its engine does, on "cpu", "cuda" or "vulkan", the same for every profile.

    For Vulkan the WebGPU plugin must be registered in this process, which opening the engine does.
    """
    from portlm.ort_support import EXTERNAL_FOLDER, open_session, session_options, webgpu_devices

    opened: dict[tuple[str, ...], Any] = {}

    def run(
        model: onnx.ModelProto, folder: Path, names: Sequence[str], inputs: Mapping[str, np.ndarray]
    ) -> list[np.ndarray]:
        key = _outputs(model)
        if key not in opened:
            devices = webgpu_devices() if device == "vulkan" else [None]
            if not devices:
                raise EngineUnavailableError(
                    "ort:vulkan: no WebGPU device is registered, open the engine first"
                )
            options = session_options(device, devices[0], None, allow_fallback=False)
            options.add_session_config_entry(EXTERNAL_FOLDER, str(folder))
            opened[key] = open_session(model.SerializeToString(), options, device)
        results: list[np.ndarray] = opened[key].run(list(names), dict(inputs))
        return results

    return run


def tvm_runner(device: str, profile: str) -> Runner:
    """Run graphs compiled by TVM for this processor as its engine does, "portable" or "fused"; device is "cpu".

    Compiled, linked and loaded like the libraries of an artifact. For the fused profile portlm's kernels must be
    registered in this process, which opening the engine does.
    """
    from portlm.compile.tvm_build import Graph, compile_graph, need_linker
    from portlm.compile.tvm_library import LOWERINGS
    from portlm.tvm_support import LIBRARY, Weight, import_tvm, virtual_machine

    tvm = import_tvm()
    need_linker()
    opened: dict[tuple[str, ...], Callable[..., Any]] = {}

    def open_machine(model: onnx.ModelProto, folder: Path) -> Callable[..., Any]:
        weights, tensors = [], []
        for tensor in model.graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
                weights.append(Weight(tensor.name, tuple(tensor.dims), offset))
                tensors.append(tvm.runtime.tensor(numpy_helper.to_array(tensor, str(folder))))
        executable = compile_graph(Graph(model, "", tuple(weights)), LOWERINGS[profile])
        with private_scratch() as scratch:
            executable.export_library(str(scratch / LIBRARY), workspace_dir=str(scratch))
            machine = virtual_machine(tvm.runtime.load_module(str(scratch / LIBRARY)))
        return lambda *inputs: machine["main"](*inputs, *tensors)

    def run(
        model: onnx.ModelProto, folder: Path, names: Sequence[str], inputs: Mapping[str, np.ndarray]
    ) -> list[np.ndarray]:
        key = _outputs(model)
        if key not in opened:
            opened[key] = open_machine(model, folder)
        values = [np.ascontiguousarray(inputs[value.name]) for value in model.graph.input]
        results = opened[key](*(tvm.runtime.tensor(value) for value in values))
        named = dict(zip(key, results, strict=True))
        # the cache is a view into a buffer with room to grow, which .numpy() refuses to copy
        return [np.array(np.from_dlpack(named[name])) for name in names]

    return run


def _outputs(model: onnx.ModelProto) -> tuple[str, ...]:
    return tuple(value.name for value in model.graph.output)


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
        constant = {tensor.name for tensor in model.graph.initializer}
        self._names = []
        for node in model.graph.node:
            if not set(node.input) <= constant:  # a turned weight is no step of the computation
                self._names.extend(node.output)
        self._evaluator = ReferenceEvaluator(model)

    def values(self, inputs: Values) -> Values:
        """Every value by name, float64."""
        wide = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in inputs.items()}
        return dict(zip(self._names, self._evaluator.run(self._names, wide), strict=True))


class _Subject:
    """The engine's graph, and which of its values can be compared by name."""

    def __init__(
        self, model: onnx.ModelProto, path: Path, run: Runner, case: Case, expected: Values, tolerance: float
    ):
        self.case = case
        self._model, self._path, self._run, self._expected, self._tolerance = (
            model,
            path,
            run,
            expected,
            tolerance,
        )
        self.results = frozenset(_outputs(model))
        self.watched = [
            (node, value)
            for node in model.graph.node
            if node.op_type not in MOVEMENT
            for value in node.output
            if value in expected
        ]

    def difference(self, exposed: Sequence[str]) -> Iterator[tuple[str, float, float]]:
        """(value, error, scale) of the exposed values that differ, in order."""
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        present = {value.name for value in model.graph.output}
        for name in exposed:
            if name not in present:
                model.graph.output.append(helper.make_tensor_value_info(name, self._element(name), None))
        results = self._run(model, self._path.parent, exposed, self.case.inputs)
        for name, actual in zip(exposed, results, strict=True):
            expected = self._expected[name]
            if actual.size != expected.size:
                raise FormatError(
                    f"{self._path}: {name} has shape {actual.shape}, the reference {expected.shape}"
                )
            error, scale = self._error(actual.reshape(expected.shape), expected)
            if not error <= self._tolerance * max(1.0, scale):  # also if it is NaN
                yield name, error, scale

    def _element(self, name: str) -> int:
        """The element type of a value in the engine's graph, which computes in float32 what the reference widened."""
        dtype = self._expected[name].dtype
        return int(TensorProto.FLOAT if dtype == np.float64 else helper.np_dtype_to_tensor_dtype(dtype))

    def _error(self, actual: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
        """Largest difference and largest element; with padding, of values laid out by token only."""
        real = self.case.real
        if not real.all():
            if expected.shape[:2] != real.shape:
                return 0.0, 0.0
            actual, expected = actual[real], expected[real]
        if not expected.size:
            return 0.0, 0.0
        actual, expected = actual.astype(np.float64), expected.astype(np.float64)  # booleans have no minus
        return float(np.abs(actual - expected).max()), float(np.abs(expected).max())


def _first_difference(subject: _Subject) -> Divergence | None:
    names = [value for _, value in subject.watched]
    for value, error, scale in subject.difference(names):
        return _report(subject, value, error, scale, alone=False)
    results = [name for name in names if name in subject.results]
    for name in results:
        if list(subject.difference([name])):
            break
    else:
        return None
    low, high = 0, names.index(name)  # the answer lies in names[low..high]
    while low < high:
        middle = (low + high) // 2
        if list(subject.difference([names[middle]])):
            high = middle
        else:
            low = middle + 1
    value, error, scale = next(subject.difference([names[low]]))
    return _report(subject, value, error, scale, alone=True)


def _report(subject: _Subject, value: str, error: float, scale: float, alone: bool) -> Divergence:
    node = next(node for node, name in subject.watched if name == value)
    operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return Divergence(node.name, operator, value, error, scale, subject.case.situation, alone)


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
            return self._rng.integers(0, self._vocab_size, shape).astype(spec.dtype)
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
