"""Recurrent language models: what a text said is one state of fixed size, and not a cache that grows with it.

Elman, "Finding Structure in Time", 1990; Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997; Cho et al., 2014;
as language models Mikolov et al., 2010, and Zaremba et al., "Recurrent Neural Network Regularization", 2014.

- one cell per layer, which is the whole difference between an RNN, an LSTM and a GRU
- no positions: the order of the tokens is the order in which they are read
- dropout on what goes up and never on what goes on in time, so at the input of every layer and of the output (Zaremba)
- an output layer with a bias of its own, or with the token embedding as its matrix (Press and Wolf, 2017)

B batch, T time, C width, which is also that of the state, V vocabulary.

transformers has no such models, so it does not open these checkpoints and says that it does not know their model_type.
The presets are the three of Zaremba et al.; their paper writes a cell as one affine map, so with one bias per gate.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from portlm.errors import ConfigError
from portlm.models import config_json
from portlm.models.layers import drop
from portlm.models.recurrent_decoder import (
    CELLS,
    STATES,
    Cell,
    CellLayer,
    RecurrentDecoder,
    add_forget_bias,
)

__all__ = ["CELLS", "PARAMETERS", "PRESETS", "STATES", "CellLayer", "Recurrent", "RecurrentConfig"]

_BOUNDS = {
    "vocab_size": (1, config_json.MAX_VOCAB),
    "context_length": (1, config_json.MAX_CONTEXT),
    "n_layer": (1, config_json.MAX_LAYERS),
    "width": (1, config_json.MAX_WIDTH),
    "dropout": (0.0, 0.99),
    "init_range": (0.0, 1.0),
    "forget_bias": (-10.0, 10.0),
}


@dataclass(frozen=True)
class RecurrentConfig:
    """The shape of a recurrent model, and how its weights begin.

    Every weight begins uniform in [-r, r], as Zaremba et al. have it, but the bias of an LSTM's forget gate, to which
    ``forget_bias`` is added (1 in Jozefowicz et al., 2015).

    Raises:
        ConfigError: A value out of range, or another cell.
    """

    family: ClassVar[str] = "recurrent"
    # What [model] of a training run may set, and what it is for a small model on a CPU.
    SETTINGS: ClassVar[dict[str, Any]] = {
        "cell": "lstm",
        "n_layer": 2,
        "width": 128,
        "context_length": 64,  # tokens the model sees at once
        "dropout": 0.0,
        "tie_embeddings": False,
    }

    vocab_size: int = 10000
    context_length: int = 1024  # the longest text; the state itself has no limit
    cell: Cell = "lstm"
    n_layer: int = 2
    width: int = 200
    dropout: float = 0.0
    tie_embeddings: bool = False
    init_range: float = 0.1  # r above
    forget_bias: float = 0.0
    bos_token_id: int | None = None  # this and the next two are not computed with, only kept with the model
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        config_json.check_bounds(self, _BOUNDS)
        if self.cell not in CELLS:
            raise ConfigError(f"cell must be one of {', '.join(CELLS)}, got {self.cell!r}")
        if type(self.tie_embeddings) is not bool:
            raise ConfigError(f"tie_embeddings must be true or false, got {self.tie_embeddings!r}")
        config_json.check_token_ids(self)

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """What each layer reads and what its state holds: two widths."""
        return ((self.width, self.width),) * self.n_layer

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
        return cls(vocab_size=259, context_length=32, width=27, eos_token_ids=(256,), init_range=0.2)

    @classmethod
    def from_hf(cls, data: Mapping[str, Any] | config_json.Reader) -> Self:
        """Read the contents of a config.json, strictly.

        Raises:
            ConfigError: A key that is missing, unknown, out of range or asks for another model. It is named.
        """
        read = config_json.Reader.of(data)
        read.require("model_type", "recurrent")
        vocab_size = read.integer("vocab_size", 10000)
        config = cls(
            vocab_size=vocab_size,
            context_length=read.integer("max_position_embeddings", 1024),
            cell=read.choice("cell", "lstm", CELLS),
            n_layer=read.integer("num_hidden_layers", 2),
            width=read.integer("hidden_size", 200),
            dropout=read.number("dropout", 0.0),
            tie_embeddings=read.boolean("tie_word_embeddings", False),
            init_range=read.number("init_range", 0.1),
            forget_bias=read.number("forget_bias", 0.0),
            bos_token_id=read.token_id("bos_token_id", vocab_size),
            eos_token_ids=read.token_ids("eos_token_id", vocab_size),
            pad_token_id=read.token_id("pad_token_id", vocab_size),
        )
        read.finish()
        return config

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json."""
        return {
            "architectures": ["Recurrent"],
            "model_type": "recurrent",
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.context_length,
            "cell": self.cell,
            "num_hidden_layers": self.n_layer,
            "hidden_size": self.width,
            "dropout": self.dropout,
            "tie_word_embeddings": self.tie_embeddings,
            "init_range": self.init_range,
            "forget_bias": self.forget_bias,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": config_json.one_or_list(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
        }


PRESETS = {
    "zaremba-small": RecurrentConfig(),
    "zaremba-medium": RecurrentConfig(width=650, dropout=0.5, init_range=0.05),
    "zaremba-large": RecurrentConfig(width=1500, dropout=0.65, init_range=0.04),
}
PARAMETERS = {  # by the paper's equations for its vocabulary of 10 000; later papers round them to 5, 20 and 66 million
    "zaremba-small": 4_651_600,
    "zaremba-medium": 19_775_200,
    "zaremba-large": 66_022_000,
}


class Recurrent(RecurrentDecoder):
    """A recurrent language model with randomly initialised weights.

    Args:
        config: Its shape.
        init: False leaves the parameters uninitialised, for a caller that fills them all.
    """

    def __init__(self, config: RecurrentConfig, *, init: bool = True):
        super().__init__(config, [CellLayer(config.cell, *widths) for widths in config.layers])
        if init:
            self.init_weights()

    def read(self, ids: Tensor) -> Tensor:
        """Return the embedding (B, T, C) of ids (B, T), as the first layer gets it."""
        return drop(self.embed(ids), self.config.dropout, self.training)

    def between(self, y: Tensor, number: int) -> Tensor:
        """Return what goes up from the layer of a number, (B, T, C)."""
        return drop(y, self.config.dropout, self.training)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw fresh weights from PyTorch's global generator, as RecurrentConfig says."""
        for p in self.parameters():
            p.uniform_(-self.config.init_range, self.config.init_range)
        if self.config.cell == "lstm":
            add_forget_bias(self.layers, self.config.forget_bias)
