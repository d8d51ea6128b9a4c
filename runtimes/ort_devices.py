"""What ONNX Runtime needs to be put on a device, and why it cannot be: its CUDA provider, and the WebGPU plugin."""

import contextlib
import io
import os
import threading
from typing import Any

from portlm.errors import EngineUnavailableError
from portlm.ort_support import CUDA, import_onnxruntime, webgpu_devices
from portlm.runtimes.vulkan import HOW_TO_GET_ONE, VulkanDevice, has_loader, vulkan_devices

onnxruntime = import_onnxruntime()

SOFTWARE_ADAPTER = "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER"

_register = threading.Lock()


def find_device(device: str) -> tuple[Any, str]:
    """Return what a session needs to be put on a device, and what is to be said of that device."""
    if device == "vulkan":
        ep_device, found = vulkan_device()
        return ep_device, _software_note(found)
    if device == "cuda":
        if CUDA not in onnxruntime.get_available_providers():
            raise EngineUnavailableError(
                "ort:cuda: the installed onnxruntime has no CUDA provider, try "
                "pip uninstall onnxruntime && pip install onnxruntime-gpu"
            )
        _load_nvidia_libraries()
    return None, ""


def _load_nvidia_libraries() -> None:
    """Load CUDA and cuDNN of NVIDIA's Python packages, if they are there: the provider looks in the system's folders.

    What is missing it says itself when a session is opened. ONNX Runtime prints it, too, where results are printed.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls()


def vulkan_device() -> tuple[Any, list[VulkanDevice]]:
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
                    f"ort:vulkan: the WebGPU plugin does not load: {first_line(error)}: "
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


def first_line(error: Exception) -> str:
    """The first line of a message, without ONNX Runtime's prefix."""
    return str(error).strip().split("\n")[0].removeprefix("[ONNXRuntimeError] : ")[:300]
