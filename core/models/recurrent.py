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
from portlm.models.keyed_config import Key, KeyedConfig
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


@dataclass(frozen=True)
class RecurrentConfig(KeyedConfig):
    """The shape of a recurrent model, and how its weights begin.

    Every weight begins uniform in [-r, r], as Zaremba et al. have it, but the bias of an LSTM's forget gate, to which
    ``forget_bias`` is added (1 in Jozefowicz et al., 2015).

    Raises:
        ConfigError: A value out of range, or another cell.
    """

    family: ClassVar[str] = "recurrent"
    ARCHITECTURE: ClassVar[str] = "Recurrent"
    KEYS: ClassVar[Mapping[str, Key]] = {
        "vocab_size": Key("vocab_size"),
        "context_length": Key("max_position_embeddings"),
        "cell": Key("cell", choices=CELLS),
        "n_layer": Key("num_hidden_layers"),
        "width": Key("hidden_size"),
        "dropout": Key("dropout"),
        "tie_embeddings": Key("tie_word_embeddings"),
        "init_range": Key("init_range"),
        "forget_bias": Key("forget_bias", (-10.0, 10.0)),
    }
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cell not in CELLS:
            raise ConfigError(f"cell must be one of {', '.join(CELLS)}, got {self.cell!r}")

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """What each layer reads and what its state holds: two widths."""
        return ((self.width, self.width),) * self.n_layer

    @classmethod
    def tiny(cls) -> Self:
        """Return a configuration that tests compute in no time: a vocabulary of bytes, few and odd widths."""
        return cls(vocab_size=259, context_length=32, width=27, eos_token_ids=(256,), init_range=0.2)


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
