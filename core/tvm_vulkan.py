"""A Vulkan device for TVM, whose wheel has none: portlm._vulkan over wgpu-native, which the package wgpu brings.

TVM generates WGSL, the language of WebGPU, and calls the device "webgpu"; what runs it is Vulkan. Once connected, every
module of TVM compiled for the target "webgpu" runs, portlm's or not: ``import tvm`` connects by itself where portlm is
installed (entry point ``tvm.backends``).
"""

import ctypes
import importlib.metadata
import importlib.util
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from portlm.errors import EngineUnavailableError, UsageError
from portlm.tvm_support import VERSIONS, import_tvm

WGPU_VERSION = "0.32.0"  # whose header the device was compiled with
SOFTWARE = "cpu"  # the kind of a device that is a program

_connected = False


class VulkanDevice(NamedTuple):
    """What an installed driver offers.

    Attributes:
        name: its name.
        kind: "discrete", "integrated", "cpu" or "unknown".
        driver: with its version.
    """

    name: str
    kind: str
    driver: str


def connect() -> None:
    """Tell TVM of the device, once per process. No driver is opened before the device is used.

    Raises:
        EngineUnavailableError: TVM, wgpu or the device is missing, or of another version; the message says which.
    """
    global _connected
    if _connected:
        return
    import_tvm()
    _open(Path(__file__).parent)
    _connected = True


def register() -> None:
    """Connect if everything is there, and say nothing if not; called by ``import tvm`` itself."""
    global _connected
    for package, wanted in (*VERSIONS.items(), ("wgpu", WGPU_VERSION)):
        if _version(package) != wanted:
            return
    try:
        _open(Path(__file__).parent)
    except EngineUnavailableError:
        return  # whoever uses the device is told
    _connected = True


def _open(folder: Path) -> None:
    library = folder / f"_vulkan{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        raise EngineUnavailableError(
            "tvm:vulkan: portlm was built without its Vulkan device: reinstall portlm"
        )
    found = _version("wgpu")
    if found is None:
        raise EngineUnavailableError("tvm:vulkan: wgpu is not installed, try pip install portlm[vulkan]")
    if found != WGPU_VERSION:
        raise EngineUnavailableError(
            f"tvm:vulkan: wgpu {found} is installed, portlm needs {WGPU_VERSION}: try pip install portlm[vulkan]"
        )
    spec = importlib.util.find_spec("wgpu")  # not imported: it would look for a window system
    assert spec is not None
    assert spec.origin is not None
    native = Path(spec.origin).parent / "resources" / "libwgpu_native-release.so"
    from tvm_ffi import libinfo

    # The device's own symbols are found in TVM-FFI's library, which must be visible to whatever is loaded later.
    ctypes.CDLL(libinfo.find_libtvm_ffi(), ctypes.RTLD_GLOBAL)
    try:
        opened = ctypes.CDLL(str(library)).portlm_vulkan_open
    except (OSError, AttributeError) as error:
        raise EngineUnavailableError(f"tvm:vulkan: portlm's Vulkan device does not load: {error}") from error
    opened.restype, opened.argtypes = ctypes.c_char_p, [ctypes.c_char_p]
    problem = opened(str(native).encode())
    if problem is not None:
        raise EngineUnavailableError(f"tvm:vulkan: {problem.decode(errors='replace')}")


def devices() -> list[VulkanDevice]:
    """List what the installed drivers offer; connect() must have been called."""
    return [VulkanDevice(*map(str, each)) for each in _function("adapters")()]


def device() -> Any:
    """Connect, and return TVM's device.

    Raises:
        EngineUnavailableError: there is none; the message says why.
    """
    connect()
    if not devices():
        raise EngineUnavailableError("tvm:vulkan: no Vulkan device, try apt-get install mesa-vulkan-drivers")
    return import_tvm().runtime.device("webgpu", 0)


def to_device(array: np.ndarray, device: Any) -> Any:
    """Copy an array to the device. Whole numbers of 64 bits become 32, which is what its kernels read.

    Raises:
        UsageError: one of them does not fit.
    """
    if array.dtype == np.int64:
        narrow = array.astype(np.int32)
        if not np.array_equal(narrow, array):
            raise UsageError(
                "tvm:vulkan computes with whole numbers of 32 bits, and an input has larger ones"
            )
        array = narrow
    return import_tvm().runtime.tensor(np.ascontiguousarray(array), device)


def limits() -> dict[str, int]:
    """What the device binds and computes at most: threads, shared bytes, tensors of a kernel, bytes of each."""
    return {str(name): int(value) for name, value in _function("limits")().items()}


def _function(name: str) -> Any:
    import tvm_ffi

    return tvm_ffi.get_global_func(f"portlm.vulkan.{name}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
