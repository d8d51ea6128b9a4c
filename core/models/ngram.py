"""n-gram: the next word by how often it followed the last n - 1 words, and shorter histories where it never did.

Jelinek and Mercer 1980; Katz 1987; Kneser and Ney 1995; Chen and Goodman, "An Empirical Study of Smoothing Techniques
for Language Modeling", 1998. How the numbers are counted is in portlm.train.kneser_ney: here they are only read.

- log p(w | h) stands in a table if h w was seen; if not, it is log γ(h) + log p(w | h'), where h' is h without its
  first word, and γ(h) the weight of shorter histories behind h
- the tables are a tree: an entry is a run of words that was seen, its children are the same run with one word more
- what is remembered of a text are the entries of its last 1, 2, ..., n - 1 words, so reading a word is one step down
  from each of them: the model is a finite automaton, and its state has a fixed size

The tree is a double array (Aoe, "An Efficient Digital Search Algorithm by Using a Double-Array Structure", 1989): each
entry is a place in the tables, the child of p with the last word w can only be at place base[p] + w, and it is there if
parents[base[p] + w] is p. So a child is found by one addition and one comparison, and all V children of an entry lie
between base[p] and base[p] + V, with those of others in the gaps. Place 0 is nothing, the state of a history that was
never seen, and place w + 1 is the word w alone.

Whatever is computed with places is float32, which is exact up to 2^24 of them: that is what graphs can compute with on
every engine (compile/forms.py). No place is outside the tables: a file is refused in which base[p] + V could be.

B batch, T time, K = n - 1 words of history (1 of n = 1, whose words have no children), V vocabulary, N places, M those
that can have children.

transformers has no such model. There are no published sizes, so there are no presets.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from portlm.errors import ConfigError
from portlm.models.keyed_config import Key, KeyedConfig
from portlm.models.layers import check_length
from portlm.models.own_names import OwnNames
from portlm.models.roles import Role
from portlm.ops.embedding import embedding
from portlm.roles import StateSpec, TensorSpec

MAX_ORDER = 16
MAX_PLACES = 2**24  # float32 tells so many apart


@dataclass(frozen=True)
class NGramConfig(KeyedConfig):
    """The shape of the tables.

    Raises:
        ConfigError: A value out of range, or tables that do not hold the vocabulary.
    """

    family: ClassVar[str] = "ngram"
    ARCHITECTURE: ClassVar[str] = "NGram"
    KEYS: ClassVar[Mapping[str, Key]] = {
        "vocab_size": Key("vocab_size"),
        "context_length": Key("max_position_embeddings"),
        "order": Key("order", (1, MAX_ORDER)),
        "histories": Key("histories", (0, MAX_PLACES), says="vocab_size + 1"),
        "places": Key("places", (0, MAX_PLACES), says="histories + vocab_size"),
    }
    FIXED: ClassVar[Mapping[str, Any]] = {"tie_word_embeddings": False}
    SETTINGS: ClassVar[dict[str, Any]] = {
        "order": 5,
        "context_length": 32768,
    }

    vocab_size: int = 259
    context_length: int = 32768  # the longest text; the model looks back at order - 1 words of it
    order: int = 5  # n
    histories: int = 0  # M; 0 stands for 1 + V: no run of words was seen
    places: int = 0  # N; 0 stands for M + V

    def __post_init__(self) -> None:
        super().__post_init__()
        least = 1 + self.vocab_size
        object.__setattr__(self, "histories", self.histories or least)
        object.__setattr__(self, "places", self.places or self.histories + self.vocab_size)
        if not least <= self.histories <= self.places - self.vocab_size:
            raise ConfigError(
                f"histories must be from {least} to places - {self.vocab_size}, got {self.histories} of "
                f"{self.places} places"
            )

    @property
    def words(self) -> int:
        """K, how many words are looked back at, and at least 1."""
        return max(1, self.order - 1)

    @classmethod
    def tiny(cls) -> Self:
        """Return a configuration that tests compute in no time: a vocabulary of bytes, few and odd numbers."""
        return cls(
            vocab_size=259, context_length=32, order=4, histories=1201, places=1703, eos_token_ids=(256,)
        )


PRESETS: dict[str, NGramConfig] = {}
PARAMETERS: dict[str, int] = {}


class NGram(OwnNames):
    """An n-gram model in which every word is equally probable.

    Args:
        config: Its shape.
        init: False leaves the tables uninitialised, for a caller that fills them all.
    """

    base: Tensor  # (M,) int32, where the child for word 0 would be
    parents: Tensor  # (N,) int32, whose child is here; -1 for none, and for single words
    words: Tensor  # (V, 1), not saved: 0, 1, ...
    flags: Tensor  # (2, 2), not saved: what a token counts and what the state before it does, by its mask

    def __init__(self, config: NGramConfig, *, init: bool = True):
        super().__init__()
        self.config = config
        N, M = config.places, config.histories
        self.log_probs = nn.Parameter(torch.empty(N))  # log p of the entry's last word behind those before it
        self.back_offs = nn.Parameter(torch.empty(M))  # log γ of the entry as a history
        self.register_buffer("base", torch.empty(M, dtype=torch.int32))
        self.register_buffer("parents", torch.empty(N, dtype=torch.int32))
        self.register_buffer("words", torch.arange(float(config.vocab_size))[:, None], persistent=False)
        self.register_buffer("flags", torch.tensor([[0.0, 1.0], [1.0, 0.0]]), persistent=False)
        if init:
            self.init_weights()

    def forward(self, input_ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return log-probabilities (B, T, V), or the mean cross-entropy when targets are given. Each row begins a text.

        Args:
            input_ids: (B, T) int64.
            targets: (B, T) int64, the token that follows each input; -100 where there is none to predict.

        Raises:
            ContextLengthError: T is larger than the context.
        """
        check_length(input_ids.shape[1], self.config.context_length)
        history = self.words.new_zeros(len(input_ids), 1, self.config.words)
        logits = self._logits(self._read(input_ids, torch.ones_like(input_ids), history))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

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
            past: (B, 1, K), the entries of the last words; None before the first token.
            logits_to_keep: (kept,) int64, which of the T new tokens to give logits for; None for all.

        Returns:
            Log-probabilities (B, kept, V), and the entries of the last words.

        Raises:
            ContextLengthError: P + T is larger than the context.
        """
        check_length(attention_mask.shape[1], self.config.context_length)
        if past is None:
            past = self.words.new_zeros(len(input_ids), 1, self.config.words)
        histories = self._read(input_ids, attention_mask[:, -input_ids.shape[1] :], past)
        past = histories[:, -1:]
        if logits_to_keep is not None:
            histories = histories.index_select(1, logits_to_keep)
        return self._logits(histories), past

    def roles(self) -> dict[str, Role]:
        """Return what this model can be exported as: a decoder that reads one token of each row per call."""
        config = self.config

        def function(input_ids: Tensor, attention_mask: Tensor, past: Tensor) -> tuple[Tensor, ...]:
            history = self._next(input_ids, attention_mask, past)
            return self._logits(history), history

        inputs = (
            TensorSpec("input_ids", "int64", ("batch", 1)),
            TensorSpec("attention_mask", "int64", ("batch", 1)),
        )
        state = (
            StateSpec(
                "past_words", "present_words", "float32", ("batch", 1, config.words), "zeros", "replace"
            ),
        )
        outputs = (TensorSpec("logits", "float32", ("batch", 1, config.vocab_size)),)
        return {"decoder": Role(function, inputs, outputs, state)}

    def _read(self, ids: Tensor, mask: Tensor, past: Tensor) -> Tensor:
        """The histories (B, T, K) behind each of T words, ids (B, T), of which those with mask 0 come first.

        The entries of k words behind a word need those of k - 1 words behind the one before, so all T are found at
        once, one length after the other.
        """
        words = embedding(ids, self.words).squeeze(-1)
        counts, stays = embedding(mask, self.flags).unbind(-1)  # each (B, T)
        found: list[Tensor] = []
        for k in range(self.config.words):
            if k == 0:
                entries = words + 1
            else:
                before = torch.cat((past[:, :, k - 1], found[-1][:, :-1]), dim=1)
                places, there = self._children(before, words)
                entries = places * there
            found.append(entries * counts + past[:, :, k] * stays)
        return torch.stack(found, dim=-1)

    def _next(self, ids: Tensor, mask: Tensor, past: Tensor) -> Tensor:
        """The history (B, 1, K) behind one more word, ids (B, 1): what _read gives, of all lengths at once."""
        words = embedding(ids, self.words)  # (B, 1, 1)
        history = words + 1
        if self.config.words > 1:
            shorter, _ = past.split([self.config.words - 1, 1], dim=-1)
            places, there = self._children(shorter, words)
            history = torch.cat((history, places * there), dim=-1)
        counts, stays = embedding(mask, self.flags).split(1, dim=-1)  # each (B, 1, 1)
        return history * counts + past * stays

    def _logits(self, histories: Tensor) -> Tensor:
        """Log-probabilities (B, T, V) behind histories (B, T, K): of single words, then behind 1, 2, ... words."""
        logits, words = self.log_probs[1 : 1 + self.config.vocab_size], self.words.squeeze(-1)
        weights = _rows(self.back_offs, histories) * (
            1 - torch.relu(1 - histories)
        )  # 0 where nothing was seen
        for history, weight in zip(
            histories.split(1, dim=-1), weights.split(1, dim=-1), strict=True
        ):  # (B, T, 1)
            places, there = self._children(history, words)
            logits = _rows(self.log_probs, places) * there + (logits + weight) * (1 - there)
        return logits

    def _children(self, entries: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Where the children of entries with these last words would be, and 1 for each that is there, 0 for others.

        The shapes are broadcast. Whole numbers x and y are equal where relu(1 - |x - y|) is 1.
        """
        places = _rows(self.base, entries).to(words.dtype) + words
        parents = _rows(self.parents, places).to(words.dtype)
        return places, torch.relu(1 - (parents - entries).abs())

    @torch.no_grad()
    def init_weights(self) -> None:
        """Make every word equally probable, behind histories none of which was seen."""
        self.log_probs.fill_(-math.log(self.config.vocab_size))
        self.back_offs.zero_()
        self.base.zero_()
        self.parents.fill_(-1)

    def problem(self) -> str:
        """Say why the tables are no tree of n-grams, or "". Whoever reads a model from a file asks."""
        V, N, M = self.config.vocab_size, self.config.places, self.config.histories
        base, parents = (table.cpu().numpy() for table in (self.base, self.parents))
        if base.min() < 0 or base.max() > N - V:
            return f"base leads outside of the {N} places, with {V} words from {base.min()} to {base.max()}"
        if parents.min() < -1 or parents.max() >= M:
            return f"parents holds {parents.min()} to {parents.max()}, and histories are at places below {M}"
        if (parents[: 1 + V] != -1).any() or (parents == 0).any():
            return "parents says that single words, or what is at place 0, belong to a history"
        places = np.flatnonzero(parents >= 0)
        words = places - base[parents[places]]
        if len(places) and not 0 <= words.min() <= words.max() < V:
            return "parents names histories whose children are elsewhere, by base"
        return ""


def _rows(table: Tensor, places: Tensor) -> Tensor:
    """What a table (n,) holds at places of any shape, whole numbers in a float."""
    return table.index_select(0, places.to(torch.int32).flatten()).view(places.shape)
