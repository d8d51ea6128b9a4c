"""What every engine offers: one step of a decoder, with its state handed in and handed back.

An engine knows nothing of text, sampling or batches of different lengths; `Session` does all that once for all.
B rows, T new tokens, P tokens already in the state, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from portlm.artifact import Manifest
from portlm.errors import ContextLengthError, UsageError

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]
State = dict[str, Any]
"""Name of each carried tensor (as the manifest lists them) to the engine's own tensor, on the engine's device."""


@dataclass(frozen=True)
class Placement:
    """Where the nodes of a model really are, as the engine reports it after loading.

    Attributes:
        nodes: device to number of nodes on it.
        fallback: nodes that are elsewhere than asked, each as "name (operator)". Empty unless allow_fallback was given.
        note: what a reader of a measurement must know, such as that the device is emulated in software.
    """

    nodes: Mapping[str, int]
    fallback: tuple[str, ...] = ()
    note: str = ""


class Engine(Protocol):
    """A loaded decoder on one device.

    Implementations keep no state between calls, so one engine serves any number of generations.

    Attributes:
        name: "torch", "ort", "tvm" or "null".
        device: "cpu", "cuda" or "vulkan".
        profile: "portable", "fused" or "native" (no exported graph).
        precision: of the arithmetic, "fp32".
        vocab_size: V, the width of the logits.
        context_length: the largest number of tokens that one row may have.
    """

    name: str
    device: str
    profile: str
    precision: str
    vocab_size: int
    context_length: int

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
        """Load the decoder of an artifact.

        Args:
            folder: the artifact, or a plain checkpoint folder if manifest is None.
            manifest: already checked; the engine verifies the hash of each file it opens.
            device: one that the table of engines lists.
            profile: one of PROFILES; "auto" takes the best one that the artifact has for this engine and device.
            allow_fallback: let nodes that the device cannot run go to the CPU.
            threads: of the CPU; None for one per core.

        Raises:
            EngineUnavailableError: a package, driver or device is missing. The message says how to get it.
            PlacementError: a node would run elsewhere, and allow_fallback is False.
            FormatError: a file is missing, altered or not what it should be.
            UsageError: the artifact has no such profile for this engine and device.
        """
        ...

    def empty_state(self, batch: int) -> State:
        """Return the state of B rows before their first token."""
        ...

    def step(
        self, input_ids: Ids, position_ids: Ids, attention_mask: Ids, state: State
    ) -> tuple[Logits, State]:
        """Read T tokens for each row.

        Args:
            input_ids: (B, T).
            position_ids: (B, T), the place of each token in its own row, from 0; any value where it is padding.
            attention_mask: (B, P + T), 0 for padding and 1 for tokens, those in the state included.
            state: of the previous step, which must not be used again.

        Returns:
            logits (B, T, V) and the new state. Logits of padding mean nothing.
        """
        ...

    def placement(self) -> Placement:
        """Return where each node runs."""
        ...

    def close(self) -> None:
        """Free the device. A closed engine is not used again; closing twice is harmless."""
        ...


PROFILES = ("auto", "portable", "fused", "native")


def check_inputs(engine: Engine, input_ids: Ids, position_ids: Ids, attention_mask: Ids) -> None:
    """Raise UsageError unless the inputs of a step belong together and lie inside the model's tables.

    What runs below is generated or compiled code, some of which reads memory at any index it is given.
    """
    for array in (input_ids, position_ids, attention_mask):
        if array.dtype != np.int64:
            raise UsageError(f"the inputs of a step must be int64, got {array.dtype}")
    B, T = input_ids.shape if input_ids.ndim == 2 else (0, 0)
    if B < 1 or T < 1 or position_ids.shape != (B, T):
        raise UsageError(
            f"input_ids and position_ids must both be (B, T), got {input_ids.shape} and {position_ids.shape}"
        )
    if attention_mask.ndim != 2 or attention_mask.shape[0] != B or attention_mask.shape[1] < T:
        raise UsageError(f"attention_mask must be ({B}, P + {T}), got {attention_mask.shape}")
    if attention_mask.shape[1] > engine.context_length:
        raise ContextLengthError(
            attention_mask.shape[1], engine.context_length, "the longest row with its padding"
        )
    for name, values, limit in (
        ("input_ids", input_ids, engine.vocab_size),
        ("position_ids", position_ids, engine.context_length),
        ("attention_mask", attention_mask, 2),
    ):
        if values.view(np.uint64).max() >= limit:  # a negative number is a huge one there
            raise UsageError(f"{name} must be from 0 to {limit - 1}, got {values.min()} to {values.max()}")
