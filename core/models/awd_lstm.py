"""AWD-LSTM: a recurrent language model that is wide, and held back by every kind of dropout. ULMFiT is trained on it.

Merity, Keskar and Socher, "Regularizing and Optimizing LSTM Language Models", 2017 (arXiv:1708.02182); Howard and
Ruder, "Universal Language Model Fine-tuning for Text Classification", 2018 (arXiv:1801.06146). Against the recurrent
models of core/models/recurrent.py:

- the layers are wider than the embedding, save the last, whose state is the input of the tied output layer
- DropConnect (Wan et al., 2013): a share of the recurrent weights is 0, the same for the whole batch
- variational dropout (Gal and Ghahramani, 2016): what goes up loses the same units at every token of a row
- embedding dropout: some words lose their vectors for the whole batch
- both products of a layer have a bias, as torch.nn.LSTM has it, which is how the papers' parameters are counted

Their training is NT-ASGD (core/train/nt_asgd.py) and adds a penalty of activations (AR, TAR), which there is not here.

B batch, T time, E width of the embedding and of the last layer, H of the others, V vocabulary.

transformers has no such models, so it does not open these checkpoints and says that it does not know their model_type.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from portlm.models.keyed_config import BOUNDS, Key, KeyedConfig
from portlm.models.layers import drop
from portlm.models.recurrent_decoder import Cell, CellLayer, RecurrentDecoder
from portlm.ops.embedding import embedding

_DROPOUTS = ("dropout", "input_dropout", "layer_dropout", "embedding_dropout", "weight_dropout")


@dataclass(frozen=True)
class AWDLSTMConfig(KeyedConfig):
    """The shape of the model, and what its training drops.

    The embedding begins uniform in [-r, r], the bias of the output as 0, and each layer as torch.nn.LSTM does, uniform
    in [-1/√H, 1/√H] for H units.

    Raises:
        ConfigError: A value out of range.
    """

    family: ClassVar[str] = "awd_lstm"
    ARCHITECTURE: ClassVar[str] = "AWDLSTM"
    KEYS: ClassVar[Mapping[str, Key]] = {
        "vocab_size": Key("vocab_size"),
        "context_length": Key("max_position_embeddings"),
        "n_layer": Key("num_hidden_layers"),
        "width": Key("embedding_size"),
        "hidden": Key("hidden_size"),
        **{name: Key(name, BOUNDS["dropout"]) for name in _DROPOUTS},
        "init_range": Key("init_range"),
    }
    FIXED: ClassVar[Mapping[str, Any]] = {"tie_word_embeddings": True}
    cell: ClassVar[Cell] = "lstm"
    tie_embeddings: ClassVar[bool] = True
    # What [model] of a training run may set, and what it is for a small model on a CPU.
    SETTINGS: ClassVar[dict[str, Any]] = {
        "n_layer": 3,
        "width": 64,
        "hidden": 128,
        "context_length": 64,  # tokens the model sees at once
        "dropout": 0.0,
        "input_dropout": 0.0,
        "layer_dropout": 0.0,
        "embedding_dropout": 0.0,
        "weight_dropout": 0.0,
    }

    vocab_size: int = 10000
    context_length: int = 1024  # the longest text; the state itself has no limit
    n_layer: int = 3
    width: int = 400  # E
    hidden: int = 1150  # H
    dropout: float = 0.4  # of what the last layer gives
    input_dropout: float = 0.4  # of the embedding, as the first layer gets it
    layer_dropout: float = 0.3  # between layers
    embedding_dropout: float = 0.05  # of whole words
    weight_dropout: float = 0.5  # of the recurrent weights
    init_range: float = 0.1  # r above

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """What each layer reads and what its state holds: two widths."""
        widths = (self.width, *[self.hidden] * (self.n_layer - 1), self.width)
        return tuple(itertools.pairwise(widths))

    @classmethod
    def tiny(cls) -> Self:
        """Return a configuration that tests compute in no time: a vocabulary of bytes, few and odd widths."""
        return cls(
            vocab_size=259, context_length=32, width=21, hidden=35, eos_token_ids=(256,), init_range=0.3,
            **dict.fromkeys(_DROPOUTS, 0.0),  # type: ignore[arg-type]
        )  # fmt: skip


PRESETS = {"awd-lstm-ptb": AWDLSTMConfig(), "awd-lstm-wikitext2": AWDLSTMConfig(vocab_size=33278)}
PARAMETERS = {  # which the paper rounds to 24 and 33 million
    "awd-lstm-ptb": 24_221_600,
    "awd-lstm-wikitext2": 33_556_078,
}


class AWDLSTM(RecurrentDecoder):
    """An AWD-LSTM with randomly initialised weights.

    Args:
        config: Its shape.
        init: False leaves the parameters uninitialised, for a caller that fills them all.
    """

    def __init__(self, config: AWDLSTMConfig, *, init: bool = True):
        rate = config.weight_dropout
        super().__init__(
            config,
            [
                CellLayer("lstm", width, units, twice=True, weight_dropout=rate)
                for width, units in config.layers
            ],
        )
        if init:
            self.init_weights()

    def read(self, ids: Tensor) -> Tensor:
        """Return the embedding (B, T, E) of ids (B, T), as the first layer gets it."""
        table: Tensor = self.embed.weight
        rate = self.config.embedding_dropout
        if self.training and rate > 0:
            table = table * drop(table.new_ones(len(table), 1), rate, self.training)
        return self._locked(embedding(ids, table), self.config.input_dropout)

    def between(self, y: Tensor, number: int) -> Tensor:
        """Return what goes up from the layer of a number, (B, T, H), or (B, T, E) from the last."""
        last = number == self.config.n_layer - 1
        return self._locked(y, self.config.dropout if last else self.config.layer_dropout)

    def _locked(self, x: Tensor, rate: float) -> Tensor:
        """Drop the same units (B, T, C) at every token of a row, only in training."""
        if not self.training or rate == 0:
            return x
        return x * drop(x.new_ones(len(x), 1, x.shape[2]), rate, self.training)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw fresh weights from PyTorch's global generator, as AWDLSTMConfig says."""
        r = self.config.init_range
        self.embed.weight.uniform_(-r, r)
        self.head_bias.zero_()
        for layer, (_, units) in zip(self.layers, self.config.layers, strict=True):
            for p in layer.parameters():
                p.uniform_(-1 / math.sqrt(units), 1 / math.sqrt(units))
