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

from portlm.artifact import read_manifest, verify_files
from portlm.compile.check import check_model
from portlm.compile.parity import make_probe
from portlm.errors import EngineUnavailableError, FormatError, UsageError

Values = dict[str, np.ndarray]
Runner = Callable[[onnx.ModelProto, Path, Sequence[str], Mapping[str, np.ndarray]], list[np.ndarray]]
"""(graph with the wanted values among its outputs, folder of its weight file, wanted names, inputs) -> values."""

WEBGPU = "WebGpuExecutionProvider"
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


def bisect(folder: str | Path, run: Runner, graph: str, tolerance: float = TOLERANCE) -> Divergence | None:
    """Compare an engine with the float64 reference, node by node.

    Args:
        folder: the artifact; it must have the portable profile.
        run: the engine under test.
        graph: what the engine runs, relative to the artifact, such as "onnx/decoder.portable.onnx".
        tolerance: relative to each value's largest element.

    Returns:
        The first divergence in graph order, or None if every step agrees.

    Raises:
        UsageError: the artifact lacks the portable profile.
        FormatError: a file is damaged, or the engine returns something of another size.
    """
    root = Path(folder)
    manifest = read_manifest(root)
    role = manifest.roles.get("decoder")
    if role is None or "portable" not in role.profiles:
        raise UsageError(
            f"{root}: has no portable decoder graph to compare with; export it with that profile"
        )
    verify_files(root, [role.profiles["portable"], role.weights, graph])
    subject = check_model(root / graph)
    reference = _Reference(root / role.profiles["portable"])
    for case in _cases(reference, manifest.model.vocab_size, manifest.model.context_length):
        expected = reference.values(case.inputs)
        found = _first_difference(_Subject(subject, root / graph, run, case, expected, tolerance))
        if found is not None:
            return found
    return None


def ort_runner(device: str = "cpu") -> Runner:
    """Run graphs in ONNX Runtime as its engine does, on "cpu", "cuda" or "vulkan".

    For Vulkan the WebGPU plugin must be registered in this process, which opening the engine does.
    """
    import onnxruntime

    opened: dict[tuple[str, ...], Any] = {}

    def open_session(model: onnx.ModelProto, folder: Path) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors come back as exceptions
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        providers = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider"]}.get(device)
        if device == "vulkan":
            found = [ep for ep in onnxruntime.get_ep_devices() if ep.ep_name == WEBGPU]
            if not found:
                raise EngineUnavailableError(
                    "ort:vulkan: no WebGPU device is registered, open the engine first"
                )
            options.add_provider_for_devices([found[0]], {"dawnBackendType": "Vulkan"})
        graph = model.SerializeToString()
        return onnxruntime.InferenceSession(graph, options, providers, enable_fallback=0)

    def run(
        model: onnx.ModelProto, folder: Path, names: Sequence[str], inputs: Mapping[str, np.ndarray]
    ) -> list[np.ndarray]:
        key = _outputs(model)
        if key not in opened:
            opened[key] = open_session(model, folder)
        results: list[np.ndarray] = opened[key].run(list(names), dict(inputs))
        return results

    return run


def tvm_runner(profile: str) -> Runner:
    """Run graphs compiled by TVM for this processor as its engine does, "portable" or "fused".

    For the fused profile portlm's kernels must be registered in this process, which opening the engine does.
    """
    from portlm import _C
    from portlm.compile import tvm_build, tvm_fused, tvm_portable
    from portlm.compile.tvm_schedule import cpu_passes
    from portlm.tvm_support import PROCESSORS, Weight, import_tvm

    tvm = import_tvm()
    lower = {"portable": tvm_portable.lower, "fused": tvm_fused.lower}[profile]
    opened: dict[tuple[str, ...], Callable[..., Any]] = {}

    def open_machine(model: onnx.ModelProto, folder: Path) -> Callable[..., Any]:
        from tvm import relax

        weights, tensors = [], []
        for tensor in model.graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
                weights.append(Weight(tensor.name, tuple(tensor.dims), offset))
                tensors.append(tvm.runtime.tensor(numpy_helper.to_array(tensor, str(folder))))
        target = tvm.target.Target({"kind": "llvm", "mcpu": PROCESSORS[_C.isa()]})
        passes = cpu_passes(target) if profile == "portable" else "default"
        module = lower(tvm_build.Graph(model, "", tuple(weights)))
        machine = relax.VirtualMachine(relax.build(module, target, relax_pipeline=passes), tvm.cpu())
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
        self.caches = [
            (v.name, v.type.tensor_type.shape.dim) for v in model.graph.input if v.name.startswith("past")
        ]
        self._names = []
        for node in model.graph.node:
            if not set(node.input) <= constant:  # a turned weight is no step of the computation
                self._names.extend(node.output)
        self._evaluator = ReferenceEvaluator(model)

    def values(self, inputs: Values) -> Values:
        """Every value by name, float64."""
        wide = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in inputs.items()}
        return dict(zip(self._names, self._evaluator.run(self._names, wide), strict=True))

    def empty(self, batch: int) -> Values:
        """Caches without a slot."""
        return {
            name: np.zeros((batch, dims[1].dim_value, 0, dims[3].dim_value), np.float32)
            for name, dims in self.caches
        }


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
                model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
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

    def _error(self, actual: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
        """Largest difference and largest element; with padding, of values laid out by token only."""
        real = self.case.real
        if not real.all():
            if expected.shape[:2] != real.shape:
                return 0.0, 0.0
            actual, expected = actual[real], expected[real]
        if not expected.size:
            return 0.0, 0.0
        return float(np.abs(actual - expected).max()), float(np.abs(expected).max())


def _first_difference(subject: _Subject) -> Divergence | None:
    names = [value for _, value in subject.watched]
    for value, error, scale in subject.difference(names):
        return _report(subject, value, error, scale, alone=False)
    if not list(subject.difference(["logits"])):
        return None
    low, high = 0, names.index("logits")  # the answer lies in names[low..high]
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


def _cases(reference: _Reference, vocab_size: int, context_length: int) -> Iterator[Case]:
    """A prefill and several tokens on a filled cache, first of one row, then of a ragged batch."""
    probe = make_probe(vocab_size, context_length)
    ragged = probe.input_ids, probe.attention_mask, "ragged "
    single = probe.input_ids[:1], probe.attention_mask[:1], ""
    for ids, mask, kind in (single, ragged):
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        caches, start = reference.empty(len(ids)), 0
        for end, step in ((probe.cuts[0], "prefill"), (ids.shape[1], "cached step")):
            if start == end:
                continue
            inputs = {
                "input_ids": ids[:, start:end],
                "attention_mask": mask[:, :end],
                "position_ids": positions[:, start:end],
                **caches,
            }
            yield Case(kind + step, inputs, mask[:, start:end] == 1)
            values = reference.values(inputs)
            caches = {name: values[_present(name)].astype(np.float32) for name in caches}
            start = end


def _present(past: str) -> str:
    return past.replace("past_key_values.", "present.")
