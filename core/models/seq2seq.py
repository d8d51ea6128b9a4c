"""Sequence to sequence learning: one recurrent network reads a source, and its last states start another that writes.

Sutskever, Vinyals and Le, "Sequence to Sequence Learning with Neural Networks", 2014 (arXiv:1409.3215).

- several layers on both sides; each layer of the decoder begins in the last state of the same layer of the encoder,
  which is all that the decoder has of the source
- the source is read from its last token to its first, so that what is said first is near to what is written first
- two embeddings and an output matrix of their own; every weight begins uniform in [-r, r]
- targets are learned and written behind a start token; the end of text ends them

B batch, S source tokens, T target tokens, C width, which is also that of the states, V vocabulary.

The paper's networks have no biases, or its count of parameters would not be 384 million. transformers has no such
models, so it does not open these checkpoints and says that it does not know their model_type.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from portlm.errors import ConfigError
from portlm.models import config_json
from portlm.models.layers import Embedding, Linear
from portlm.models.recurrent_decoder import STATES, CellLayer
from portlm.models.recurrent_encoder_decoder import (
    Memory,
    PairConfig,
    RecurrentEncoderDecoder,
    token_inputs,
)
from portlm.models.roles import Role
from portlm.ops.linear import linear
from portlm.roles import StateSpec, TensorSpec

Cell = Literal["lstm", "gru"]
CELLS: dict[str, Cell] = {"lstm": "lstm", "gru": "gru"}
_BOUNDS = {
    "vocab_size": (1, config_json.MAX_VOCAB),
    "target_vocab_size": (0, config_json.MAX_VOCAB),
    "context_length": (1, config_json.MAX_CONTEXT),
    "n_layer": (1, config_json.MAX_LAYERS),
    "width": (1, config_json.MAX_WIDTH),
    "dropout": (0.0, 0.99),
    "init_range": (0.0, 1.0),
}


@dataclass(frozen=True)
class Seq2SeqConfig(PairConfig):
    """The shape of a recurrent encoder-decoder, and how its weights begin.

    Raises:
        ConfigError: A value out of range, or another cell.
    """

    family: ClassVar[str] = "seq2seq"
    ARCHITECTURE: ClassVar[str] = "Seq2Seq"
    # What [model] of a training run may set, and what it is for a small model on a CPU.
    SETTINGS: ClassVar[dict[str, Any]] = {
        "cell": "lstm",
        "n_layer": 2,
        "width": 128,
        "context_length": 64,  # tokens of a source, and of a target
        "dropout": 0.0,
        "reverse_source": True,
        "bias": True,
    }

    vocab_size: int = 160_000  # ids of sources, and of targets where the next field is 0
    target_vocab_size: int = 0  # how many of them targets have
    context_length: int = 1024  # the longest source and the longest target; the states have no limit
    cell: Cell = "lstm"
    n_layer: int = 4
    width: int = 1000
    dropout: float = 0.0  # on what goes up and never on what goes on in time (Zaremba et al., 2014)
    reverse_source: bool = True
    bias: bool = False  # of the gates
    init_range: float = 0.08  # r above

    def __post_init__(self) -> None:
        self._check(_BOUNDS, ("reverse_source", "bias"))
        if self.cell not in CELLS:
            raise ConfigError(f"cell must be one of {', '.join(CELLS)}, got {self.cell!r}")
        if self.target_vocab_size > self.vocab_size:
            raise ConfigError(
                f"target_vocab_size {self.target_vocab_size} is more than vocab_size {self.vocab_size}"
            )
        for token in (self.decoder_start_token_id, *self.eos_token_ids):
            if token >= self.target_vocab:
                raise ConfigError(
                    f"token {token} begins or ends targets, whose ids are below {self.target_vocab}"
                )

    @property
    def target_vocab(self) -> int:
        """V, the number of ids that a target may have."""
        return self.target_vocab_size or self.vocab_size

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
            vocab_size=259, context_length=40, n_layer=2, width=27, dropout=0.0, bias=True, init_range=0.4,
            eos_token_ids=(256,), pad_token_id=258, decoder_start_token_id=258,
        )  # fmt: skip

    @classmethod
    def from_hf(cls, data: Mapping[str, Any] | config_json.Reader) -> Self:
        """Read the contents of a config.json, strictly.

        Raises:
            ConfigError: A key that is missing, unknown, out of range or asks for another model. It is named.
        """
        read = config_json.Reader.of(data)
        read.require("model_type", cls.family)
        vocab_size = read.integer("vocab_size", cls.vocab_size)
        config = cls(
            vocab_size=vocab_size,
            target_vocab_size=read.integer("target_vocab_size", 0),
            context_length=read.integer("max_position_embeddings", 1024),
            cell=read.choice("cell", "lstm", CELLS),
            n_layer=read.integer("num_hidden_layers", 4),
            width=read.integer("d_model", 1000),
            dropout=read.number("dropout", cls.dropout),
            reverse_source=read.boolean("reverse_source", True),
            bias=read.boolean("cell_bias", False),
            init_range=read.number("init_range", cls.init_range),
            **cls._read_more(read),
            **cls._read_ids(read, vocab_size),
        )
        read.require("tie_word_embeddings", False)
        read.finish(encoder_decoder=True)
        return config

    @classmethod
    def _read_more(cls, read: config_json.Reader) -> dict[str, Any]:
        """The fields of a family built on this one, from a config.json."""
        return {}

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json."""
        return {
            "architectures": [self.ARCHITECTURE],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "target_vocab_size": self.target_vocab_size,
            "max_position_embeddings": self.context_length,
            "cell": self.cell,
            "num_hidden_layers": self.n_layer,
            "d_model": self.width,
            "dropout": self.dropout,
            "reverse_source": self.reverse_source,
            "cell_bias": self.bias,
            "init_range": self.init_range,
            **self._written_ids(),
        }


PRESETS = {"seq2seq-wmt14": Seq2SeqConfig(target_vocab_size=80_000)}
PARAMETERS = {"seq2seq-wmt14": 384_000_000}  # the paper: 384 million, of which 64 million are in the layers


class Stack(nn.Module):
    """An embedding and the layers above it, of one side.

    Args:
        config: Its shape.
        vocabulary: Ids that it may read.
        reverse: Whether it reads the last token first.
        beside: Width of what its first layer reads beside each token.
    """

    def __init__(self, config: Seq2SeqConfig, vocabulary: int, *, reverse: bool, beside: int = 0):
        super().__init__()
        C, self.dropout = config.width, config.dropout
        self.embed = Embedding(vocabulary, C)
        self.layers = nn.ModuleList(
            [
                CellLayer(config.cell, C if i else C + beside, C, bias=config.bias, reverse=reverse)
                for i in range(config.n_layer)
            ]
        )

    def forward(
        self, ids: Tensor, mask: Tensor | None, states: Memory, beside: Tensor | None = None
    ) -> tuple[Tensor, Memory]:
        """Read ids (B, T), and what is beside them (B, T, ...), from the states (B, C) of all layers on.

        Returns:
            The output (B, T, C) and the next states.
        """
        x, each = self.embed(ids), len(states) // len(self.layers)
        if beside is not None:
            x = torch.cat((x, beside), dim=-1)
        after: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            x = F.dropout(x, self.dropout, self.training)
            x, new = layer(x, states[each * i : each * (i + 1)], mask)
            after += new
        return F.dropout(x, self.dropout, self.training), tuple(after)


class Seq2Seq(RecurrentEncoderDecoder):
    """A recurrent encoder-decoder with randomly initialised weights. Its memory is the states of the encoder's layers.

    Args:
        config: Its shape.
        init: False leaves the parameters uninitialised, for a caller that fills them all.
    """

    config: Seq2SeqConfig

    def __init__(self, config: Seq2SeqConfig, *, init: bool = True):
        super().__init__()
        self.config = config
        self.encoder = Stack(config, config.vocab_size, reverse=config.reverse_source)
        self.decoder = Stack(config, config.target_vocab, reverse=False)
        self.lm_head = Linear(config.width, config.target_vocab, bias=False)
        if init:
            self.init_weights()

    @property
    def head(self) -> Tensor:
        """The output matrix (V, C)."""
        return self.lm_head.weight

    def read(self, source_ids: Tensor, source_mask: Tensor | None) -> Memory:
        """Return the states of the encoder's layers behind sources (B, S), each (B, C)."""
        nothing = self.encoder.embed.weight.new_zeros(len(source_ids), self.config.width)
        count = self.config.n_layer * len(STATES[self.config.cell])
        _, states = self.encoder(source_ids, source_mask, (nothing,) * count)
        return cast(Memory, states)

    def write(self, target_ids: Tensor, mask: Tensor | None, memory: Memory) -> tuple[Tensor, Memory]:
        """Read targets (B, T); return (B, T, C) and the next states."""
        return cast(tuple[Tensor, Memory], self.decoder(target_ids, mask, memory))

    def roles(self) -> dict[str, Role]:
        """Return what this model can be exported as: an encoder and a decoder, which read a token of each row per call.

        What the encoder gives as "hidden.0" is what the decoder's first layer begins in (portlm.memory).
        """
        config = self.config
        places = [(name, layer) for layer in range(config.n_layer) for name in STATES[config.cell]]
        shape = ("batch", config.width)

        def encode(ids: Tensor, mask: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
            _, after = self.encoder(ids, mask, states)
            return *after, *after

        def decode(ids: Tensor, mask: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
            y, after = self.decoder(ids, mask, states)
            return linear(y, self.head), *after

        known = tuple(TensorSpec(f"{name}.{layer}", "float32", shape) for name, layer in places)
        own = tuple(
            StateSpec(f"past_{name}.{layer}", f"present_{name}.{layer}", "float32", shape, "zeros", "replace")
            for name, layer in places
        )
        given = tuple(
            StateSpec(f"{name}.{layer}", f"present_{name}.{layer}", "float32", shape, "given", "replace")
            for name, layer in places
        )
        logits = (TensorSpec("logits", "float32", ("batch", 1, config.target_vocab)),)
        source = token_inputs("backward_" if config.reverse_source else "", below=config.vocab_size)
        return {
            "encoder": Role(encode, source, known, own),
            "decoder": Role(decode, token_inputs("", below=config.target_vocab), logits, given),
        }

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw fresh weights from PyTorch's global generator, as Seq2SeqConfig says."""
        for p in self.parameters():
            p.uniform_(-self.config.init_range, self.config.init_range)
