"""One file per model family: the names and shapes of its parameters, and its decoder written with the graph forms."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from portlm.compile.forms import Forms
from portlm.errors import ConfigError, FormatError
from portlm.files import shown
from portlm.models.config_json import (
    MAX_CONTEXT,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_VOCAB,
    MAX_WIDTH,
    Reader,
    check_bounds,
)

FAMILIES = {
    "gpt2": "portlm.compile.families.gpt2:GPT2Decoder",
    "llama": "portlm.compile.families.llama:LlamaDecoder",
}

BOUNDS: dict[str, tuple[float, float]] = {
    "vocab_size": (1, MAX_VOCAB),
    "context_length": (1, MAX_CONTEXT - 1),  # positions below forms.FAR
    "n_layer": (1, MAX_LAYERS),
    "n_head": (1, MAX_HEADS),
    "n_kv_head": (1, MAX_HEADS),
    "head_dim": (1, MAX_WIDTH),
}


@dataclass(frozen=True)
class CacheShape:
    """What generation needs to know about a decoder: the sizes of its vocabulary, context and cache."""

    vocab_size: int
    context_length: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int

    def __post_init__(self) -> None:
        check_bounds(self, BOUNDS)
        if self.n_head % self.n_kv_head:
            raise ConfigError(f"{self.n_kv_head} key/value heads do not divide {self.n_head} heads")


class Decoder(Protocol):
    """A family's description of one model, made from its config.json."""

    family: str
    cache: CacheShape

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that the checkpoint must hold."""

    def weights(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The checkpoint's tensors in graph orientation, with the tables the graph adds."""

    def emit(self, forms: Forms) -> None:
        """Write the decoder with cache, from "input_ids" to "logits" and "present.N.key"."""


def decoder_of(config: Mapping[str, Any], where: str | Path = "config.json") -> Decoder:
    """Describe the model of a config.json.

    Args:
        config: its contents.
        where: its path, for messages.

    Raises:
        FormatError: the family is unknown, or a field is missing, of the wrong type or out of range.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise FormatError(f"{where}: model_type is {shown(family)}, known families are {', '.join(FAMILIES)}")
    module, _, name = FAMILIES[family].partition(":")
    try:
        decoder: Decoder = getattr(importlib.import_module(module), name).from_config(Reader(config))
    except ConfigError as error:
        raise FormatError(f"{where}: {error}") from error
    return decoder


def check_tensors(
    decoder: Decoder, tensors: Mapping[str, np.ndarray], where: str | Path = "model.safetensors"
) -> dict[str, np.ndarray]:
    """Float32 tensors exactly as the family expects them.

    Args:
        decoder: describes the model.
        tensors: all that the checkpoint holds.
        where: its path, for messages.

    Raises:
        FormatError: a tensor is missing, superfluous, of another shape or not floating point.
    """
    expected = decoder.parameters()
    for name in sorted(expected.keys() ^ tensors.keys()):
        state = "lacks" if name in expected else "has an unknown"
        raise FormatError(
            f"{where} {state} tensor {shown(name)}, which does not fit config.json ({decoder.family})"
        )
    checked = {}
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            raise FormatError(f"{where}: {name} has shape {tensor.shape}, config.json asks for {shape}")
        if tensor.dtype not in (np.float16, np.float32, np.float64):
            raise FormatError(f"{where}: {name} has dtype {tensor.dtype}, export needs floating point")
        checked[name] = tensor.astype(np.float32, copy=False)
    return checked
