"""The TVM engine on CUDA: TVM's own runtime, and machine code that was compiled before, perhaps where no GPU is."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from portlm import tvm_cuda
from portlm.errors import EngineUnavailableError
from portlm.runtimes.tvm_vulkan import DeviceEngine
from portlm.tvm_support import Signature, cubin_name


def described() -> str:
    """Open the device, and say what it is.

    Raises:
        EngineUnavailableError: there is none; the message says why.
    """
    tvm_cuda.device()
    first = tvm_cuda.devices()[0]
    return f"{first.name} ({first.architecture}), driver for CUDA {tvm_cuda.driver_version()}"


def lent(signature: Signature, codes: Mapping[str, bytes], command: str) -> AbstractContextManager[None]:
    """Inside the block, a library with this signature loads with the machine code that fits the device.

    Args:
        signature: of the library.
        codes: what lies beside it, by name.
        command: would compile it again.

    Raises:
        EngineUnavailableError: there is no device, or no code for it.
    """
    tvm_cuda.connect()
    here = tvm_cuda.devices()[0].architecture
    best = tvm_cuda.fitting(signature.architectures, here)
    if best is None:
        names = ", ".join(signature.architectures)
        raise EngineUnavailableError(
            f"tvm:cuda: compiled for {names}, this GPU is {here}: run {command} --arch {here}"
        )
    return tvm_cuda.lend(signature.source, codes[cubin_name(best)])


class CudaEngine(DeviceEngine):
    """The roles of an artifact compiled by TVM for CUDA."""

    def _find(self) -> Any:
        return tvm_cuda.device()
