"""What the runtime and the search for a wrong node share about ONNX Runtime: its import, and how a session is opened.

Both must run a graph in the very same way, or the search looks at something that the engine never did.
"""

import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from portlm.quantization import BYTES, activations

CUDA = "CUDAExecutionProvider"
# By itself it rounds what float32 matrices hold to 10 bits (TF32) on every GPU since Ampere.
CUDA_OPTIONS = {"use_tf32": "0"}
WEBGPU = "WebGpuExecutionProvider"
# Of quantized weights: MatMulNBits computes in float32, or with activations rounded to 8 bits, which is faster.
EXACT, ROUNDED = 0, 4
ROUNDED_TARGET = f"onnxruntime, accuracy level {ROUNDED}"
# In the metadata of a graph whose states that grow may be the same memory before and after a call, with room behind.
# Such a graph reads several new tokens on a filled cache of one row at a time (compile/ort_lowering.py).
IN_PLACE = {"portlm.cache": "in place"}
UNREAD = "portlm.unread"  # in the metadata of a graph which does not read this input, so that any value of it will do
EVEN = "-even.onnx"  # ends the name of a second graph, for calls in which nothing is masked
# How long an idle thread looks for the next loop before it sleeps, unless the variable says 0 (not at all) or 1 (as
# long as ONNX Runtime lets it, tens of milliseconds), or the machine is crowded when a graph is opened (not at all).
# Between two loops of a step lie microseconds, between two steps what Python does. Waking a thread up for every loop
# made a step of 30 million parameters take twice as long.
SPINNING_VARIABLE, SPIN_MICROSECONDS = "PORTLM_ORT_SPINNING", 1000
# Looks at what runs now, seconds between two, and seconds for all together.
LOOKS, BETWEEN_LOOKS, LONGEST_LOOK = 5, 5e-4, 3e-3
LOADAVG = Path("/proc/loadavg")
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"


def accuracy_level() -> int:
    """Return the accuracy level of graphs that are lowered now, of what portlm.quantization.activations says."""
    return ROUNDED if activations() == BYTES else EXACT


def import_onnxruntime() -> ModuleType:
    """Import ONNX Runtime without its telemetry, unless the user has set ORT_DISABLE_TELEMETRY.

    Its import alone leaves the id of this machine and a store of events in the user's folders, and is when it reads
    the variable: disable_telemetry_events() comes too late. So nothing else in portlm imports it.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    module: ModuleType = onnxruntime
    return module


def session_options(device: str, ep_device: Any, threads: int | None, allow_fallback: bool = True) -> Any:
    """The onnxruntime.SessionOptions for a device.

    Args:
        device: "cpu", "cuda" or "vulkan".
        ep_device: for Vulkan, the registered WebGPU device.
        threads: of the CPU, None for one per core.
        allow_fallback: False makes a node that the device lacks an error.
    """
    options = import_onnxruntime().SessionOptions()
    options.log_severity_level = 4  # errors come back as exceptions
    options.intra_op_num_threads = threads or 0
    said = os.environ.get(SPINNING_VARIABLE)
    spinning = said or ("0" if _crowded() else "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
    if said is None and spinning == "1":
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_MICROSECONDS))
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if device == "vulkan":
        options.add_provider_for_devices([ep_device], {"dawnBackendType": "Vulkan"})
    if device != "cpu" and not allow_fallback:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return options


def _crowded() -> bool:
    """Whether more threads want to run now than there are cores, this one among them, as far as the system says.

    There a thread that spins is set aside when it is needed: a step of 1.2 ms took 38 with it, and 11 without. Where
    nothing says what runs now, the load of the last minute stands for it, which forgets work slowly.
    """
    cores = os.cpu_count() or 1
    running = _running()
    if running is not None:
        return running > cores
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > cores


def _running() -> int | None:
    """How many threads of the machine run or want to, the caller among them; None where the system does not say.

    The median of a few looks over milliseconds, because a thread that wakes up for microseconds crowds nobody.
    """
    looks: list[int] = []
    end = time.perf_counter() + LONGEST_LOOK
    try:
        while len(looks) < LOOKS and (not looks or time.perf_counter() < end):
            if looks:
                time.sleep(BETWEEN_LOOKS)
            looks.append(int(LOADAVG.read_text().split()[3].partition("/")[0]))
    except (OSError, ValueError, IndexError):
        return None
    # The caller runs, so a system that counts nobody does not count.
    return statistics.median_low(looks) or None


def open_session(model: Path | bytes, options: Any, device: str) -> Any:
    """An onnxruntime.InferenceSession on one device, which never moves to another by itself.

    Raises whatever ONNX Runtime raises: its exceptions have no common base but Exception.
    """
    onnxruntime = import_onnxruntime()
    providers = {"cpu": ["CPUExecutionProvider"], "cuda": [(CUDA, CUDA_OPTIONS)]}.get(
        device
    )  # Vulkan is in the options
    with _without_chatter() if device == "vulkan" else contextlib.nullcontext():
        session = onnxruntime.InferenceSession(model, options, providers, enable_fallback=0)
    session.disable_fallback()
    return session


def row_by_row(sizes: Mapping[str, int]) -> bool:
    """Whether a graph that says IN_PLACE must be called for each row alone, by the sizes of a call's symbols."""
    return sizes.get("batch", 1) > 1 and sizes.get("sequence", 1) > 1 and sizes.get("past", 0) > 0


def webgpu_devices() -> list[Any]:
    """What the WebGPU plugin offers, nothing before it is registered in this process; GPUs first."""
    onnxruntime = import_onnxruntime()
    gpu = onnxruntime.OrtHardwareDeviceType.GPU
    found = [device for device in onnxruntime.get_ep_devices() if device.ep_name == WEBGPU]
    return sorted(found, key=lambda device: device.device.type != gpu)


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Hold back what native code writes to stderr, and pass on all of it but Dawn's notes on artificial limits.

    Dawn prints two lines about limits that it lowers, whenever a software device starts, through no log level.
    """
    with tempfile.TemporaryFile() as held:
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            for line in held:
                if b"artificially reduced" not in line:
                    os.write(2, line)
