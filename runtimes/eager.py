"""The torch engine: the model's own code, run eagerly. The reference that every other engine is compared with.

The only file of portlm.runtimes that imports PyTorch.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from portlm.artifact import verify_files
from portlm.engine import Array, CallSpec, OpenRequest, Placement
from portlm.errors import EngineUnavailableError, PortlmError, UsageError
from portlm.models import load_model
from portlm.models.roles import Role
from portlm.roles import StateSpec
from portlm.runtimes.base import ArrayEngine, stack

CHECKPOINT = ("config.json", "model.safetensors")


def cuda_name() -> str | None:
    """Return what PyTorch calls its CUDA device, or None where it finds none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def try_device(device: str) -> str:
    """Return the name of the CUDA device.

    Raises:
        EngineUnavailableError: PyTorch finds none.
    """
    name = cuda_name()
    if name is None:
        raise EngineUnavailableError("torch:cuda: PyTorch finds no CUDA device, try nvidia-smi")
    return name


class TorchEngine(ArrayEngine):
    """A model in float32 on the CPU, with portlm's kernels, or on a CUDA device.

    It runs the functions that the model declares as its roles, so its states have the names of the exported graphs.
    """

    name = "torch"
    profile = "native"
    precision = "fp32"

    def __init__(self, model: Any, device: str):
        self.device = device
        self._model: Any = model.to(device).eval()
        self._functions: dict[str, Role] = model.roles()
        specs = {
            name: CallSpec(tuple(role.inputs), tuple(role.outputs), tuple(role.state))
            for name, role in self._functions.items()
        }
        super().__init__(specs, model.config.vocab_size, model.config.context_length)

    @classmethod
    def open(cls, request: OpenRequest) -> Self:
        """Load a checkpoint folder, of an artifact or by itself.

        Args:
            request: its folder has config.json and model.safetensors, which must be as the manifest says if there is
                one. device is "cpu" or "cuda"; profile "auto" or "native", this engine runs no graph. threads count
                for the whole process, because PyTorch has one setting for all. allow_fallback is without effect,
                PyTorch moves nothing by itself.

        Raises:
            EngineUnavailableError: this PyTorch finds no CUDA device.
            UsageError: another profile was asked for.
            FormatError: a file is missing or not what it should be.
        """
        if request.profile not in ("auto", "native"):
            raise UsageError(
                f"torch runs the checkpoint itself: its profile is native, not {request.profile}"
            )
        if request.device == "cuda" and not torch.cuda.is_available():
            raise EngineUnavailableError(
                f"torch:cuda: PyTorch {torch.__version__} finds no CUDA device, run portlm doctor to see why"
            )
        if request.manifest is not None:
            verify_files(request.folder, CHECKPOINT)
        if request.threads is not None:
            torch.set_num_threads(request.threads)
        return cls(load_model(request.folder), request.device)

    def _call(
        self, role: str, inputs: Mapping[str, Array], tensors: dict[str, Any]
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        spec = self.roles[role]
        given = [torch.from_numpy(inputs[item.name].copy()).to(self.device) for item in spec.inputs]
        states = [tensors[item.name] for item in spec.state]
        try:
            with torch.inference_mode():
                results = self._functions[role].function(*given, *states)
                outputs = {
                    item.name: result.cpu().numpy()
                    for item, result in zip(spec.outputs, results, strict=False)
                }
        except torch.cuda.OutOfMemoryError as error:
            rows = next(iter(inputs.values())).shape[0]
            raise PortlmError(
                f"torch:{self.device}: out of memory with {rows} rows: use a smaller batch"
            ) from error
        changed = [item.name for item in spec.state if item.output]
        return outputs, dict(zip(changed, results[len(spec.outputs) :], strict=True))

    def _settle(self, tensor: Any, spec: StateSpec) -> Any:
        return tensor if isinstance(tensor, Tensor) else torch.from_numpy(tensor).to(self.device)

    def _stack(self, tensors: Sequence[Any], shape: Sequence[int], dtype: str) -> Any:
        return stack(tensors, shape, tensors[0].new_zeros(shape))

    def placement(self) -> Placement:
        """Count the modules that hold parameters, by device."""
        if self._model is None:
            raise UsageError("this engine is closed: load the model again")
        nodes = Counter(
            next(module.parameters(recurse=False)).device.type
            for module in self._model.modules()
            if next(module.parameters(recurse=False), None) is not None
        )
        return Placement(dict(nodes))

    def close(self) -> None:
        """Let go of the model."""
        super().close()
        self._model, self._functions = None, {}
