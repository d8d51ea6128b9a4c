"""A Vulkan device for TVM, whose wheel has none: portlm._vulkan over wgpu-native, which the package wgpu brings.

TVM generates WGSL, the language of WebGPU, and calls the device "webgpu"; what runs it is Vulkan. Once connected, every
module of TVM compiled for the target "webgpu" runs, portlm's or not: ``import tvm`` connects by itself where portlm is
installed (entry point ``tvm.backends``). Compiled for :func:`target`, a module may have tensors of int64, too: WGSL has
no 64 bits, so its kernels compute with 32, and the device converts what comes in and goes out, and looks at its range.
"""

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from portlm.errors import EngineUnavailableError
from portlm.tvm_plugin import open_plugin, version
from portlm.tvm_support import VERSIONS, import_tvm

WGPU_VERSION = "0.32.0"  # whose header the device was compiled with
SOFTWARE = "cpu"  # the kind of a device that is a program
# What every WebGPU device has; kernels for more threads would run on fewer devices.
MOST_THREADS, SHARED_BYTES = 256, 16384
_KEY = "vulkan"  # in a target's keys: kernels are for this device, and not for a browser

_opened = _connected = False


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
    """Tell TVM of the device and of its kernels, once per process. No driver is opened before the device is used.

    Raises:
        EngineUnavailableError: TVM, wgpu or the device is missing, or of another version; the message says which.
    """
    global _connected
    if _connected:
        return
    import_tvm()
    if not _opened:
        _open()
    _narrow_kernels()
    _connected = True


def register() -> None:
    """Tell TVM of the device if everything is there, and say nothing if not; called by ``import tvm`` itself."""
    for package, wanted in (*VERSIONS.items(), ("wgpu", WGPU_VERSION)):
        if version(package) != wanted:
            return
    try:
        _open()
    except EngineUnavailableError:
        return  # whoever uses the device is told


def _open() -> None:
    global _opened
    found = version("wgpu")
    if found is None:
        raise EngineUnavailableError("tvm:vulkan: wgpu is not installed, try pip install portlm[vulkan]")
    if found != WGPU_VERSION:
        raise EngineUnavailableError(
            f"tvm:vulkan: wgpu {found} is installed, portlm needs {WGPU_VERSION}: try pip install portlm[vulkan]"
        )
    spec = importlib.util.find_spec("wgpu")  # not imported: it would look for a window system
    assert spec is not None
    assert spec.origin is not None
    open_plugin("vulkan", str(Path(spec.origin).parent / "resources" / "libwgpu_native-release.so"))
    _opened = True


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


def described() -> str:
    """Open the device, and say what it is.

    Raises:
        EngineUnavailableError: there is none; the message says why.
    """
    name = str(device().device_name)
    driver = next((each for each in devices() if each.name == name), None)
    if driver is None:
        return name
    software = " (software, for correctness only)" if driver.kind == SOFTWARE else ""
    return f"{name}, {driver.driver}{software}"


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
        "kind": "webgpu", "keys": [_KEY, "webgpu", "gpu"],
        "max_num_threads": MOST_THREADS, "max_shared_memory_per_block": SHARED_BYTES,
    }  # fmt: skip
    return tvm.target.Target(kernels, tvm.target.Target("llvm") if host is None else host)


def _narrow_kernels() -> None:
    """Have TVM generate kernels of 32 bits where they are for this device."""
    import tvm
    import tvm_ffi

    generate = tvm_ffi.get_global_func("target.build.webgpu")
    wide, narrow = tvm.ir.PrimType("int64"), tvm.ir.PrimType("int32")

    def narrowed(kind: Any) -> Any:
        return narrow if kind.dtype == wide.dtype else kind

    def build(module: Any, target: Any) -> Any:
        if _KEY in target.keys:
            functions = {
                name: tvm_ffi.structural_map(function, [(type(wide), narrowed)])
                for name, function in module.functions.items()
            }
            module = tvm.IRModule(functions, attrs=module.attrs)
        return generate(module, target)

    tvm_ffi.register_global_func("target.build.webgpu", build, override=True)


def limits() -> dict[str, int]:
    """What the device binds and computes at most: threads, shared bytes, tensors of a kernel, bytes of each."""
    return {str(name): int(value) for name, value in _function("limits")().items()}


def in_words(array: np.ndarray) -> np.ndarray:
    """Bytes as the words of four that kernels read, and anything else as it is."""
    return array.view(np.int32) if array.dtype == np.int8 else array


def _function(name: str) -> Any:
    import tvm_ffi

    return tvm_ffi.get_global_func(f"portlm.vulkan.{name}")
