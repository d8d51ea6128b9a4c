"""One file per model family: the names and shapes of its parameters, and its decoder written with the graph forms."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from portlm.compile.forms import Forms
from portlm.errors import FormatError

FAMILIES = {"gpt2": "portlm.compile.families.gpt2:GPT2Decoder", "llama": "portlm.compile.families.llama:LlamaDecoder"}

MAX_LAYERS = 1024
MAX_VOCABULARY = 2**20
MAX_DIMENSION = 2**31


@dataclass(frozen=True)
class CacheShape:
    """What generation needs to know about a decoder: the sizes of its vocabulary, context and cache."""

    vocab_size: int
    context_length: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int


class Decoder(Protocol):
    """A family's description of one model, made from its config.json."""

    family: str

    @property
    def cache(self) -> CacheShape:
        """Sizes that the graph inputs, the manifest and the engines share."""

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that the checkpoint must hold."""

    def weights(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The checkpoint's tensors in graph orientation, with the tables the graph adds."""

    def emit(self, forms: Forms) -> None:
        """Write the decoder with cache, from "input_ids" to "logits" and "present.N.key"."""


def decoder_of(config: Mapping[str, Any]) -> Decoder:
    """Describe the model of a config.json.

    Raises:
        FormatError: the family is unknown, or a field is missing, of the wrong type or out of range.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise FormatError(f"config.json: model_type is {family!r}, known families are {', '.join(FAMILIES)}")
    module, _, name = FAMILIES[family].partition(":")
    decoder: Decoder = getattr(importlib.import_module(module), name).from_config(config)
    return decoder


def check_tensors(decoder: Decoder, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Float32 tensors exactly as the family expects them.

    Raises:
        FormatError: a tensor is missing, superfluous, of another shape or not floating point.
    """
    expected = decoder.parameters()
    for name in sorted(expected.keys() ^ tensors.keys()):
        state = "lacks" if name in expected else "has an unknown"
        raise FormatError(f"model.safetensors {state} tensor {name}, which does not fit config.json ({decoder.family})")
    checked = {}
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            raise FormatError(f"model.safetensors: {name} has shape {tensor.shape}, config.json asks for {shape}")
        if tensor.dtype not in (np.float16, np.float32, np.float64):
            raise FormatError(f"model.safetensors: {name} has dtype {tensor.dtype}, export needs floating point")
        checked[name] = tensor.astype(np.float32, copy=False)
    return checked


def whole(config: Mapping[str, Any], key: str, limit: int = MAX_DIMENSION, default: int | None = None) -> int:
    """A whole number from 1 to the limit; a default stands in for a missing or null field."""
    value = config.get(key)
    if value is None and default is not None:
        return default
    if type(value) is not int or not 1 <= value <= limit:
        raise FormatError(f"config.json: {key} must be a whole number from 1 to {limit}, got {value!r}")
    return value


def positive(config: Mapping[str, Any], key: str, default: float) -> float:
    """A finite number above zero."""
    value = config.get(key, default)
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise FormatError(f"config.json: {key} must be a number above zero, got {value!r}")
    return float(value)


def choice(config: Mapping[str, Any], key: str, options: Mapping[Any, Any], default: Any) -> Any:
    """The meaning of a field that takes one of a few values."""
    value = config.get(key, default)
    if type(value) not in (str, bool, type(None)) or value not in options:
        raise FormatError(f"config.json: {key} must be one of {', '.join(map(repr, options))}, got {value!r}")
    return options[value]


def refuse(config: Mapping[str, Any], key: str, *harmless: Any) -> None:
    """Stop at a field that changes the computation in a way the graph does not follow."""
    value = config.get(key, harmless[0])
    if value not in harmless:
        raise FormatError(f"config.json: {key} = {value!r} is not supported by export, only {harmless[0]!r}")
