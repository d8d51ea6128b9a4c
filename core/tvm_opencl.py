"""An OpenCL device for TVM, whose wheel has none: portlm._opencl over the system's OpenCL loader, or that of pyopencl.

TVM's wheel generates OpenCL C for the target "opencl". Once connected, every module of TVM compiled for it runs,
portlm's or not: ``import tvm`` connects by itself where portlm is installed (entry point ``tvm.backends``).
"""

import contextlib
import ctypes
import importlib.util
import os
from pathlib import Path
from typing import Any, NamedTuple

from portlm.errors import EngineUnavailableError
from portlm.tvm_plugin import open_plugin, version
from portlm.tvm_support import VERSIONS, import_tvm

PROCESSOR = "cpu"  # the kind of a device that is no other than what runs Python
# What every device of OpenCL's full profile that is worth using has; kernels for more would run on fewer.
MOST_THREADS, SHARED_BYTES = 256, 32768
LOADER = "libOpenCL.so.1"
DRIVERS = Path("/etc/OpenCL/vendors")  # a file for each that is installed
HOW_TO_GET_ONE = "a GPU's driver brings it, and there is one for processors, try pip install pyopencl[pocl]"

_connected = False


class OpenClDevice(NamedTuple):
    """What an installed driver offers.

    Attributes:
        name: its name.
        kind: "gpu", "accelerator", "cpu" or "unknown".
        platform: the driver's name.
        driver: version of OpenCL, and of the driver.
    """

    name: str
    kind: str
    platform: str
    driver: str


def connect() -> None:
    """Tell TVM of the device and of its kernels, once per process. No driver is opened before it is asked for.

    Raises:
        EngineUnavailableError: TVM, OpenCL's loader or the device is missing, or of another version; the message says
            which.
    """
    global _connected
    if _connected:
        return
    import_tvm()
    if not _connected:  # importing TVM may have been enough: see register
        open_plugin("opencl", loader())
        _connected = True


def register() -> None:
    """Tell TVM of the device if everything is there, and say nothing if not; called by ``import tvm`` itself."""
    global _connected
    if _connected or any(version(package) != wanted for package, wanted in VERSIONS.items()):
        return
    try:
        open_plugin("opencl", loader())
    except EngineUnavailableError:
        return  # whoever uses the device is told
    _connected = True


def loader() -> str:
    """Find OpenCL's loader: the system's where a driver is installed for it, else the one inside the package pyopencl.

    The latter also finds the driver of the package pocl-binary-distribution, which lies beside it.

    Raises:
        EngineUnavailableError: there is none.
    """
    spec = importlib.util.find_spec("pyopencl")  # not imported: that is slow, and nothing of it is needed
    folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else None
    inside = sorted((folder / ".libs").glob("libOpenCL*.so*")) if folder is not None else []
    if not inside or _has_drivers():
        try:
            ctypes.CDLL(LOADER)
            return LOADER
        except OSError:
            if not inside:
                raise EngineUnavailableError(f"tvm:opencl: there is no {LOADER}: {HOW_TO_GET_ONE}") from None
    assert folder is not None
    os.environ["PYOPENCL_HOME"] = str(folder)  # which it reads without a look whether it is set
    for vendor in (folder / ".libs").glob("*.icd"):
        # It names its library without a folder, and is found only if that is loaded already.
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(folder / ".libs" / vendor.read_text().strip()))
    return str(inside[0])


def _has_drivers() -> bool:
    named = os.environ.get("OCL_ICD_VENDORS") or os.environ.get("OCL_ICD_FILENAMES")
    return bool(named) or any(DRIVERS.glob("*.icd"))


def devices() -> list[OpenClDevice]:
    """List what the installed drivers offer; connect() must have been called."""
    return [OpenClDevice(*map(str, each)) for each in _function("adapters")()]


def device() -> Any:
    """Connect, and return TVM's device.

    Raises:
        EngineUnavailableError: there is none; the message says why.
    """
    connect()
    if not devices():
        raise EngineUnavailableError(f"tvm:opencl: no OpenCL device: {HOW_TO_GET_ONE}")
    return import_tvm().runtime.device("opencl", 0)


def described() -> str:
    """Open the device, and say what it is, and of which platform.

    Raises:
        EngineUnavailableError: there is none, or PORTLM_OPENCL_DEVICE names none; the message says why.
    """
    device()
    try:
        it = OpenClDevice(*map(str, _function("chosen")()))
    except RuntimeError as error:
        raise EngineUnavailableError(f"tvm:opencl: {str(error).strip().splitlines()[-1]}") from error
    processor = " (this machine's processor)" if it.kind == PROCESSOR else ""
    return f"{it.name} of {it.platform}, {it.driver}{processor}"


def target(host: Any = None) -> Any:
    """Return TVM's target for modules that run on the device: tvm.target.Target.

    Args:
        host: the target of what calls the kernels; LLVM's for this processor if it is None.

    Raises:
        EngineUnavailableError: as of connect.
    """
    connect()
    tvm = import_tvm()
    kernels = {
        "kind": "opencl", "max_num_threads": MOST_THREADS, "max_threads_per_block": MOST_THREADS,
        "max_shared_memory_per_block": SHARED_BYTES,
    }  # fmt: skip
    return tvm.target.Target(kernels, tvm.target.Target("llvm") if host is None else host)


def limits() -> dict[str, int]:
    """What it has: threads and shared bytes of a group, bytes of a tensor and of all, half and double or not."""
    return {str(name): int(value) for name, value in _function("limits")().items()}


def launches() -> int:
    """How many kernels this process has launched on the device."""
    return int(_function("launches")())


def _function(name: str) -> Any:
    import tvm_ffi

    return tvm_ffi.get_global_func(f"portlm.opencl.{name}")
