"""Recurrent language models: what a text said is one state of fixed size, and not a cache that grows with it.

Elman, "Finding Structure in Time", 1990; Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997; Cho et al., 2014;
as language models Mikolov et al., 2010, and Zaremba et al., "Recurrent Neural Network Regularization", 2014.

- one cell per layer, which is the whole difference between an RNN, an LSTM and a GRU
- no positions: the order of the tokens is the order in which they are read
- dropout on what goes up and never on what goes on in time, so at the input of every layer and of the output (Zaremba)
- an output layer with a bias of its own, or with the token embedding as its matrix (Press and Wolf, 2017)

B batch, T time, C width, which is also that of the state, G gates, V vocabulary.

transformers has no such models, so it does not open these checkpoints and says that it does not know their model_type.
The presets are the three of Zaremba et al.; their paper writes a cell as one affine map, so with one bias per gate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from portlm.errors import ConfigError
from portlm.models import config_json
from portlm.models.layers import Embedding, Linear, check_length
from portlm.models.roles import Role
from portlm.ops.gru import gru
from portlm.ops.gru_cell import gru_cell
from portlm.ops.linear import linear
from portlm.ops.linear_cross_entropy import linear_cross_entropy
from portlm.ops.lstm import lstm
from portlm.ops.lstm_cell import lstm_cell
from portlm.ops.rnn import rnn
from portlm.ops.rnn_cell import rnn_cell
from portlm.roles import StateSpec, TensorSpec

Cell = Literal["rnn", "rnn_relu", "lstm", "gru"]
States = tuple[Tensor, ...]  # of one layer, each (B, C): the output, and for an LSTM that of the cell
CELLS: dict[str, Cell] = {"rnn": "rnn", "rnn_relu": "rnn_relu", "lstm": "lstm", "gru": "gru"}
GATES: dict[str, int] = {"rnn": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
STATES: dict[str, tuple[str, ...]] = {
    cell: ("hidden", "cell") if cell == "lstm" else ("hidden",) for cell in CELLS
}
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


class CellLayer(nn.Module):
    """One recurrent layer; gates in the order of torch.nn.

    Args:
        cell: What its units are.
        inputs: The width of what it reads.
        width: C, of its state and its output.
        bias: Whether its gates have biases.
        reverse: Whether it reads the last token first.
    """

    def __init__(self, cell: Cell, inputs: int, width: int, *, bias: bool = True, reverse: bool = False):
        super().__init__()
        self.cell, self.reverse = cell, reverse
        rows = GATES[cell] * width
        # The biases of both products are only ever added, save in a GRU, where the reset gate is between them.
        self.input = Linear(inputs, rows, bias=bias)
        self.recurrent = Linear(width, rows, bias=bias and cell == "gru")

    def forward(self, x: Tensor, states: States, mask: Tensor | None) -> tuple[Tensor, States]:
        """Read x (B, T, inputs) from the states (B, C) on; return the output (B, T, C) and the next states."""
        if x.shape[1] == 1 and not torch.is_grad_enabled():  # the cells have no gradient
            return self._one(x, states, mask)
        arguments = (
            x, self.input.weight, self.recurrent.weight, self.input.bias, self.recurrent.bias, *states, mask,
            self.reverse,
        )  # fmt: skip
        y, *after = self._layer()(*arguments)
        return y, tuple(after)

    def _layer(self) -> Any:
        found = {"rnn": rnn, "rnn_relu": partial(rnn, activation="relu"), "lstm": lstm, "gru": gru}
        return found[self.cell]

    def _one(self, x: Tensor, states: States, mask: Tensor | None) -> tuple[Tensor, States]:
        """The same for one token, whose products an engine can do in its own way."""
        old = tuple(state.unsqueeze(1) for state in states)  # (B, 1, C)
        projected, recurrent = self.input(x), self.recurrent(old[0])  # (B, 1, G C)
        if self.cell == "lstm":
            new: States = lstm_cell(projected, recurrent, old[0], old[1], mask)
        elif self.cell == "gru":
            new = (gru_cell(projected, recurrent, old[0], mask),)
        else:
            activation = "relu" if self.cell == "rnn_relu" else "tanh"
            new = (rnn_cell(projected, recurrent, old[0], mask, activation),)
        return new[0], tuple(state.squeeze(1) for state in new)


class Layer(CellLayer):
    """One layer of a recurrent language model."""

    def __init__(self, config: RecurrentConfig):
        super().__init__(config.cell, config.width, config.width)


class Recurrent(nn.Module):
    """A recurrent language model with randomly initialised weights.

    Args:
        config: Its shape.
        init: False leaves the parameters uninitialised, for a caller that fills them all.
    """

    def __init__(self, config: RecurrentConfig, *, init: bool = True):
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.n_layer)])
        self.head = None if config.tie_embeddings else Linear(config.width, config.vocab_size, bias=False)
        self.head_bias = nn.Parameter(torch.empty(config.vocab_size))
        if init:
            self.init_weights()

    @property
    def head_weight(self) -> Tensor:
        """The output matrix (V, C)."""
        return self.embed.weight if self.head is None else self.head.weight

    def forward(self, input_ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return logits (B, T, V), or the mean cross-entropy when targets are given. Each row begins a text.

        Args:
            input_ids: (B, T) int64.
            targets: (B, T) int64, the token that follows each input; -100 where there is none to predict.

        Raises:
            ContextLengthError: T is larger than the context.
        """
        check_length(input_ids.shape[1], self.config.context_length)
        y, _ = self._read(input_ids, None, None)
        if targets is None:
            return linear(y, self.head_weight, self.head_bias)
        # The bias as one more column of the matrix, whose input is 1.
        y = torch.cat((y, y.new_ones(*y.shape[:-1], 1)), dim=-1)
        weight = torch.cat((self.head_weight, self.head_bias[:, None]), dim=1)
        return linear_cross_entropy(y.flatten(0, 1), weight, targets.flatten())

    @torch.no_grad()
    def step(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        past: Sequence[States] | None = None,
        logits_to_keep: Tensor | None = None,
    ) -> tuple[Tensor, list[States]]:
        """Continue sequences from their states.

        Args:
            input_ids: (B, T) int64, the new tokens.
            position_ids: Not asked: a state knows no positions.
            attention_mask: (B, P + T) int64, 0 on the padding left of a shorter row; only the last T are asked.
            past: The states of each layer, each (B, C); None before the first token.
            logits_to_keep: (kept,) int64, which of the T new tokens to give logits for; None for all.

        Returns:
            Logits (B, kept, V), and the next states of each layer.

        Raises:
            ContextLengthError: P + T is larger than the context.
        """
        check_length(attention_mask.shape[1], self.config.context_length)
        y, after = self._read(input_ids, attention_mask[:, -input_ids.shape[1] :], past)
        if logits_to_keep is not None:
            y = y.index_select(1, logits_to_keep)
        return linear(y, self.head_weight, self.head_bias), after

    def roles(self) -> dict[str, Role]:
        """Return what this model can be exported as: a decoder that reads one token of each row per call."""
        names = STATES[self.config.cell]

        def function(input_ids: Tensor, attention_mask: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
            past = [flat[i : i + len(names)] for i in range(0, len(flat), len(names))]
            y, after = self._read(input_ids, attention_mask, past)
            logits = linear(y, self.head_weight, self.head_bias)
            return logits, *(state for states in after for state in states)

        inputs = (
            TensorSpec("input_ids", "int64", ("batch", 1)),
            TensorSpec("attention_mask", "int64", ("batch", 1)),
        )
        state = tuple(
            StateSpec(
                f"past_{name}.{layer}", f"present_{name}.{layer}", "float32", ("batch", self.config.width),
                "zeros", "replace",
            )
            for layer in range(self.config.n_layer)
            for name in names
        )  # fmt: skip
        outputs = (TensorSpec("logits", "float32", ("batch", 1, self.config.vocab_size)),)
        return {"decoder": Role(function, inputs, outputs, state)}

    def _read(
        self, ids: Tensor, mask: Tensor | None, past: Sequence[States] | None
    ) -> tuple[Tensor, list[States]]:
        """Read ids (B, T); return the last layer's output (B, T, C) and the next states of each layer."""
        x = self.embed(ids)
        if past is None:
            nothing = x.new_zeros(len(ids), self.config.width)
            past = [(nothing,) * len(STATES[self.config.cell])] * self.config.n_layer
        after = []
        for layer, states in zip(self.layers, past, strict=True):
            x, new = layer(F.dropout(x, self.config.dropout, self.training), states, mask)
            after.append(new)
        return F.dropout(x, self.config.dropout, self.training), after

    def num_parameters(self) -> int:
        """Return the number of parameters, a shared embedding counted once."""
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw fresh weights from PyTorch's global generator, as RecurrentConfig says."""
        for p in self.parameters():
            p.uniform_(-self.config.init_range, self.config.init_range)
        if self.config.cell == "lstm":
            for module in self.layers:
                layer = cast(Layer, module)
                assert layer.input.bias is not None
                layer.input.bias.chunk(4)[1].add_(self.config.forget_bias)

    @staticmethod
    def hf_name(name: str) -> tuple[str, bool]:
        """Return a parameter's name in the files, its own, and that it is not stored transposed there."""
        return name, False

    @staticmethod
    def hf_alias(name: str) -> str | None:
        """Return the usual name of a tensor in a foreign file: there is no other."""
        return name

    @staticmethod
    def hf_tied(config: RecurrentConfig) -> dict[str, str]:
        """Return {name: the tensor it must equal} for what some files store twice: nothing."""
        return {}
