"""portlm's devices for TVM: libraries beside the extension, opened once versions of what they speak with are known."""

import ctypes
import importlib.metadata
import sysconfig
from pathlib import Path

from portlm.errors import EngineUnavailableError


def version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def open_plugin(device: str, library: str) -> None:
    """Open portlm._<device>, which tells TVM of the device; TVM's versions must have been compared before.

    Args:
        device: "vulkan" or "opencl".
        library: what it is to find its functions in.

    Raises:
        EngineUnavailableError: portlm was built without it, or it says what is wrong.
    """
    from tvm_ffi import libinfo

    plugin = Path(__file__).parent / f"_{device}{sysconfig.get_config_var('EXT_SUFFIX')}"
    name = {"opencl": "OpenCL", "vulkan": "Vulkan"}[device]
    if not plugin.exists():
        raise EngineUnavailableError(
            f"tvm:{device}: portlm was built without its {name} device: reinstall portlm"
        )
    # The device's own symbols are found in TVM-FFI's library, which must be visible to whatever is loaded later.
    ctypes.CDLL(libinfo.find_libtvm_ffi(), ctypes.RTLD_GLOBAL)
    try:
        opened = getattr(ctypes.CDLL(str(plugin)), f"portlm_{device}_open")
    except (OSError, AttributeError) as error:
        raise EngineUnavailableError(
            f"tvm:{device}: portlm's {name} device does not load: {error}"
        ) from error
    opened.restype, opened.argtypes = ctypes.c_char_p, [ctypes.c_char_p]
    problem = opened(library.encode())
    if problem is not None:
        raise EngineUnavailableError(f"tvm:{device}: {problem.decode(errors='replace')}")
