"""The ONNX Runtime engine: exported graphs on the CPU, on CUDA, or on Vulkan through the WebGPU plugin provider.

Nothing runs where it was not asked to. ONNX Runtime would place nodes that a device lacks on the CPU, and its Python
layer would retry the whole model there if a provider failed, both silently: the first is switched off, the second
refused, and after loading the place of every node is read back. States stay on the device from step to step; on the
CPU they grow in place where the graph says that it can do that (runtimes/ort_cache.py).

An idle thread looks for work for a millisecond and sleeps then, or at once where the machine is crowded;
PORTLM_ORT_SPINNING in the environment says otherwise (portlm.ort_support).
"""

import ctypes
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from portlm.arguments import wholes
from portlm.artifact import Manifest
from portlm.engine import Advance, Array, Ids, OpenRequest, Placement, State, call_specs, graph_names
from portlm.errors import EngineUnavailableError, FormatError, PlacementError, PortlmError, UsageError
from portlm.files import read_bytes, safe_join, shown
from portlm.ops.token_selection import check_filters
from portlm.ort_support import (
    CUDA,
    EVEN,
    EXTERNAL_FOLDER,
    ROUNDED_TARGET,
    WEBGPU,
    import_onnxruntime,
    open_session,
    session_options,
)
from portlm.quantization import EIGHT_BITS
from portlm.roles import StateSpec, TensorSpec, difference
from portlm.runtimes.base import ArrayEngine
from portlm.runtimes.onnx_bytes import DTYPES, FLOAT, names, one_node, weight_files
from portlm.runtimes.ort_advance import advance, goes_on
from portlm.runtimes.ort_cache import InPlace, View, as_array, in_place, is_even
from portlm.runtimes.ort_devices import find_device, first_line
from portlm.runtimes.ort_files import PACK_ON_THREADS, checking, has_room

onnxruntime = import_onnxruntime()

PROVIDERS = {"CPUExecutionProvider": "cpu", CUDA: "cuda", WEBGPU: "vulkan"}
MEMORY = {"cpu": "cpu", "cuda": "cuda", "vulkan": "webgpu"}  # ONNX Runtime's name for each device's memory
MAX_GRAPH_BYTES = 64 * 2**20  # without weights


class OrtEngine(ArrayEngine):
    """The graphs of an artifact in ONNX Runtime: one session for each role, opened when it is first used.

    An artifact of one role is opened at once, so that loading says what is wrong with it.
    """

    name = "ort"
    precision = "fp32"

    def __init__(self, request: OpenRequest, manifest: Manifest, graphs: "dict[str, _Graphs]", profile: str):
        """Prepare to open graphs; use open()."""
        super().__init__(call_specs(manifest), manifest.model.vocab_size, manifest.model.context_length)
        self.device, self.profile = request.device, profile
        self._request, self._manifest = request, manifest
        self._graphs = graphs
        names = {pair.every.name for pair in graphs.values()}
        self.precision = manifest.precision(rounds=False)
        if any(e.target == ROUNDED_TARGET and names & set(e.files) for e in manifest.compiled):
            self.precision = EIGHT_BITS
        self._ep_device, self._note = find_device(request.device)
        self._sessions: dict[str, Any] = {}
        self._serving: set[str] = set()  # roles whose session takes every call
        self._replaced: list[weakref.ref[Any]] = []
        self._placements: dict[str, Placement] = {}
        self._tools: dict[tuple[str, str, int, int], Any] = {}
        self._in_place: dict[str, InPlace] = {}

    @classmethod
    def open(cls, request: OpenRequest) -> Self:
        """Load the graphs of an artifact.

        Args:
            request: device is "cpu", "cuda" or "vulkan"; profile "portable" (the exported graphs), "fused" (compiled
                for this device), or "auto", which takes the fused ones if they were compiled. With allow_fallback,
                nodes that the device lacks run on the CPU; placement() then names them.

        Raises:
            EngineUnavailableError: the plugin, a driver or a device is missing.
            PlacementError: a node would run on the CPU, and allow_fallback is False.
            UsageError: the artifact has no such profile for this device, or is a plain checkpoint.
            FormatError: a file is missing or altered, or ONNX Runtime does not take it.
        """
        manifest = request.manifest
        if manifest is None:
            raise UsageError(f"ort runs exported models: run portlm export {request.folder} first")
        if manifest.cache is not None and request.device == "vulkan":
            raise EngineUnavailableError(
                f"ort:vulkan: its provider has no tensors of {manifest.cache.kind}, in which this model keeps keys and "
                "values: export it without --cache"
            )
        if not manifest.roles:
            raise FormatError(f"{request.folder}: the manifest has no role; export the checkpoint again")
        profile, graphs = _choose(request, manifest)
        engine = cls(request, manifest, graphs, profile)
        if len(graphs) == 1:
            engine.placement()
        return engine

    @classmethod
    def graphs(cls, request: OpenRequest) -> tuple[str, ...]:
        """Return the graphs of the artifact that ONNX Runtime would be given; see Engine."""
        if request.manifest is None:
            return ()
        profile, graphs = _choose(request, request.manifest)
        if request.compiled is not None:  # the graph that the cache's was lowered from
            return graph_names(request.manifest, profile)
        return tuple(graph.name for pair in graphs.values() for graph in pair if graph is not None)

    def _call(
        self, role: str, inputs: Mapping[str, Array], tensors: dict[str, Any]
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        session = self._session(role, lambda: is_even(inputs))
        if role in self._in_place:
            return self._in_place[role](session, self._run, inputs, tensors)
        spec, memory = self.roles[role], MEMORY[self.device]
        binding = session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for state in spec.state:
            tensor = as_array(
                tensors[state.name]
            )  # an array, if another role keeps one of this kind in place
            binding.bind_ortvalue_input(
                state.name, _on_cpu(np.array(tensor, order="C")) if isinstance(tensor, np.ndarray) else tensor
            )
        for output in spec.outputs:
            binding.bind_output(output.name, "cpu")
        changed = [state for state in spec.state if state.output]
        for state in changed:
            binding.bind_output(state.output, memory)
        self._run(session, binding)
        values = binding.get_outputs()
        outputs = {output.name: value.numpy() for output, value in zip(spec.outputs, values, strict=False)}
        states = values[len(spec.outputs) :]
        return outputs, {state.name: value for state, value in zip(changed, states, strict=True)}

    def _run(self, session: Any, binding: Any) -> None:
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # its exceptions have no common base but this
            raise PortlmError(f"ort:{self.device}: a step failed: {first_line(error)}") from error

    def advance(self, state: State, asked: Advance) -> tuple[Ids, State] | None:
        """Draw several tokens for each row; see portlm.engine.Advances."""
        role = self._check(state)
        spec, past = self._spec(role), state.past
        session = self._session(role, lambda: bool((asked.lengths == past).all()))
        count = min(asked.count, self.context_length - max(past, int(asked.lengths.max())))
        if role not in self._in_place or not goes_on(spec) or count < 1:
            return None
        for choice in dict.fromkeys(choice[:4] for choice in asked.choices):
            check_filters(self.vocab_size, *choice)
        wholes("tokens", asked.tokens.tolist(), self.vocab_size - 1)
        run = partial(self._run, session)
        drawn, new = advance(self._in_place[role], spec, run, session, state.take(), asked, count)
        return drawn, self._state(role, state.rows, past + len(drawn), new)

    def _session(self, role: str, even: Callable[[], bool] = lambda: True) -> Any:
        """The session of a role, opened if it was not.

        Of a role's two graphs one is open at a time, as each has its own copy of the weights in ONNX Runtime's order:
        that for even calls, until a call is not even, and from then on that for every call.

        Args:
            role: which.
            even: whether it is for a call in which nothing is masked.
        """
        opened = self._sessions.get(role)
        if opened is not None and (role in self._serving or even()):
            return opened
        pair = self._graphs[role]
        if pair.even is not None and opened is None and even():
            graph = pair.even
        else:
            graph = pair.every
            self._serving.add(role)
            if opened is not None:  # a cache may hold it for some time
                self._replaced.append(weakref.ref(self._sessions.pop(role)))
        del opened
        self._sessions[role] = session = self._open(role, graph)
        return session

    def _open(self, role: str, graph: "_Graph") -> Any:
        request, spec = self._request, self.roles[role]
        *graphs, weights = graph.files
        with checking(request.folder, graphs, weights, self._manifest):
            session = _load(graph, self.device, self._ep_device, request.allow_fallback, request.threads)
        placement = _placement(session, self.device, self._note)
        if placement.fallback and not request.allow_fallback:
            raise _misplaced(graph.path, self.device, placement)
        taken, returned = _specs(session.get_inputs()), _specs(session.get_outputs())
        if problem := difference(spec.inputs, spec.outputs, spec.state, taken, returned):
            raise FormatError(f"{graph.path}: {problem}; export again")
        if self.device == "cpu" and (found := in_place(spec, session, self.context_length)):
            self._in_place[role] = found
        self._placements[role] = placement
        return session

    def _ready(self, role: str) -> None:
        self._session(role)

    def placement(self) -> Placement:
        """Return what ONNX Runtime recorded when it assigned nodes to providers, of all roles' open graphs."""
        for role in self._graphs:
            self._session(role)
        nodes: Counter[str] = Counter()
        for placement in self._placements.values():
            nodes.update(placement.nodes)
        fallback = tuple(name for placement in self._placements.values() for name in placement.fallback)
        return Placement(dict(nodes), fallback, self._note)

    def enter_child(self) -> None:
        """Prepare to go on in a forked child, on new sessions.

        Those of the parent have lost their threads, and wait for them as soon as anything frees them. So nothing may.
        """
        super().enter_child()
        replaced = [session for reference in self._replaced if (session := reference()) is not None]
        lost = [*self._sessions.values(), *self._tools.values(), *replaced]
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(lost))
        self._sessions, self._tools, self._serving = {}, {}, set()

    def close(self) -> None:
        """Let go of the sessions and their memory."""
        super().close()
        self._sessions, self._graphs, self._tools = {}, {}, {}

    # --- states: OrtValues, which on the CPU are seen through numpy and elsewhere never leave the device -------

    def _work(self, tensor: Any) -> Any:
        if self.device != "cpu":
            return tensor
        return as_array(tensor) if isinstance(tensor, View | np.ndarray) else tensor.numpy()

    def _settle(self, tensor: Any, spec: StateSpec) -> Any:
        if not isinstance(tensor, np.ndarray) or any(spec in role.grown for role in self._in_place.values()):
            return tensor  # the next call copies it to where it can grow
        value = _on_cpu(np.array(tensor, order="C"))
        if self.device == "cpu" or spec.update != "constant" or not tensor.size:
            return value
        return self._gather(value, 0, range(len(tensor)))  # once to the device, not again at every call

    def _shape(self, tensor: Any) -> tuple[int, ...]:
        return tuple(tensor.shape if isinstance(tensor, np.ndarray) else tensor.shape())

    def _rows(self, tensor: Any, rows: Sequence[int]) -> Any:
        return super()._rows(tensor, rows) if self.device == "cpu" else self._gather(tensor, 0, rows)

    def _slots(self, tensor: Any, axis: int, begin: int, end: int) -> Any:
        if self.device == "cpu":
            return super()._slots(tensor, axis, begin, end)
        if begin == end:
            sizes = list(self._shape(tensor))
            sizes[axis] = 0
            return _on_cpu(np.zeros(sizes, _dtype(tensor)))
        return self._gather(tensor, axis, range(begin, end))

    def _stack(self, tensors: Sequence[Any], shape: Sequence[int], dtype: str) -> Any:
        if self.device == "cpu":
            return super()._stack(tensors, shape, dtype)
        rows = None
        for part in tensors:
            tensor = part
            for axis in range(1, len(shape)):
                sizes = list(self._shape(tensor))
                if sizes[axis] < shape[axis]:
                    sizes[axis] = shape[axis] - sizes[axis]
                    tensor = self._concat(_on_cpu(np.zeros(sizes, dtype)), tensor, axis)
            rows = tensor if rows is None else self._concat(rows, tensor, 0)
        return rows

    def _gather(self, tensor: Any, axis: int, indices: Sequence[int]) -> Any:
        where = _on_cpu(np.array(indices, np.int64))
        return self._tool("Gather", axis, tensor, where)

    def _concat(self, first: Any, second: Any, axis: int) -> Any:
        if 0 in self._shape(first) or 0 in self._shape(second):
            return second if 0 in self._shape(first) else first
        return self._tool("Concat", axis, first, second)

    def _tool(self, op_type: str, axis: int, *tensors: Any) -> Any:
        """Run a graph of one node on the device; its result stays there."""
        kinds = [DTYPES[_dtype(tensor)] for tensor in tensors]
        key = (op_type, _dtype(tensors[0]), axis, len(tensors))
        if key not in self._tools:
            inputs = dict(zip(names(len(tensors)), kinds, strict=True))
            model = one_node(op_type, inputs, kinds[0], {"axis": axis})
            options = session_options(self.device, self._ep_device, self._request.threads)
            self._tools[key] = open_session(model, options, self.device)
        binding = self._tools[key].io_binding()
        for name, tensor in zip(names(len(tensors)), tensors, strict=True):
            binding.bind_ortvalue_input(name, tensor)
        binding.bind_output("y", MEMORY[self.device])
        try:
            self._tools[key].run_with_iobinding(binding)
        except Exception as error:  # its exceptions have no common base but this
            raise PortlmError(f"ort:{self.device}: {op_type} failed: {first_line(error)}") from error
        return binding.get_outputs()[0]


def _on_cpu(array: Array) -> Any:
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _dtype(tensor: Any) -> str:
    """The element type of an OrtValue as numpy calls it."""
    return _plain(tensor.data_type())


def _plain(kind: str) -> str:
    """An element type as numpy calls it: "tensor(float)" is float32."""
    kind = kind.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32"}.get(kind, kind)


# The smallest model that shows whether a device computes: y = x + z.
SMALLEST = one_node("Add", {"x": FLOAT, "z": FLOAT}, FLOAT, {})


def try_device(device: str) -> str:
    """Run the smallest model on a device and return what is to be said of it, "" for nothing.

    Raises:
        EngineUnavailableError: it cannot be used; the message says why.
    """
    ep_device, note = find_device(device)
    try:
        session = open_session(SMALLEST, session_options(device, ep_device, 1), device)
        (y,) = session.run(["y"], {"x": np.array([1, 2], np.float32), "z": np.array([1, 2], np.float32)})
    except Exception as error:  # its exceptions have no common base but this
        raise EngineUnavailableError(
            f"ort:{device}: the device does not start: {first_line(error)}"
        ) from error
    if _placement(session, device, "").fallback or y.tolist() != [2, 4]:
        raise EngineUnavailableError(f"ort:{device}: the device does not compute: update its driver")
    return note


class _Graph(NamedTuple):
    """One graph to open.

    Attributes:
        name: in the manifest.
        path: of the graph.
        files: of the artifact, to be compared with its manifest; the last is the weight file.
        weights: the weight file.
    """

    name: str
    path: Path
    files: tuple[str, ...]
    weights: Path


class _Graphs(NamedTuple):
    """The graphs of a role: one that takes every call, and perhaps one for those in which nothing is masked."""

    every: _Graph
    even: _Graph | None = None


def _choose(request: OpenRequest, manifest: Manifest) -> tuple[str, dict[str, _Graphs]]:
    """Return the profile to open and the graph of each role."""
    folder, device, profile = request.folder, request.device, request.profile
    if profile in ("auto", "fused"):
        graphs = {}
        for entry in manifest.compiled:
            if (entry.engine, entry.device, entry.profile) == ("ort", device, "fused"):
                found = sorted(entry.files, key=lambda name: name.endswith(EVEN))
                endings = [name.endswith(EVEN) for name in found if name.endswith(".onnx")]
                if endings not in ([False], [False, True]) or entry.role not in manifest.roles:
                    raise FormatError(f"{folder}: the entry compiled for ort on {device} must have one graph")
                weights = manifest.roles[entry.role].weights
                own = entry.files if request.compiled is None else ()  # the cache's were compared when found
                graphs[entry.role] = _Graphs(
                    *(
                        _Graph(
                            name,
                            safe_join(request.compiled or folder, name),
                            (*own, weights),
                            safe_join(folder, weights),
                        )
                        for name in found
                        if name.endswith(".onnx")
                    )
                )
        if graphs.keys() == manifest.roles.keys():
            return "fused", graphs
        if profile == "fused":
            raise UsageError(
                f"{folder} holds no fused graph for ort on {device}: "
                f"run portlm compile {folder} --engine ort --device {device}"
            )
    if profile not in ("auto", "portable"):
        raise UsageError(f"ort has no profile {profile}: choose portable or fused")
    graphs = {}
    for name, role in manifest.roles.items():
        if "portable" not in role.profiles:
            raise UsageError(f"{folder} holds no portable graph: run portlm export again")
        graph = role.profiles["portable"]
        files = (graph, role.weights)
        graphs[name] = _Graphs(
            _Graph(graph, safe_join(folder, graph), files, safe_join(folder, role.weights))
        )
    return "portable", graphs


def _load(graph: _Graph, device: str, ep_device: Any, allow_fallback: bool, threads: int | None) -> Any:
    """Open a session on one device, and nowhere else unless fallback is allowed."""
    path = graph.path

    def options(allow_fallback: bool) -> Any:
        made = session_options(device, ep_device, threads, allow_fallback)
        made.add_session_config_entry(EXTERNAL_FOLDER, str(graph.weights.parent))
        if device == "cpu" and has_room(graph.weights):
            made.add_session_config_entry(PACK_ON_THREADS, "1")
        return made

    # As bytes, because of a graph in the cache ONNX Runtime would not find the weights, which are in the artifact.
    model = read_bytes(path, MAX_GRAPH_BYTES)
    try:
        others = weight_files(model) - {graph.weights.name}
    except ValueError as error:
        raise FormatError(f"{path}: no ONNX graph, it has {error}; export again") from error
    if others:  # which nobody compared with the manifest
        raise FormatError(
            f"{path}: it has weights in {shown(min(others))}, and the manifest says {graph.weights.name}; export again"
        )
    try:
        return open_session(model, options(allow_fallback), device)
    except Exception as error:  # its exceptions have no common base but this
        if device != "cpu" and not allow_fallback and "fallback" in str(error):
            # Only now is it worth loading once more, to name the nodes that stood in the way.
            again = open_session(model, options(True), device)
            raise _misplaced(path, device, _placement(again, device, "")) from error
        if device != "cpu" and type(error).__name__ not in ("InvalidGraph", "InvalidProtobuf", "NoSuchFile"):
            raise EngineUnavailableError(
                f"ort:{device}: the device does not start: {first_line(error)}"
            ) from error
        raise FormatError(
            f"{path}: ONNX Runtime does not take it: {first_line(error)}; export again"
        ) from error


def _specs(values: Sequence[Any]) -> list[TensorSpec]:
    """What a session says of its inputs or outputs; "?" for an extent of which the graph says nothing."""
    return [
        TensorSpec(value.name, _plain(value.type), tuple("?" if dim is None else dim for dim in value.shape))
        for value in values
    ]


def _placement(session: Any, device: str, note: str) -> Placement:
    nodes: Counter[str] = Counter()
    elsewhere = []
    for part in session.get_provider_graph_assignment_info():
        where = PROVIDERS.get(part.ep_name, part.ep_name)
        for node in part.get_nodes():
            nodes[where] += 1
            if where != device:
                elsewhere.append(f"{node.name or '(unnamed)'} ({node.op_type})")
    return Placement(dict(nodes), tuple(elsewhere), note)


def _misplaced(path: Path, device: str, placement: Placement) -> PlacementError:
    names = ", ".join(placement.fallback[:4]) + (", ..." if len(placement.fallback) > 4 else "")
    return PlacementError(
        f"{path}: {len(placement.fallback)} of {sum(placement.nodes.values())} nodes cannot run on {device} and would "
        f"run on the CPU: {names}; use another profile, or allow_fallback to accept that"
    )
