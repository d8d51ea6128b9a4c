"""The configuration of an ELMo, which reads characters as the published ones do, or tokens."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from portlm.errors import ConfigError
from portlm.files import shown
from portlm.models import config_json

Input = Literal["tokens", "characters"]
INPUTS: dict[str, Input] = {"tokens": "tokens", "characters": "characters"}
CHARACTERS = 262  # bytes, ends of texts and words, padding and what is masked
_FILTERS = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))
_MAX_WORD = 1024
_FAR = 1e6  # of numbers that need some bound
_BOUNDS = {
    "vocab_size": (1, config_json.MAX_VOCAB),
    "context_length": (1, config_json.MAX_CONTEXT),
    "n_layer": (1, config_json.MAX_LAYERS),
    "cells": (1, config_json.MAX_HIDDEN),
    "width": (1, config_json.MAX_WIDTH),
    "cell_clip": (0.0, _FAR),
    "projection_clip": (0.0, _FAR),
    "dropout": (0.0, 0.99),
    "gamma": (-_FAR, _FAR),
    "word_length": (1, _MAX_WORD),
    "character_width": (1, config_json.MAX_WIDTH),
    "n_highway": (0, config_json.MAX_LAYERS),
}


@dataclass(frozen=True)
class ElmoConfig:
    """The shape of the model, and how its layers are mixed.

    Raises:
        ConfigError: A value out of range, filters wider than a word, or a mix of another number of layers.
    """

    family: ClassVar[str] = "elmo"
    # What [model] of a training run may set, and what it is for a small model on a CPU.
    SETTINGS: ClassVar[dict[str, Any]] = {
        "n_layer": 2,
        "cells": 256,
        "width": 64,
        "context_length": 32,  # tokens the model sees at once
        "dropout": 0.0,
    }

    vocab_size: int = CHARACTERS  # of tokens, or how many characters there are
    context_length: int = 1024  # the longest text; the states have no limit
    input: Input = "tokens"
    n_layer: int = 2
    cells: int = 4096  # of a layer, in each direction
    width: int = 512  # C, of what each direction says
    cell_clip: float = 3.0  # no cell is beyond it; 0 for no bound
    projection_clip: float = 3.0  # the same of what a layer says
    dropout: float = 0.1  # of what each layer reads, and of what the output reads
    mix: tuple[float, ...] = ()  # w of the token layer and of each layer; () for equal shares
    gamma: float = 1.0
    word_length: int = 50  # characters of a word
    character_width: int = 16
    filters: tuple[tuple[int, int], ...] = _FILTERS  # widths in characters, and how many of each
    n_highway: int = 2
    bos_token_id: int | None = None  # this and the next two are not computed with, only kept with the model
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        config_json.check_bounds(self, _BOUNDS)
        if self.input not in INPUTS:
            raise ConfigError(f"input must be one of {', '.join(INPUTS)}, got {self.input!r}")
        if len(self.mix) not in (0, self.n_layer + 1) or not all(-_FAR <= w <= _FAR for w in self.mix):
            raise ConfigError(
                f"mix must be a number from {-_FAR:g} to {_FAR:g} for the token layer and for each of {self.n_layer} "
                f"layers, got {shown(list(self.mix))}"
            )
        if not self.filters:
            raise ConfigError("filters must be [width, how many] pairs, got none")
        for size, count in self.filters:
            if not (1 <= size <= self.word_length and 1 <= count <= config_json.MAX_WIDTH):
                raise ConfigError(
                    f"filters must be from 1 to word_length = {self.word_length} characters wide, and from 1 to "
                    f"{config_json.MAX_WIDTH} of each, got {[size, count]}"
                )
        config_json.check_token_ids(self)

    @property
    def shares(self) -> tuple[float, ...]:
        """γ softmax(w): how much of each layer there is in what the model says of a token."""
        weights = self.mix or (0.0,) * (self.n_layer + 1)
        powers = [math.exp(w - max(weights)) for w in weights]
        return tuple(self.gamma * power / sum(powers) for power in powers)

    @classmethod
    def from_settings(cls, **values: Any) -> Self:
        """Return the configuration for values of SETTINGS and of the vocabulary.

        Raises:
            ConfigError: A value out of range, by name.
        """
        return cls(**values)

    @classmethod
    def tiny(cls) -> Self:
        """Return a configuration that tests compute in no time: a vocabulary of bytes, few and odd widths."""
        return cls(
            vocab_size=259, context_length=32, cells=22, width=13, cell_clip=0.5, projection_clip=0.3, dropout=0.0,
            eos_token_ids=(256,),
        )  # fmt: skip

    @classmethod
    def from_hf(cls, data: Mapping[str, Any] | config_json.Reader) -> Self:
        """Read the contents of a config.json, strictly.

        Raises:
            ConfigError: A key that is missing, unknown, out of range or asks for another model. It is named.
        """
        read = config_json.Reader.of(data)
        read.require("model_type", "elmo")
        vocab_size = read.integer("vocab_size", CHARACTERS)
        config = cls(
            vocab_size=vocab_size,
            context_length=read.integer("max_position_embeddings", 1024),
            input=read.choice("input", "tokens", INPUTS),
            n_layer=read.integer("num_hidden_layers", 2),
            cells=read.integer("cell_size", 4096),
            width=read.integer("projection_size", 512),
            cell_clip=read.number("cell_clip", 3.0),
            projection_clip=read.number("projection_clip", 3.0),
            dropout=read.number("dropout", 0.1),
            mix=_mix(read),
            gamma=read.number("gamma", 1.0),
            word_length=read.integer("word_length", 50),
            character_width=read.integer("character_width", 16),
            filters=_filters(read),
            n_highway=read.integer("n_highway", 2),
            bos_token_id=read.token_id("bos_token_id", vocab_size),
            eos_token_ids=read.token_ids("eos_token_id", vocab_size),
            pad_token_id=read.token_id("pad_token_id", vocab_size),
        )
        read.require("tie_word_embeddings", False)
        read.finish()
        return config

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json."""
        return {
            "architectures": ["Elmo"],
            "model_type": "elmo",
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.context_length,
            "input": self.input,
            "num_hidden_layers": self.n_layer,
            "cell_size": self.cells,
            "projection_size": self.width,
            "cell_clip": self.cell_clip,
            "projection_clip": self.projection_clip,
            "dropout": self.dropout,
            "mix": list(self.mix),
            "gamma": self.gamma,
            "word_length": self.word_length,
            "character_width": self.character_width,
            "filters": [list(pair) for pair in self.filters],
            "n_highway": self.n_highway,
            "tie_word_embeddings": False,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": config_json.one_or_list(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
        }


def _mix(read: config_json.Reader) -> tuple[float, ...]:
    value = read.raw("mix", "a number for the token layer and for each layer; [] or null for equal shares")
    found = [] if value is None else value
    if not isinstance(found, list) or not all(type(w) in (int, float) and -_FAR <= w <= _FAR for w in found):
        raise ConfigError(f"mix must be a list of numbers from {-_FAR:g} to {_FAR:g}, got {shown(value)}")
    return tuple(map(float, found))


def _filters(read: config_json.Reader) -> tuple[tuple[int, int], ...]:
    value = read.raw("filters", f"[width, how many] pairs, {[list(pair) for pair in _FILTERS]} if missing")
    if value is None:
        return _FILTERS
    if not isinstance(value, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(type(n) is int for n in pair) for pair in value
    ):
        raise ConfigError(f"filters must be a list of [width, how many], got {shown(value)}")
    return tuple((size, count) for size, count in value)
