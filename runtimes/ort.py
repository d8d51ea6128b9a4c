"""The ONNX Runtime engine: exported graphs on the CPU, on CUDA, or on Vulkan through the WebGPU plugin provider.

Nothing runs where it was not asked to. ONNX Runtime would place nodes that a device lacks on the CPU, and its Python
layer would retry the whole model there if a provider failed, both silently: the first is switched off, the second
refused, and after loading the place of every node is read back. States stay on the device from step to step.

Its threads park when idle instead of spinning, so that they take nothing from whatever else runs in the process;
PORTLM_ORT_SPINNING=1 in the environment lets them spin, which is faster when nothing else does.
"""

import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnxruntime

from portlm.artifact import Manifest, RoleSpec, verify_files
from portlm.engine import Ids, Logits, Placement, State, check_inputs
from portlm.errors import EngineUnavailableError, FormatError, PlacementError, PortlmError, UsageError
from portlm.files import safe_join
from portlm.ort_support import CUDA, WEBGPU, open_session, session_options, webgpu_devices
from portlm.runtimes.vulkan import HOW_TO_GET_ONE, VulkanDevice, has_loader, vulkan_devices

PROVIDERS = {"CPUExecutionProvider": "cpu", CUDA: "cuda", WEBGPU: "vulkan"}
MEMORY = {"cpu": "cpu", "cuda": "cuda", "vulkan": "webgpu"}  # ONNX Runtime's name for each device's memory
SOFTWARE_ADAPTER = "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER"

_register = threading.Lock()


class OrtEngine:
    """A decoder graph in an ONNX Runtime session."""

    name = "ort"
    precision = "fp32"

    def __init__(
        self,
        manifest: Manifest,
        role: RoleSpec,
        session: Any,
        device: str,
        profile: str,
        placement: Placement,
    ):
        """Take over an open onnxruntime.InferenceSession; use open()."""
        self.device, self.profile = device, profile
        self.vocab_size, self.context_length = manifest.model.vocab_size, manifest.model.context_length
        self._role = role
        self._session: Any = session
        self._placement = placement
        self._wanted = frozenset(value.name for value in session.get_inputs())

    @classmethod
    def open(
        cls,
        folder: Path,
        manifest: Manifest | None,
        device: str,
        profile: str,
        allow_fallback: bool,
        threads: int | None,
    ) -> Self:
        """Load a graph of an artifact.

        Args:
            folder: the artifact.
            manifest: its manifest; None, a plain checkpoint, is refused.
            device: "cpu", "cuda" or "vulkan".
            profile: "portable" (the exported graph), "fused" (compiled for this device), or "auto", which takes
                the fused one if it was compiled.
            allow_fallback: let nodes that the device lacks run on the CPU; placement() then names them.
            threads: of the CPU, None for one per core.

        Raises:
            EngineUnavailableError: the plugin, a driver or a device is missing.
            PlacementError: a node would run on the CPU, and allow_fallback is False.
            UsageError: the artifact has no such profile for this device.
            FormatError: a file is missing or altered, or ONNX Runtime does not take it.
        """
        if manifest is None:
            raise UsageError(f"ort runs exported models: run portlm export {folder} first")
        role = manifest.roles.get("decoder")
        if role is None:
            raise FormatError(f"{folder}: the manifest has no decoder; export the checkpoint again")
        graph, profile, files = _choose(folder, manifest, role, device, profile)
        verify_files(folder, files)
        path = safe_join(folder, graph)
        ep_device, note = _find_device(device)
        session = _load(path, device, ep_device, allow_fallback, threads)
        placement = _placement(session, device, note)
        if placement.fallback and not allow_fallback:
            raise _misplaced(path, device, placement)
        return cls(manifest, role, session, device, profile, placement)

    def empty_state(self, batch: int) -> State:
        """Return the state before the first token; caches are (batch, K, 0, D)."""
        sizes = {"batch": batch, "past": 0}
        return {
            spec.name: onnxruntime.OrtValue.ortvalue_from_numpy(
                np.zeros([sizes[d] if isinstance(d, str) else d for d in spec.shape], spec.dtype)
            )
            for spec in self._role.state
        }

    def step(
        self, input_ids: Ids, position_ids: Ids, attention_mask: Ids, state: State
    ) -> tuple[Logits, State]:
        """Read T tokens for each row; see Engine."""
        if self._session is None:
            raise UsageError("this engine is closed: load the model again")
        check_inputs(self, input_ids, position_ids, attention_mask)
        binding = self._session.io_binding()
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": attention_mask}
        for name in self._wanted & inputs.keys():
            binding.bind_cpu_input(name, np.ascontiguousarray(inputs[name]))
        for spec in self._role.state:
            binding.bind_ortvalue_input(spec.name, state[spec.name])
        binding.bind_output("logits", "cpu")
        for spec in self._role.state:
            binding.bind_output(spec.output, MEMORY[self.device])
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # its exceptions have no common base but this
            raise PortlmError(f"ort:{self.device}: a step failed: {_line(error)}") from error
        logits, *states = binding.get_outputs()
        names = (spec.name for spec in self._role.state)
        return logits.numpy(), dict(zip(names, states, strict=True))

    def placement(self) -> Placement:
        """Return what ONNX Runtime recorded when it assigned nodes to providers."""
        return self._placement

    def close(self) -> None:
        """Let go of the session and its memory."""
        self._session = None


# The smallest model that shows whether a device computes: y = x + x, two float32, opset 17.
SMALLEST = (
    b'\x08\x08:5\n\x0e\n\x01x\n\x01x\x12\x01y"\x03Add\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x02'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x02B\x04\n\x00\x10\x11"
)


def try_device(device: str) -> str:
    """Run the smallest model on a device and return what is to be said of it, "" for nothing.

    Raises:
        EngineUnavailableError: it cannot be used; the message says why.
    """
    ep_device, note = _find_device(device)
    try:
        session = open_session(SMALLEST, session_options(device, ep_device, 1), device)
        (y,) = session.run(["y"], {"x": np.array([1, 2], np.float32)})
    except Exception as error:  # its exceptions have no common base but this
        raise EngineUnavailableError(f"ort:{device}: the device does not start: {_line(error)}") from error
    if _placement(session, device, "").fallback or y.tolist() != [2, 4]:
        raise EngineUnavailableError(f"ort:{device}: the device does not compute: update its driver")
    return note


def _find_device(device: str) -> tuple[Any, str]:
    """Return what a session needs to be put on a device, and what is to be said of that device."""
    if device == "vulkan":
        ep_device, found = _vulkan_device()
        return ep_device, _software_note(found)
    if device == "cuda" and CUDA not in onnxruntime.get_available_providers():
        raise EngineUnavailableError(
            "ort:cuda: the installed onnxruntime has no CUDA provider, try "
            "pip uninstall onnxruntime && pip install onnxruntime-gpu"
        )
    return None, ""


def _choose(
    folder: Path, manifest: Manifest, role: RoleSpec, device: str, profile: str
) -> tuple[str, str, tuple[str, ...]]:
    """Return the graph to load, its profile, and every file that loading it reads."""
    if profile in ("auto", "fused"):
        for entry in manifest.compiled:
            if (entry.engine, entry.device, entry.profile) == ("ort", device, "fused"):
                graphs = [name for name in entry.files if name.endswith(".onnx")]
                if len(graphs) != 1:
                    raise FormatError(f"{folder}: the entry compiled for ort on {device} must have one graph")
                return graphs[0], "fused", (*entry.files, role.weights)
        if profile == "fused":
            raise UsageError(
                f"{folder} holds no fused graph for ort on {device}: "
                f"run portlm compile {folder} --engine ort --device {device}"
            )
    if profile not in ("auto", "portable"):
        raise UsageError(f"ort has no profile {profile}: choose portable or fused")
    if "portable" not in role.profiles:
        raise UsageError(f"{folder} holds no portable graph: run portlm export again")
    return role.profiles["portable"], "portable", (role.profiles["portable"], role.weights)


def _vulkan_device() -> tuple[Any, list[VulkanDevice]]:
    """Register the WebGPU plugin if nobody has, and return its device beside what Vulkan itself reports.

    A software driver is only offered when an environment variable asks for it. It is set for the moment of
    registering if there is nothing else: the device is emulated then, and placement() says so.
    """
    if not has_loader():
        raise EngineUnavailableError(f"ort:vulkan: there is no Vulkan loader here: {HOW_TO_GET_ONE}")
    found = vulkan_devices()
    if not found:
        raise EngineUnavailableError(f"ort:vulkan: Vulkan offers no device here: {HOW_TO_GET_ONE}")
    try:
        import onnxruntime_ep_webgpu as plugin
    except ImportError:
        raise EngineUnavailableError(
            "ort:vulkan: onnxruntime-ep-webgpu is not installed, try pip install 'portlm[vulkan]'"
        ) from None
    with _register:
        devices = webgpu_devices()
        if not devices:
            library = plugin.get_library_path()
            try:
                onnxruntime.register_execution_provider_library("portlm-webgpu", library)
                devices = webgpu_devices()
                if not devices:
                    onnxruntime.unregister_execution_provider_library("portlm-webgpu")
                    _register_with_software(library)
                    devices = webgpu_devices()
            except Exception as error:  # its exceptions have no common base but this
                raise EngineUnavailableError(
                    f"ort:vulkan: the WebGPU plugin does not load: {_line(error)}: "
                    "try pip install --upgrade onnxruntime onnxruntime-ep-webgpu"
                ) from error
    if not devices:
        raise EngineUnavailableError(f"ort:vulkan: the WebGPU plugin finds no device: {HOW_TO_GET_ONE}")
    return devices[0], found


def _register_with_software(library: str) -> None:
    before = os.environ.get(SOFTWARE_ADAPTER)
    os.environ[SOFTWARE_ADAPTER] = "1"
    onnxruntime.set_default_logger_severity(3)  # it would warn of what we asked for
    try:
        onnxruntime.register_execution_provider_library("portlm-webgpu", library)
    finally:
        onnxruntime.set_default_logger_severity(2)
        if before is None:
            del os.environ[SOFTWARE_ADAPTER]
        else:
            os.environ[SOFTWARE_ADAPTER] = before


def _software_note(found: list[VulkanDevice]) -> str:
    if any(device.kind != "software" for device in found):
        return ""
    return f"software device ({found[0].name}): good for answers, not for timing"


def _load(path: Path, device: str, ep_device: Any, allow_fallback: bool, threads: int | None) -> Any:
    """Open a session on one device, and nowhere else unless fallback is allowed."""
    options = session_options(device, ep_device, threads, allow_fallback)
    try:
        return open_session(path, options, device)
    except Exception as error:  # its exceptions have no common base but this
        if device != "cpu" and not allow_fallback and "fallback" in str(error):
            # Only now is it worth loading once more, to name the nodes that stood in the way.
            again = open_session(path, session_options(device, ep_device, threads), device)
            raise _misplaced(path, device, _placement(again, device, "")) from error
        if device != "cpu" and type(error).__name__ not in ("InvalidGraph", "InvalidProtobuf", "NoSuchFile"):
            raise EngineUnavailableError(
                f"ort:{device}: the device does not start: {_line(error)}"
            ) from error
        raise FormatError(f"{path}: ONNX Runtime does not take it: {_line(error)}; export again") from error


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


def _line(error: Exception) -> str:
    """The first line of a message, without ONNX Runtime's prefix."""
    return str(error).strip().split("\n")[0].removeprefix("[ONNXRuntimeError] : ")[:300]
