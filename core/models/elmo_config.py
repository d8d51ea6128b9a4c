"""The configuration of an ELMo, which reads characters as the published ones do, or tokens."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from portlm.errors import ConfigError
from portlm.files import shown
from portlm.models import config_json
from portlm.models.keyed_config import Key, KeyedConfig

Input = Literal["tokens", "characters"]
INPUTS: dict[str, Input] = {"tokens": "tokens", "characters": "characters"}
CHARACTERS = 262  # bytes, ends of texts and words, padding and what is masked
_FILTERS = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))
_MAX_WORD = 1024
_FAR = 1e6  # of numbers that need some bound


@dataclass(frozen=True)
class ElmoConfig(KeyedConfig):
    """The shape of the model, and how its layers are mixed.

    Raises:
        ConfigError: A value out of range, filters wider than a word, or a mix of another number of layers.
    """

    family: ClassVar[str] = "elmo"
    ARCHITECTURE: ClassVar[str] = "Elmo"
    KEYS: ClassVar[Mapping[str, Key]] = {
        "vocab_size": Key("vocab_size"),
        "context_length": Key("max_position_embeddings"),
        "input": Key("input", choices=INPUTS),
        "n_layer": Key("num_hidden_layers"),
        "cells": Key("cell_size", (1, config_json.MAX_HIDDEN)),
        "width": Key("projection_size"),
        "cell_clip": Key("cell_clip", (0.0, _FAR)),
        "projection_clip": Key("projection_clip", (0.0, _FAR)),
        "dropout": Key("dropout"),
        "mix": Key("mix", read=lambda read, _: _mix(read), write=list),
        "gamma": Key("gamma", (-_FAR, _FAR)),
        "word_length": Key("word_length", (1, _MAX_WORD)),
        "character_width": Key("character_width", (1, config_json.MAX_WIDTH)),
        "filters": Key(
            "filters", read=lambda read, _: _filters(read), write=lambda pairs: [list(p) for p in pairs]
        ),
        "n_highway": Key("n_highway", (0, config_json.MAX_LAYERS)),
    }
    FIXED: ClassVar[Mapping[str, Any]] = {"tie_word_embeddings": False}
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

    def __post_init__(self) -> None:
        super().__post_init__()
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

    @property
    def shares(self) -> tuple[float, ...]:
        """γ softmax(w): how much of each layer there is in what the model says of a token."""
        weights = self.mix or (0.0,) * (self.n_layer + 1)
        powers = [math.exp(w - max(weights)) for w in weights]
        return tuple(self.gamma * power / sum(powers) for power in powers)

    @classmethod
    def tiny(cls) -> Self:
        """Return a configuration that tests compute in no time: a vocabulary of bytes, few and odd widths."""
        return cls(
            vocab_size=259, context_length=32, cells=22, width=13, cell_clip=0.5, projection_clip=0.3, dropout=0.0,
            eos_token_ids=(256,),
        )  # fmt: skip


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
