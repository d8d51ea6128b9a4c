"""The TVM engine on a device of its own: weights and states stay there, token ids go in and logits come out.

For Vulkan and OpenCL the device is portlm's (csrc/vulkan, csrc/opencl). Tokens are written one by one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from portlm.artifact import Manifest
from portlm.engine import Advance, Array, Ids, OpenRequest, State
from portlm.roles import StateSpec
from portlm.runtimes.tvm import TvmEngine
from portlm.runtimes.tvm_weights import map_weights
from portlm.tvm_support import Signature, import_tvm, place, virtual_machine
from portlm.tvm_vulkan import in_words


class DeviceEngine(TvmEngine):
    """The roles of an artifact compiled by TVM for a device with memory of its own."""

    def __init__(self, request: OpenRequest, manifest: Manifest, libraries: Mapping[str, str], profile: str):
        super().__init__(request, manifest, libraries, profile)
        self._device = place(request.device)

    def advance(self, state: State, asked: Advance) -> tuple[Ids, State] | None:
        """Refuse: the loop over tokens in C++ is for kernels on the CPU."""
        return None

    def _moved(self, array: Array) -> Any:
        """A copy on the device, of as many axes."""
        return import_tvm().runtime.tensor(np.asarray(array, order="C"), self._device)

    def _argument(self, array: Array) -> Any:
        return self._moved(array)

    def _answer(self, tensor: Any) -> Array:
        array: Array = tensor.numpy()
        return array

    def _weights(self, path: Path, signature: Signature) -> list[Any]:
        mapped = map_weights(path, signature.weights, signature.packed, signature.panels)
        return [self._moved(in_words(np.from_dlpack(tensor))) for tensor in mapped]

    def _machine(self, module: Any) -> Any:
        return virtual_machine(module, self._device)

    def _work(self, tensor: Any) -> Any:
        return _Held(tensor)

    def _settle(self, tensor: Any, spec: StateSpec) -> Any:
        if isinstance(tensor, _Held):
            return tensor.tensor
        return self._moved(np.asarray(tensor))


class _Held:
    """A tensor on the device as an array that comes here when it is cut or read, and not for its shape."""

    def __init__(self, tensor: Any):
        self.tensor = tensor
        self.shape = tuple(int(size) for size in tensor.shape)

    def __getitem__(self, index: Any) -> Array:
        return np.asarray(self)[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        array: Array = self.tensor.numpy()
        return array if dtype is None else array.astype(dtype)
