"""The engine that computes nothing: the next token is always the id after the last one.

It runs everything around a model without one, so the rest can be tested by itself, and its cost measured.
"""

from pathlib import Path
from typing import Any, Self

import numpy as np

from portlm.artifact import Manifest
from portlm.engine import Ids, Logits, Placement, State, check_inputs
from portlm.errors import FormatError, UsageError
from portlm.files import read_json, shown


class NullEngine:
    """Logits 1 for (id + 1) mod V and 0 for the rest. The state counts the tokens that each row has read."""

    name = "null"
    device = "cpu"
    profile = "native"
    precision = "fp32"

    def __init__(self, vocab_size: int, context_length: int):
        self.vocab_size = vocab_size
        self.context_length = context_length

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
        """Read the sizes of a model, from its manifest or its config.json. Every profile is accepted."""
        if manifest is not None:
            return cls(manifest.model.vocab_size, manifest.model.context_length)
        path = folder / "config.json"
        config = read_json(path)
        if not isinstance(config, dict):
            raise FormatError(f"{path}: not a model configuration; it must be a JSON object")
        lengths = config.get("n_positions", config.get("max_position_embeddings"))
        return cls(_size(path, "vocab_size", config.get("vocab_size")), _size(path, "n_positions", lengths))

    def empty_state(self, batch: int) -> State:
        """Return a count of 0 for each row."""
        return {"tokens": np.zeros(batch, np.int64)}

    def step(
        self, input_ids: Ids, position_ids: Ids, attention_mask: Ids, state: State
    ) -> tuple[Logits, State]:
        """Answer each token with its successor."""
        check_inputs(self, input_ids, position_ids, attention_mask)
        B, T = input_ids.shape
        if state["tokens"].shape != (B,) or (attention_mask.shape[1] - T != state["tokens"]).any():
            raise UsageError("null: the attention mask must cover the tokens of the state and the new ones")
        logits = np.zeros((B, T, self.vocab_size), np.float32)
        np.put_along_axis(logits, ((input_ids + 1) % self.vocab_size)[..., None], np.float32(1), axis=2)
        return logits, {"tokens": state["tokens"] + T}

    def placement(self) -> Placement:
        """Return that there are no nodes."""
        return Placement({"cpu": 0})

    def close(self) -> None:
        """Do nothing."""


def _size(path: Path, name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise FormatError(f"{path}: {name} must be a number of at least 1, got {shown(value)}")
    return value
