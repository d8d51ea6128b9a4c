"""NPLM: the neural probabilistic language model, which gave every word a vector.

Bengio et al., "A Neural Probabilistic Language Model", Journal of Machine Learning Research 3, 2003.

- the n - 1 words before the next one are looked up in one table of word vectors, which is learned with the rest
- y = b + W x + U tanh(d + H x), where x is those vectors side by side, the latest first
- W, the direct connections from the vectors to the output, may be left out
- an order n like an n-gram's: no word further back has any influence

A text begins with words that are not there, whose vectors are zero; the paper begins behind the first n - 1 words.

B batch, T time, M width of a word vector, K = n - 1 words of context, H hidden units, V vocabulary.

transformers has no such model, so it does not open these checkpoints and says that it does not know their model_type.
The presets are networks of the paper's two tables, without the mixture with a trigram model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from portlm.models.keyed_config import Key, KeyedConfig
from portlm.models.layers import Embedding, Linear, check_length
from portlm.models.own_names import OwnNames
from portlm.models.roles import Role
from portlm.ops.embedding import embedding
from portlm.ops.linear import linear
from portlm.ops.linear_cross_entropy import linear_cross_entropy
from portlm.roles import StateSpec, TensorSpec

_MAX_ORDER = 256


@dataclass(frozen=True)
class NPLMConfig(KeyedConfig):
    """The shape of the model, and how its weights begin.

    Word vectors begin as N(0, s²), matrices as N(0, 1/n_in) and biases as 0; the paper does not say.

    Raises:
        ConfigError: A value out of range.
    """

    family: ClassVar[str] = "nplm"
    ARCHITECTURE: ClassVar[str] = "NPLM"
    KEYS: ClassVar[Mapping[str, Key]] = {
        "vocab_size": Key("vocab_size"),
        "context_length": Key("max_position_embeddings"),
        "order": Key("order", (2, _MAX_ORDER)),
        "width": Key("embedding_size"),
        "hidden": Key("hidden_size"),
        "direct": Key("direct_connections"),
        "init_std": Key("initializer_range"),
    }
    FIXED: ClassVar[Mapping[str, Any]] = {"tie_word_embeddings": False}
    # What [model] of a training run may set, and what it is for a small model on a CPU.
    SETTINGS: ClassVar[dict[str, Any]] = {
        "order": 6,
        "width": 64,
        "hidden": 128,
        "direct": False,
        "context_length": 64,  # tokens of a row of a batch
    }

    vocab_size: int = 16383
    context_length: int = 1024  # the longest text; the model looks back at order - 1 words of it
    order: int = 5  # n
    width: int = 30  # M
    hidden: int = 100  # H
    direct: bool = False  # whether W is there
    init_std: float = 0.1  # s above

    @property
    def words(self) -> int:
        """K, how many words are looked at."""
        return self.order - 1

    @classmethod
    def tiny(cls) -> Self:
        """Return a configuration that tests compute in no time: a vocabulary of bytes, few and odd widths."""
        return cls(
            vocab_size=259, context_length=32, order=4, width=13, hidden=22, direct=True, eos_token_ids=(256,)
        )


PRESETS = {
    "nplm-brown": NPLMConfig(),
    "nplm-brown-direct": NPLMConfig(width=60, hidden=50, direct=True),
    "nplm-ap": NPLMConfig(vocab_size=17964, order=6, width=100, hidden=60, direct=True),
}
PARAMETERS = {  # by the paper's formula, V (1 + n M + H) + H (1 + (n - 1) M), without V (n - 1) M where W is not there
    "nplm-brown": 2_158_273,
    "nplm-brown-direct": 5_762_483,
    "nplm-ap": 11_904_264,
}


class NPLM(OwnNames):
    """A neural probabilistic language model with randomly initialised weights.

    Args:
        config: Its shape.
        init: False leaves the parameters uninitialised, for a caller that fills them all.
    """

    flags: Tensor  # (2, 2), not saved: what a token counts and what the state before it does, by its mask

    def __init__(self, config: NPLMConfig, *, init: bool = True):
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.width)  # C in the paper
        self.hidden = Linear(config.words * config.width, config.hidden, bias=True)  # H and d
        self.output = Linear(config.hidden, config.vocab_size, bias=True)  # U and b
        self.direct = (
            Linear(config.words * config.width, config.vocab_size, bias=False) if config.direct else None
        )
        self.register_buffer("flags", torch.tensor([[0.0, 1.0], [1.0, 0.0]]), persistent=False)
        if init:
            self.init_weights()

    def forward(self, input_ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return logits (B, T, V), or the mean cross-entropy when targets are given. Each row begins a text.

        Args:
            input_ids: (B, T) int64.
            targets: (B, T) int64, the token that follows each input; -100 where there is none to predict.

        Raises:
            ContextLengthError: T is larger than the context.
        """
        T, K = input_ids.shape[1], self.config.words
        check_length(T, self.config.context_length)
        vectors = F.pad(self.embed(input_ids), (0, 0, K - 1, 0))  # (B, K - 1 + T, M)
        words = torch.cat([vectors[:, K - 1 - back :][:, :T] for back in range(K)], dim=-1)  # (B, T, K M)
        if targets is None:
            return self._logits(words)
        # One product for everything that reaches the output: the bias is a column whose input is 1.
        inputs = [torch.tanh(self.hidden(words)), words.new_ones(*words.shape[:-1], 1)]
        assert self.output.bias is not None
        columns = [self.output.weight, self.output.bias[:, None]]
        if self.direct is not None:
            inputs.append(words)
            columns.append(self.direct.weight)
        return linear_cross_entropy(
            torch.cat(inputs, dim=-1).flatten(0, 1), torch.cat(columns, dim=1), targets.flatten()
        )

    @torch.no_grad()
    def step(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        past: Tensor | None = None,
        logits_to_keep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Continue sequences from their last words.

        Args:
            input_ids: (B, T) int64, the new tokens.
            position_ids: Not asked: only which words are near counts.
            attention_mask: (B, P + T) int64, 0 on the padding left of a shorter row; only the last T are asked.
            past: (B, 1, K M), the vectors of the last words, the latest first; None before the first token.
            logits_to_keep: (kept,) int64, which of the T new tokens to give logits for; None for all.

        Returns:
            Logits (B, kept, V), and the vectors of the last words.

        Raises:
            ContextLengthError: P + T is larger than the context.
        """
        check_length(attention_mask.shape[1], self.config.context_length)
        B, T = input_ids.shape
        if past is None:
            past = self.embed.weight.new_zeros(B, 1, self.config.words * self.config.width)
        mask, seen = attention_mask[:, -T:], []
        for t in range(T):
            past = self._next(input_ids[:, t : t + 1], mask[:, t : t + 1], past)
            seen.append(past)
        words = torch.cat(seen, dim=1)
        if logits_to_keep is not None:
            words = words.index_select(1, logits_to_keep)
        return self._logits(words), past

    def roles(self) -> dict[str, Role]:
        """Return what this model can be exported as: a decoder that reads one token of each row per call."""
        config = self.config

        def function(input_ids: Tensor, attention_mask: Tensor, past: Tensor) -> tuple[Tensor, ...]:
            words = self._next(input_ids, attention_mask, past)
            return self._logits(words), words

        inputs = (
            TensorSpec("input_ids", "int64", ("batch", 1)),
            TensorSpec("attention_mask", "int64", ("batch", 1)),
        )
        shape = ("batch", 1, config.words * config.width)
        state = (StateSpec("past_words", "present_words", "float32", shape, "zeros", "replace"),)
        outputs = (TensorSpec("logits", "float32", ("batch", 1, config.vocab_size)),)
        return {"decoder": Role(function, inputs, outputs, state)}

    def _next(self, ids: Tensor, mask: Tensor, past: Tensor) -> Tensor:
        """The vectors (B, 1, K M) of the last words after one more, ids (B, 1), whose mask (B, 1) may hide it."""
        words, M = self.embed(ids), self.config.width
        if self.config.words > 1:
            kept, _ = past.split([(self.config.words - 1) * M, M], dim=-1)
            words = torch.cat((words, kept), dim=-1)
        counts, stays = embedding(mask, self.flags).split(1, dim=-1)  # each (B, 1, 1)
        return words * counts + past * stays

    def _logits(self, words: Tensor) -> Tensor:
        """Logits (..., V) behind the vectors (..., K M) of the last words."""
        y = self.output(torch.tanh(self.hidden(words)))
        return y if self.direct is None else y + linear(words, self.direct.weight)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw fresh weights from PyTorch's global generator, as NPLMConfig says."""
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.zero_()
            else:
                p.normal_(0.0, self.config.init_std if name == "embed.weight" else 1 / math.sqrt(p.shape[1]))
