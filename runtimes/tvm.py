"""The TVM engine: runs a library that TVM compiled on this machine, with the weights mapped from the artifact.

A compiled library is native code, so it is loaded only if the local trust store says that it was compiled here, of this
graph. The weights are read from the file the ONNX graphs share; the cache stays in TVM tensors from step to step, and
only token ids enter through numpy and logits leave through it, without a copy.
"""

import ctypes
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from portlm.arguments import wholes
from portlm.artifact import Manifest, RoleSpec, check_files
from portlm.engine import (
    Advance,
    Array,
    CallSpec,
    Ids,
    OpenRequest,
    Placement,
    State,
    call_specs,
    graph_names,
)
from portlm.engines import resolve
from portlm.errors import EngineUnavailableError, FormatError, PortlmError, UsageError
from portlm.files import MAX_JSON_BYTES, open_regular, read_bytes, safe_join, shown
from portlm.ops.registry import tvm_functions
from portlm.ops.token_selection import bad_row, check_filters
from portlm.quantization import EIGHT_BITS, takes_bytes
from portlm.roles import StateSpec, difference
from portlm.runtimes.base import ArrayEngine
from portlm.runtimes.tvm_advance import POSITIONS, Plan, advance
from portlm.runtimes.tvm_weights import aligned, map_weights, tensor_of
from portlm.threads import StepThreads
from portlm.trust import Build, is_trusted, private_scratch, was_recorded_alone
from portlm.tvm_support import (
    DEVICES,
    LIBRARY,
    SIGNATURE,
    Signature,
    cubin_name,
    device_module,
    import_tvm,
    processor_of,
    virtual_machine,
)

MAX_CODE_BYTES = 1 << 30  # of kernels beside a library

_ENGINES = {
    "cuda": "portlm.runtimes.tvm_cuda:CudaEngine", "opencl": "portlm.runtimes.tvm_device:DeviceEngine",
    "vulkan": "portlm.runtimes.tvm_device:DeviceEngine",
}  # fmt: skip
_connected, _make_array = False, None


def connect_kernels() -> None:
    """Register the kernels of portlm._C as TVM functions "portlm.<op>", once per process.

    Raises:
        EngineUnavailableError: portlm was built without them (ExtensionError), or for another version of TVM's binary
            interface.
    """
    global _connected, _make_array
    if _connected:
        return
    import_tvm()
    import tvm_ffi
    from tvm_ffi import libinfo

    from portlm import _C

    _make_array = tvm_ffi.get_global_func("ffi.Array")  # the kernels do not count their reference
    module = tvm_ffi.load_module(str(_C.__file__))
    runtime = ctypes.CDLL(libinfo.find_libtvm_ffi())
    version = (ctypes.c_uint32 * 3)()
    runtime.TVMFFIGetVersion(version)
    addresses = (
        ctypes.cast(function, ctypes.c_void_p).value
        for function in (
            runtime.TVMFFIErrorSetRaisedFromCStr,
            runtime.TVMFFITensorFromDLPack,
            runtime.TVMFFIObjectDecRef,
        )
    )
    if not module.get_function("portlm_connect")(version[0], version[1], *addresses, _make_array):
        found = ".".join(map(str, version))
        raise EngineUnavailableError(
            f"tvm: portlm's kernels do not know version {found} of TVM's binary interface"
        )
    try:
        functions = {
            name: module.get_function(f"portlm_{name}") for name in (*tvm_functions(), "chain", "advance")
        }
    except AttributeError as error:
        reason = f"the build of portlm's kernels lacks one ({_last_line(error)})"
        raise EngineUnavailableError(f"tvm: {reason}: reinstall portlm") from error
    for name, function in functions.items():
        tvm_ffi.register_global_func(f"portlm.{name}", function, override=True)
    _connected = True


def try_device(device: str) -> str:
    """Register the kernels, or open the device, and return what is to be said of it.

    Raises:
        EngineUnavailableError: it cannot be used; the message says why.
    """
    if device in DEVICES:
        return str(device_module(device).described())
    connect_kernels()
    return ""


class TvmEngine(ArrayEngine):
    """The roles of an artifact compiled by TVM for the CPU: one library each, opened when it is first used.

    An artifact of one role is opened at once, so that loading says what is wrong with it.

    The cache of a role is a view of a buffer that has room to grow (csrc/tvm/cache.cpp). A call extends the buffer in
    place only from the view that reaches its end, and copies otherwise, so states may share views.
    """

    name = "tvm"
    precision = "fp32"

    def __init__(self, request: OpenRequest, manifest: Manifest, libraries: Mapping[str, str], profile: str):
        """Prepare to open libraries; use open().

        Args:
            request: what was asked.
            manifest: of the artifact.
            libraries: folder of each role's library, relative to where compiled files are.
            profile: of all of them.
        """
        super().__init__(call_specs(manifest), manifest.model.vocab_size, manifest.model.context_length)
        self.device, self.profile = request.device, profile
        self.precision = manifest.precision(rounds=(request.device, profile) == ("cpu", "fused"))
        wanted = self.name, request.device, profile
        entries = [
            entry for entry in manifest.compiled if (entry.engine, entry.device, entry.profile) == wanted
        ]
        if any(takes_bytes(entry.target) for entry in entries):
            self.precision = EIGHT_BITS
        self._request, self._manifest, self._libraries = request, manifest, dict(libraries)
        self._opened: dict[str, _Library] = {}
        self._generated = profile == "portable"  # TVM's own code reads the inputs: it trusts them
        self._compact: set[str] = set()  # names of inputs that it reads in a library that calls kernels, too
        self._threads = StepThreads(_use_threads, request.threads)
        # A virtual machine runs one call at a time, and calls release Python's own lock.
        self._lock = threading.Lock()

    @classmethod
    def open(cls, request: OpenRequest) -> Self:
        """Load the compiled libraries of a profile; "auto" prefers the fused one.

        Args:
            request: device is "cpu", "cuda" or "vulkan"; profile "auto", "portable" or "fused". threads are those of
                portlm's kernels, what TVM generates runs on the caller's thread. allow_fallback is ignored, a library
                runs on its device alone.

        Raises:
            EngineUnavailableError: TVM is missing or of another version, or the library is for another processor.
            UsageError: nothing was compiled for this device and profile, or the folder is a plain checkpoint.
            FormatError: a file is missing or altered, or the library was not compiled on this machine.
        """
        import_tvm()
        if request.device != "cpu" and request.device not in DEVICES:
            known = " or ".join(("cpu", *DEVICES))
            raise EngineUnavailableError(f"tvm: no device {request.device} here, choose {known}")
        if request.manifest is None:
            raise UsageError(f"tvm runs exported models: run portlm export {request.folder} first")
        profile, libraries = _choose(request, request.manifest)
        place = _ENGINES.get(request.device)
        kind: type[Any] = cls if place is None else resolve(place)
        engine: Self = kind(request, request.manifest, libraries, profile)
        if len(libraries) == 1:
            engine.placement()
        return engine

    @classmethod
    def graphs(cls, request: OpenRequest) -> tuple[str, ...]:
        """Return the graphs that the libraries were made of; see Engine."""
        manifest = request.manifest
        if manifest is None:
            return ()
        profile, _ = _choose(request, manifest)
        return graph_names(manifest, profile)

    def _call(
        self, role: str, inputs: Mapping[str, Array], tensors: dict[str, Any]
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        library = self._library(role)
        arguments = [
            self._argument(inputs[name]) if name in inputs else tensors[name] for name in library.inputs
        ]
        with self._lock, self._threads.step():
            try:
                results = library.step(*arguments)
            except (
                ValueError,
                RuntimeError,
            ) as error:  # the virtual machine's, or a kernel's: memory, above all
                raise PortlmError(f"tvm: {_last_line(error)}") from error
        if len(library.outputs) == 1 and not isinstance(results, Sequence):
            results = (results,)  # a graph of one output is a function of one value
        named = dict(zip(library.outputs, results, strict=True))
        spec = self.roles[role]
        outputs: dict[str, Array] = {item.name: self._answer(named[item.name]) for item in spec.outputs}
        return outputs, {item.name: named[item.output] for item in spec.state if item.output}

    def _argument(self, array: Array) -> Any:
        """An input as a library takes it."""
        # Writeable, because DLPack cannot say "read only".
        return aligned(np.require(array, None, ("C", "W")))

    def _answer(self, tensor: Any) -> Array:
        """An output as numpy's."""
        return np.from_dlpack(tensor)

    def _weights(self, path: Path, signature: Signature) -> list[Any]:
        """What a library takes behind its inputs."""
        return map_weights(path, signature.weights, signature.packed, signature.panels)

    def _machine(self, module: Any) -> Any:
        """The virtual machine that runs a library."""
        return virtual_machine(module)

    def advance(self, state: State, asked: Advance) -> tuple[Ids, State] | None:
        """Draw several tokens for each row; see portlm.engine.Advances."""
        role = self._check(state)
        self._spec(role)
        library, past = self._library(role), state.past
        count = min(asked.count, self.context_length - past) if self._checks[role].grows else asked.count
        if library.plan is None or not _connected:
            return None
        if POSITIONS in library.plan.inputs:
            count = min(count, self.context_length - int(asked.lengths.max()))
        if count < 1:
            return None
        for choice in dict.fromkeys(choice[:4] for choice in asked.choices):
            check_filters(self.vocab_size, *choice)
        wholes("tokens", asked.tokens.tolist(), self.vocab_size - 1)
        import tvm_ffi

        function = tvm_ffi.get_global_func("portlm.advance")
        tensors = state.take()
        with self._lock, self._threads.step():
            try:
                drawn, bad, results = advance(
                    function, library.step, library.plan, tensors, past, asked, count
                )
            except (ValueError, RuntimeError) as error:
                raise PortlmError(f"tvm: {_last_line(error)}") from error
        if not len(drawn):
            where = f"{self.name}:{self.device}: new token {asked.choices[bad].step}"
            logits = np.asarray(np.from_dlpack(results[library.plan.place]), np.float32)[:, -1]
            raise PortlmError(f"{where}: {bad_row(logits, bad)}")
        places = zip(library.plan.states, library.plan.sources, strict=True)
        new = {name: tensors[name] if place < 0 else results[place] for name, place in places}
        past = past + len(drawn) if self._checks[role].grows else 0
        return drawn, self._state(role, state.rows, past, new)

    def _library(self, role: str) -> "_Library":
        if role not in self._opened:
            self._opened[role] = self._open(role)
            self._compact.update(self._opened[role].compact)
        return self._opened[role]

    def _open(self, role: str) -> "_Library":
        request, spec, name = self._request, self._manifest.roles[role], self._libraries[role]
        option = "" if request.device == "cpu" else f" --device {request.device}"
        command = f"portlm compile {request.folder} --engine tvm{option} --profile {self.profile}"
        module, signature = _load(request, self._manifest, role, name, self.profile, command)
        weights = self._weights(safe_join(request.folder, signature.weights_file), signature)
        try:
            # The naive allocator gives memory back: the pooled one would keep a block for every length ever seen.
            machine = self._machine(module)
            machine.save_function("main", "portlm_step", *weights)
        except (RuntimeError, ValueError, AttributeError) as error:
            raise FormatError(
                f"{request.folder}: {name}/{LIBRARY} does not start ({_last_line(error)}): run {command}"
            ) from error
        inputs, outputs = (
            tuple(item.name for item in items) for items in (signature.inputs, signature.outputs)
        )
        plan = Plan.of(CallSpec(spec.inputs, spec.outputs, spec.state), inputs, outputs)
        return _Library(machine["portlm_step"], inputs, outputs, signature.nodes, plan, signature.compact)

    def _ready(self, role: str) -> None:
        self._library(role)

    def _work(self, tensor: Any) -> Any:
        return np.from_dlpack(tensor)

    def _settle(self, tensor: Any, spec: StateSpec) -> Any:
        if spec.update == "append" and not self._generated and spec.name not in self._compact:
            # Kernels take any strides: the next call copies the cache into a buffer of its own, with room to grow.
            return tensor_of(tensor)
        return aligned(np.array(tensor, order="C"))

    def placement(self) -> Placement:
        """Everything runs on the one device a library was compiled for."""
        return Placement({self.device: sum(self._library(role).nodes for role in self._libraries)})

    def enter_child(self) -> None:
        """Prepare to go on in a forked child, where nobody would give back a lock that another thread held."""
        super().enter_child()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Let go of the libraries and the weights; closing twice is harmless."""
        super().close()
        self._opened, self._libraries = {}, {}


class _Library(NamedTuple):
    """An opened library: what it takes and returns in which order, how many nodes its graph had, how it goes on.

    Of what it takes, TVM's own code reads `compact`.
    """

    step: Callable[..., Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: int
    plan: Plan | None
    compact: tuple[str, ...]


def _load(
    request: OpenRequest, manifest: Manifest, role: str, name: str, profile: str, command: str
) -> tuple[Any, Signature]:
    """A role's library in the folder of this name, loaded, and how to call it; `command` would compile it again."""
    tvm = import_tvm()
    folder, place, spec = request.folder, request.compiled or request.folder, manifest.roles[role]
    own = () if request.compiled else (f"{name}/{LIBRARY}", f"{name}/{SIGNATURE}")
    check_files(folder, (*own, spec.weights), manifest)
    path = safe_join(place, f"{name}/{LIBRARY}")
    described = safe_join(place, f"{name}/{SIGNATURE}")
    raw = read_bytes(described, MAX_JSON_BYTES)
    signature = Signature.parse(raw, described, folder)
    _check_signature(signature, spec, profile, command)
    with open_regular(path) as file:
        code = file.read()
    if profile not in spec.profiles:
        raise FormatError(
            f"{folder}: has no {profile} graph of {role}, of which it was compiled: export again"
        )
    graph = manifest.files[spec.profiles[profile]].sha256
    codes = {}
    if signature.architectures:
        names = [cubin_name(each) for each in signature.architectures]
        check_files(folder, () if request.compiled else [f"{name}/{each}" for each in names], manifest)
        codes = {each: read_bytes(safe_join(place, f"{name}/{each}"), MAX_CODE_BYTES) for each in names}
    beside = {SIGNATURE: _digest(raw), **{each: _digest(data) for each, data in codes.items()}}
    build = Build(_digest(code), "tvm", request.device, profile, graph, beside)
    if not is_trusted(build):
        raise FormatError(_distrusted(path, build, command))
    # TVM's own pool would spin beside the kernels' threads; it reads these when it is first needed.
    os.environ["TVM_NUM_THREADS"] = "1"
    os.environ["TVM_BIND_THREADS"] = "0"
    if request.device == "cuda" and codes:
        from portlm.runtimes.tvm_cuda import lent

        with lent(signature, codes, command):
            module = _load_trusted(tvm, code, path, command)
    else:
        module = _load_trusted(tvm, code, path, command)
    try:
        connect_kernels()
    except EngineUnavailableError:
        if profile == "fused":
            raise  # a portable library calls no kernel, and writes its tokens one by one
    return module, signature


def _use_threads(count: int) -> int:
    from portlm import _C

    return _C.set_threads(count)


def _last_line(error: Exception) -> str:
    """The message itself, which TVM puts after its traceback, and before the source of a CUDA kernel."""
    said, source, _ = str(error).partition("// CUDA Source")
    lines = [line.strip() for line in said.strip().splitlines()]
    return " ".join(lines[-3:]) if source else lines[-1]  # what is wrong, how it was launched, its name


def _choose(request: OpenRequest, manifest: Manifest) -> tuple[str, dict[str, str]]:
    """The profile to open, of those that were compiled for every role, and the folder of each role's library."""
    folder, profile = request.folder, request.profile
    compiled: dict[str, dict[str, str]] = {"fused": {}, "portable": {}}
    for entry in manifest.compiled:
        if (entry.engine, entry.device) == ("tvm", request.device) and entry.profile in compiled:
            library = next((name for name in entry.files if name.endswith(f"/{LIBRARY}")), None)
            if library is None:
                raise FormatError(f"{folder}: the entry compiled for tvm must have a library")
            compiled[entry.profile][entry.role] = library.rpartition("/")[0]
    for name in ("fused", "portable") if profile == "auto" else (profile,):
        if manifest.roles and compiled.get(name, {}).keys() == manifest.roles.keys():
            return name, compiled[name]
    option = "" if request.device == "cpu" else f" --device {request.device}"
    option += "" if profile == "auto" else f" --profile {profile}"
    if profile not in ("auto", "fused", "portable"):
        raise UsageError(f"tvm has no profile {profile}: choose portable or fused")
    raise UsageError(
        f"{folder} holds nothing compiled for tvm on {request.device}: "
        f"run portlm compile {folder} --engine tvm{option}"
    )


def _check_signature(signature: Signature, spec: RoleSpec, profile: str, command: str) -> None:
    """The signature must be of this model, this profile and a processor like this one."""
    from portlm import _C

    problem = difference(spec.inputs, spec.outputs, spec.state, signature.inputs, signature.outputs)
    if signature.profile != profile:
        problem = f"it is of the profile {shown(signature.profile)}"
    elif signature.weights_file != spec.weights:
        problem = f"its weights are in {shown(signature.weights_file)}, and the manifest says {spec.weights}"
    if problem:
        raise FormatError(
            f"tvm: the compiled {profile} library is of another model, {problem}: run {command}"
        )
    usable = dict.fromkeys(processor_of(isa) for isa in _C.usable_isas())
    if signature.processor not in usable:
        raise EngineUnavailableError(
            f"tvm: compiled for {signature.processor}, this machine runs {', '.join(usable)}: run {command}"
        )


def _distrusted(path: Path, build: Build, command: str) -> str:
    """What to say of a library that the trust store does not have as what it was compiled for."""
    how = "was not compiled on this machine from this graph"
    if was_recorded_alone(build.library):
        how = "was compiled by an older portlm, which did not note from which graph"
    return f"{path} {how}, and is not run (sha256 {build.library[:16]}): run {command}"


def _load_trusted(tvm: Any, code: bytes, path: Path, command: str) -> Any:
    """Load a library that the trust store has, as what it was compiled for.

    What is hashed is what is loaded: the bytes were read once and are loaded from a private copy, so that nothing can
    be put in the file's place in between, and compiling again does not pull the code from under a running engine.
    """
    with private_scratch() as scratch:
        try:
            (scratch / LIBRARY).write_bytes(code)
            return tvm.runtime.load_module(str(scratch / LIBRARY))
        except (RuntimeError, OSError) as error:
            raise FormatError(f"{path} does not load ({error}): run {command}") from error


def _digest(data: bytes) -> str:
    return sha256(data).hexdigest()
