"""What this machine can run: every engine and device, and what is missing for the rest.

Nothing here raises because something is absent or broken, and drivers are only loaded in child processes, because a
broken one ends its process. PyTorch is not imported: its version says whether it was built for CUDA.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

from portlm.engines import ENGINES, resolve
from portlm.errors import EngineUnavailableError
from portlm.extension import problem

CHILD_SECONDS = 60  # a software driver compiles its first pipeline in a few

# Distributions that all install the module onnxruntime, each over the other's files.
ORT_WHEELS = (
    "onnxruntime", "onnxruntime-gpu", "onnxruntime-webgpu", "onnxruntime-directml", "onnxruntime-openvino",
    "onnxruntime-qnn", "onnxruntime-rocm", "onnxruntime-migraphx", "onnxruntime-training", "ort-nightly",
)  # fmt: skip
PACKAGES = (
    "portlm", "numpy", "torch", "onnx", *ORT_WHEELS, "onnxruntime-ep-webgpu", "apache-tvm", "apache-tvm-ffi",
    "tokenizers", "safetensors", "transformers",
)  # fmt: skip
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


class Row(TypedDict):
    """One engine on one device.

    Attributes:
        engine: as in ENGINES.
        device: "cpu", "cuda", "vulkan" or "opencl".
        available: whether it can be used now.
        reason: why not; "" if it is available.
        command: what would add it; "" if nothing that can be typed would.
        detail: versions, device names, and what a reader of measurements must know.
    """

    engine: str
    device: str
    available: bool
    reason: str
    command: str
    detail: str


def probe() -> list[Row]:
    """Return one row for every engine and device of the table. Takes a second or two; never raises."""
    pairs = [(engine, device) for engine, entry in ENGINES.items() for device in entry.devices]
    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(lambda pair: _row(*pair), pairs))


def versions() -> dict[str, str]:
    """Versions of the packages that matter here and are installed, without importing them."""
    found = {}
    for package in PACKAGES:
        version = _version(package)
        if version is not None:
            found[package] = version
    return found


def conflicts() -> list[str]:
    """Sentences about installed packages that break each other; empty if there are none."""
    wheels = [package for package in ORT_WHEELS if _version(package) is not None]
    if len(wheels) < 2:
        return []
    return [
        f"{' and '.join(wheels)} install the same module and overwrite each other: "
        f"pip uninstall {' '.join(wheels)}, then install the one you want"
    ]


def machine() -> dict[str, object]:
    """Processor, instruction sets, memory and system, as far as they can be found out."""
    memory = _memory()
    isa, usable = _instruction_sets()
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "kernels": isa,
        "instruction_sets": usable,
        "memory_bytes": memory.get("MemTotal"),
        "available_bytes": memory.get("MemAvailable"),
        "nvidia_driver": _nvidia_driver(),
    }


def _row(engine: str, device: str) -> Row:
    check = resolve(ENGINES[engine].probe)
    try:
        detail = check(engine, device)
        return Row(engine=engine, device=device, available=True, reason="", command="", detail=detail)
    except _MissingError as missing:
        reason, command = missing.reason, missing.command
    except Exception as error:  # a probe must answer, whatever is broken
        reason, command = f"{type(error).__name__}: {error}", ""
    return Row(engine=engine, device=device, available=False, reason=reason, command=command, detail="")


class _MissingError(Exception):
    """Why something is not available, and what would add it."""

    def __init__(self, reason: str, command: str = ""):
        super().__init__(reason)
        self.reason, self.command = reason, command


def torch(engine: str, device: str) -> str:
    """Probe PyTorch; its version says whether it was built for CUDA."""
    version = _need("torch", "torch", "train")
    if device == "cpu":
        isa, _ = _instruction_sets()
        return f"torch {version}, " + (f"portlm kernels for {isa}" if isa else "without portlm's kernels")
    if version.endswith("+cpu"):
        raise _MissingError(f"torch {version} was built without CUDA", "pip install --force-reinstall torch")
    if not NVIDIA_DRIVER.exists():
        raise _MissingError("there is no NVIDIA driver here")
    return f"torch {version}, {_child(engine, device)}"


def ort(engine: str, device: str) -> str:
    """Probe ONNX Runtime, its plugin for Vulkan and the device."""
    if conflict := conflicts():
        raise _MissingError(*conflict[0].split(": ", 1))
    wheel = next((package for package in ORT_WHEELS if _version(package) is not None), "onnxruntime")
    version = _need(wheel, "onnxruntime", "onnx")
    if device == "cuda" and not NVIDIA_DRIVER.exists():
        raise _MissingError("there is no NVIDIA driver here")
    said = [f"{wheel} {version}"]
    if device == "vulkan":
        plugin = _need("onnxruntime-ep-webgpu", "onnxruntime_ep_webgpu", "vulkan")
        said.append(f"onnxruntime-ep-webgpu {plugin}")
    note = _child(engine, device)
    return ", ".join([*said, note] if note else said)


def tvm(engine: str, device: str) -> str:
    """Probe TVM and the binary interface of portlm's kernels."""
    version = _need("apache-tvm", "tvm", "tvm")
    _need_kernels()
    note = _child(engine, device)
    return f"apache-tvm {version}" + (f", {note}" if note else "")


def packed(engine: str, device: str) -> str:
    """Probe portlm's own kernels, which the runner of packed files calls."""
    _need_kernels()
    isa, _ = _instruction_sets()
    return f"portlm kernels for {isa}"


def null(engine: str, device: str) -> str:
    """Say what the null engine is for."""
    return "computes nothing: for tests and for the cost of everything around a model"


def _need(package: str, module: str, extra: str) -> str:
    """Return the version of an installed package, whose module must be there too."""
    version = _version(package)
    if version is None or importlib.util.find_spec(module) is None:
        raise _MissingError(f"{package} is not installed", f"pip install 'portlm[{extra}]'")
    return version


def _need_kernels() -> None:
    if missing := problem():
        reason, _, command = missing.partition(", try ")
        raise _MissingError(reason, command)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _child(engine: str, device: str) -> str:
    """Try an engine on a device in a process of its own; return what it says of it."""
    command = [sys.executable, "-P", "-m", "portlm.runtimes.probe", engine, device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise _MissingError(f"no answer within {CHILD_SECONDS} seconds: its driver hangs") from None
    lines = done.stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        answer = None
    if done.returncode == 0 and isinstance(answer, dict):
        if "detail" in answer:
            return str(answer["detail"])
        raise _MissingError(str(answer["reason"]), str(answer["command"]))
    if done.returncode < 0:
        raise _MissingError(f"its driver or library crashed the process (signal {-done.returncode})")
    last = done.stderr.strip().splitlines()[-1:] or ["without a word"]
    raise _MissingError(f"it cannot be loaded: {last[0]}")


def _answer(engine: str, device: str) -> dict[str, str]:
    """What the child process says: a detail, or a reason and a command."""
    try:
        return {"detail": resolve(ENGINES[engine].trial)(device)}
    except EngineUnavailableError as error:
        reason = str(error).removeprefix(f"{engine}:{device}: ").removeprefix(f"{engine}: ")
        reason, _, command = reason.partition(", try ")
        return {"reason": reason, "command": command}


def _instruction_sets() -> tuple[str, list[str]]:
    """The instruction set that portlm's kernels use, "" if they were not built, and those they could use."""
    try:
        from portlm import _C

        return _C.isa(), _C.usable_isas()
    except (ImportError, RuntimeError):
        return "", []


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> dict[str, int]:
    """MemTotal and MemAvailable in bytes, on Linux."""
    found = {}
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in ("MemTotal", "MemAvailable"):
                found[name] = int(rest.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return found


def _nvidia_driver() -> str | None:
    try:
        return NVIDIA_DRIVER.read_text().splitlines()[0].split(":", 1)[-1].strip()
    except (OSError, IndexError):
        return None


if __name__ == "__main__":
    print(json.dumps(_answer(*sys.argv[1:3])))
