"""The torch engine: the model's own code, run eagerly. The reference that every other engine is compared with.

The only file of portlm.runtimes that imports PyTorch.
"""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch

from portlm.artifact import Manifest, verify_files
from portlm.engine import Ids, Logits, Placement, State, check_inputs
from portlm.errors import EngineUnavailableError, PortlmError, UsageError
from portlm.models import load_model

if TYPE_CHECKING:
    from portlm.models import Model

CHECKPOINT = ("config.json", "model.safetensors")


def cuda_name() -> str | None:
    """Return what PyTorch calls its CUDA device, or None where it finds none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


class TorchEngine:
    """A model in float32 on the CPU, with portlm's kernels, or on a CUDA device.

    The state holds each layer's keys and values, (B, K, P, D), under the names that the exported graphs use.
    """

    name = "torch"
    profile = "native"
    precision = "fp32"

    def __init__(self, model: "Model", device: str):
        self.device = device
        self.vocab_size = model.config.vocab_size
        self.context_length = model.config.context_length
        self._model: Model | None = model.to(device).eval()
        self._names = [
            (f"past_key_values.{layer}.key", f"past_key_values.{layer}.value")
            for layer in range(model.config.n_layer)
        ]

    @classmethod
    def open(
        cls,
        folder: Path,
        manifest: Manifest | None,
        device: str,
        profile: str,
        allow_fallback: bool,
        threads: int | None,
    ) -> Self:
        """Load a checkpoint folder, of an artifact or by itself.

        Args:
            folder: with config.json and model.safetensors.
            manifest: if there is one, these two files must be as it says.
            device: "cpu" or "cuda".
            profile: "auto" or "native"; this engine runs no graph.
            allow_fallback: without effect, PyTorch moves nothing by itself.
            threads: of the whole process, because PyTorch has one setting for all; None leaves it as it is.

        Raises:
            EngineUnavailableError: this PyTorch finds no CUDA device.
            UsageError: another profile was asked for.
            FormatError: a file is missing or not what it should be.
        """
        if profile not in ("auto", "native"):
            raise UsageError(f"torch runs the checkpoint itself: its profile is native, not {profile}")
        if device == "cuda" and not torch.cuda.is_available():
            raise EngineUnavailableError(
                f"torch:cuda: PyTorch {torch.__version__} finds no CUDA device, run portlm doctor to see why"
            )
        if manifest is not None:
            verify_files(folder, CHECKPOINT)
        if threads is not None:
            torch.set_num_threads(threads)
        return cls(load_model(folder), device)

    def empty_state(self, batch: int) -> State:
        """Return caches (B, K, 0, D)."""
        config = self._loaded().config
        empty = torch.empty(batch, config.n_kv_head, 0, config.head_dim, device=self.device)
        return {name: empty for names in self._names for name in names}

    def step(
        self, input_ids: Ids, position_ids: Ids, attention_mask: Ids, state: State
    ) -> tuple[Logits, State]:
        """Read T tokens for each row; see Engine."""
        model = self._loaded()
        check_inputs(self, input_ids, position_ids, attention_mask)
        ids, positions, mask = (
            torch.from_numpy(array.copy()).to(self.device)
            for array in (input_ids, position_ids, attention_mask)
        )
        past = [(state[key], state[value]) for key, value in self._names]
        try:
            with torch.inference_mode():
                logits, present = model.step(ids, positions, mask, past)
                answer: Logits = logits.float().cpu().numpy()
        except torch.cuda.OutOfMemoryError as error:
            raise PortlmError(
                f"torch:{self.device}: out of memory with {len(input_ids)} rows: use a smaller batch"
            ) from error
        new: State = {}
        for (key, value), (keys, values) in zip(self._names, present, strict=True):
            new[key], new[value] = keys, values
        return answer, new

    def placement(self) -> Placement:
        """Count the modules that hold parameters, by device."""
        nodes = Counter(
            next(module.parameters(recurse=False)).device.type
            for module in self._loaded().modules()
            if next(module.parameters(recurse=False), None) is not None
        )
        return Placement(dict(nodes))

    def close(self) -> None:
        """Let go of the model."""
        self._model = None

    def _loaded(self) -> "Model":
        if self._model is None:
            raise UsageError("this engine is closed: load the model again")
        return self._model
