"""What recurrent language models share: their layers, and how they continue a text from states of fixed size.

A family is a configuration, its dropout and how its weights begin.

B batch, T time, C width of what a layer reads, H of its state, G gates, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from portlm.models.layers import Embedding, Linear, check_length, drop
from portlm.models.own_names import OwnNames
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
States = tuple[Tensor, ...]  # of one layer, each (B, H): the output, and for an LSTM that of the cell
CELLS: dict[str, Cell] = {"rnn": "rnn", "rnn_relu": "rnn_relu", "lstm": "lstm", "gru": "gru"}
GATES: dict[str, int] = {"rnn": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
STATES: dict[str, tuple[str, ...]] = {
    cell: ("hidden", "cell") if cell == "lstm" else ("hidden",) for cell in CELLS
}


class CellLayer(nn.Module):
    """One recurrent layer; gates in the order of torch.nn.

    Args:
        cell: What its units are.
        inputs: C, the width of what it reads.
        width: H, of its state and its output.
        bias: Whether its gates have biases.
        twice: Whether both products have one, as torch.nn has it. They are only ever added, save in a GRU, where the
            reset gate is between them.
        reverse: Whether it reads the last token first.
        weight_dropout: Share of the recurrent weights that are 0 for the length of a batch, in training.
    """

    def __init__(
        self,
        cell: Cell,
        inputs: int,
        width: int,
        *,
        bias: bool = True,
        twice: bool = False,
        reverse: bool = False,
        weight_dropout: float = 0.0,
    ):
        super().__init__()
        self.cell, self.reverse, self.weight_dropout = cell, reverse, weight_dropout
        rows = GATES[cell] * width
        self.input = Linear(inputs, rows, bias=bias)
        self.recurrent = Linear(width, rows, bias=bias and (twice or cell == "gru"))

    def forward(self, x: Tensor, states: States, mask: Tensor | None) -> tuple[Tensor, States]:
        """Read x (B, T, C) from the states (B, H) on; return the output (B, T, H) and the next states."""
        if x.shape[1] == 1 and not torch.is_grad_enabled():  # the cells have no gradient
            return self._one(x, states, mask)
        recurrent = drop(self.recurrent.weight, self.weight_dropout, self.training)
        arguments = (
            x, self.input.weight, recurrent, self.input.bias, self.recurrent.bias, *states, mask, self.reverse
        )  # fmt: skip
        y, *after = self._layer()(*arguments)
        return y, tuple(after)

    def _layer(self) -> Any:
        found = {"rnn": rnn, "rnn_relu": partial(rnn, activation="relu"), "lstm": lstm, "gru": gru}
        return found[self.cell]

    def _one(self, x: Tensor, states: States, mask: Tensor | None) -> tuple[Tensor, States]:
        """The same for one token, whose products an engine can do in its own way."""
        old = tuple(state.unsqueeze(1) for state in states)  # (B, 1, H)
        projected, recurrent = self.input(x), self.recurrent(old[0])  # (B, 1, G H)
        if self.cell == "lstm":
            new: States = lstm_cell(projected, recurrent, old[0], old[1], mask)
        elif self.cell == "gru":
            new = (gru_cell(projected, recurrent, old[0], mask),)
        else:
            activation = "relu" if self.cell == "rnn_relu" else "tanh"
            new = (rnn_cell(projected, recurrent, old[0], mask, activation),)
        return new[0], tuple(state.squeeze(1) for state in new)


class Shape(Protocol):
    """What a recurrent language model needs to know of a configuration."""

    @property
    def vocab_size(self) -> int:
        """V."""

    @property
    def context_length(self) -> int:
        """The longest text."""

    @property
    def cell(self) -> Cell:
        """One of CELLS."""

    @property
    def width(self) -> int:
        """C, of the embedding and of the last layer's state."""

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """What each layer reads and what its state holds: two widths."""

    @property
    def tie_embeddings(self) -> bool:
        """Whether the embedding is the output matrix, too."""


class RecurrentDecoder(OwnNames):
    """A recurrent language model: all but its dropout and how its weights begin, which a family says.

    Args:
        config: Its shape.
        layers: Recurrent layers, of the widths in the configuration.
    """

    def __init__(self, config: Shape, layers: Sequence[CellLayer]):
        super().__init__()
        self.config: Any = config
        self.embed = Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(layers)
        self.head = None if config.tie_embeddings else Linear(config.width, config.vocab_size, bias=False)
        self.head_bias = nn.Parameter(torch.empty(config.vocab_size))

    def read(self, ids: Tensor) -> Tensor:
        """Return the embedding (B, T, C) of ids (B, T), as the first layer gets it."""
        return self.embed(ids)

    def between(self, y: Tensor, number: int) -> Tensor:
        """Return what goes up from the layer of a number, (B, T, H)."""
        return y

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
        return biased_cross_entropy(y, self.head_weight, self.head_bias, targets)

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
            past: The states of each layer, each (B, H); None before the first token.
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
                f"past_{name}.{layer}", f"present_{name}.{layer}", "float32", ("batch", units), "zeros", "replace"
            )
            for layer, (_, units) in enumerate(self.config.layers)
            for name in names
        )  # fmt: skip
        outputs = (TensorSpec("logits", "float32", ("batch", 1, self.config.vocab_size)),)
        return {"decoder": Role(function, inputs, outputs, state)}

    def _read(
        self, ids: Tensor, mask: Tensor | None, past: Sequence[States] | None
    ) -> tuple[Tensor, list[States]]:
        """Read ids (B, T); return the last layer's output (B, T, C) and the next states of each layer."""
        x = self.read(ids)
        if past is None:
            count = len(STATES[self.config.cell])
            past = [(x.new_zeros(len(ids), units),) * count for _, units in self.config.layers]
        after = []
        for number, (layer, states) in enumerate(zip(self.layers, past, strict=True)):
            x, new = layer(x, states, mask)
            x = self.between(x, number)
            after.append(new)
        return x, after


def biased_cross_entropy(y: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of an output layer with a bias, which is one more column of its matrix.

    Args:
        y: (B, T, C); the bias's input is 1.
        weight: (V, C).
        bias: (V,).
        targets: (B, T) int64, -100 where there is none.
    """
    y = torch.cat((y, y.new_ones(*y.shape[:-1], 1)), dim=-1)
    return linear_cross_entropy(y.flatten(0, 1), torch.cat((weight, bias[:, None]), dim=1), targets.flatten())


def add_forget_bias(layers: Iterable[nn.Module], amount: float) -> None:
    """Add to the input bias of the forget gates of LSTM layers."""
    for layer in layers:
        assert isinstance(layer, CellLayer)
        assert layer.input.bias is not None
        layer.input.bias.chunk(4)[1].add_(amount)
