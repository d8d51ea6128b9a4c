"""The TVM engine on CUDA: TVM's own runtime, and machine code that was compiled before, perhaps where no GPU is."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from portlm import tvm_cuda
from portlm.artifact import Manifest
from portlm.engine import Array, OpenRequest
from portlm.errors import EngineUnavailableError
from portlm.runtimes.tvm_device import DeviceEngine
from portlm.tvm_support import Signature, cubin_name, virtual_machine

SHARE = 8  # of the memory is what blocks that nobody uses may take


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
    """The roles of an artifact compiled by TVM for CUDA.

    Memory comes from TVM's pool, because the driver waits for the device whenever it takes some back. The pool keeps a
    block for every length of a growing state, so it is told to let go of them once that may be a share of the memory.
    """

    def __init__(self, request: OpenRequest, manifest: Manifest, libraries: Mapping[str, str], profile: str):
        super().__init__(request, manifest, libraries, profile)
        self._left, self._most = (
            0,
            tvm_cuda.devices()[0].memory // SHARE,
        )  # bytes of states since, and at most

    def _machine(self, module: Any) -> Any:
        return virtual_machine(module, self._device, "pooled")

    def _call(
        self, role: str, inputs: Mapping[str, Array], tensors: dict[str, Any]
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        outputs, states = super()._call(role, inputs, tensors)
        self._left += sum(
            np.dtype(str(each.dtype)).itemsize * math.prod(each.shape) for each in states.values()
        )
        if self._left > self._most:
            tvm_cuda.release()
            self._left = 0
        return outputs, states
