"""The engine that computes nothing: the next token is always the id after the last one.

It runs everything around a model without one, so the rest can be tested by itself, and its cost measured.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from portlm.engine import Array, CallSpec, OpenRequest, Placement
from portlm.errors import FormatError
from portlm.files import read_json, shown
from portlm.roles import StateSpec, TensorSpec
from portlm.runtimes.base import ArrayEngine

DECODER = CallSpec(
    inputs=(
        TensorSpec("input_ids", "int64", ("batch", "sequence")),
        TensorSpec("attention_mask", "int64", ("batch", "past + sequence")),
        TensorSpec("position_ids", "int64", ("batch", "sequence")),
        TensorSpec("logits_to_keep", "int64", ("kept",)),
    ),
    outputs=(TensorSpec("logits", "float32", ("batch", "kept", "vocabulary")),),
    state=(StateSpec("past_ids", "present_ids", "int64", ("batch", "past"), "empty", "append"),),
)


class NullEngine(ArrayEngine):
    """Logits 1 for (id + 1) mod V and 0 for the rest. The state is the tokens that each row has read."""

    name = "null"
    device = "cpu"
    profile = "native"
    precision = "fp32"

    def __init__(self, vocab_size: int, context_length: int):
        super().__init__({"decoder": DECODER}, vocab_size, context_length)

    @classmethod
    def open(cls, request: OpenRequest) -> Self:
        """Read the sizes of a model, from its manifest or its config.json. Every profile is accepted."""
        if request.manifest is not None:
            return cls(request.manifest.model.vocab_size, request.manifest.model.context_length)
        path = request.folder / "config.json"
        config = read_json(path)
        if not isinstance(config, dict):
            raise FormatError(f"{path}: not a model configuration; it must be a JSON object")
        lengths = config.get("n_positions", config.get("max_position_embeddings"))
        return cls(_size(path, "vocab_size", config.get("vocab_size")), _size(path, "n_positions", lengths))

    def _call(
        self, role: str, inputs: Mapping[str, Array], tensors: dict[str, Any]
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        ids = inputs["input_ids"]
        asked = ids[:, inputs["logits_to_keep"]]
        logits = np.zeros((*asked.shape, self.vocab_size), np.float32)
        np.put_along_axis(logits, ((asked + 1) % self.vocab_size)[..., None], np.float32(1), axis=2)
        return {"logits": logits}, {"past_ids": np.concatenate([tensors["past_ids"], ids], axis=1)}

    def placement(self) -> Placement:
        """Return that there are no nodes."""
        return Placement({"cpu": 0})


def _size(path: Path, name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise FormatError(f"{path}: {name} must be a number of at least 1, got {shown(value)}")
    return value
