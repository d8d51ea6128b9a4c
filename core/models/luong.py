"""A recurrent encoder-decoder with attention above its layers, whose scores are simpler than additive ones.

Luong, Pham and Manning, "Effective Approaches to Attention-based Neural Machine Translation", 2015 (arXiv:1508.04025):
its global attention.

- encoder and decoder are those of seq2seq.py, layers of LSTMs whose last states start the decoder; what the encoder's
  top layer knew at each token, h_s, is kept
- the decoder moves first and looks then: its top layer's new state h_t is compared with each h_s, by h_t . h_s ("dot"),
  h_t . W_a h_s ("general") or v_a . tanh(W_a [h_t; h_s]) ("concat"); the softmax of the scores weighs the h_s into c_t
- a token is predicted from h~_t = tanh(W_c [c_t; h_t]) by a matrix
- with input feeding h~_t is read beside the next token, so that the decoder knows where it has looked; without, all
  targets are read at once

B batch, S source tokens, T target tokens, C width, which is also that of the states, V vocabulary.

The paper also has "location" scores, which ignore the source, and local attention; neither is here. transformers has no
such models, so it does not open these checkpoints and says that it does not know their model_type.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from portlm.errors import ConfigError
from portlm.models import config_json
from portlm.models.layers import Linear, drop
from portlm.models.recurrent_decoder import STATES
from portlm.models.recurrent_encoder_decoder import Memory, RecurrentEncoderDecoder, token_inputs
from portlm.models.roles import Role
from portlm.models.seq2seq import Seq2SeqConfig, Stack
from portlm.ops.additive_attention import additive_attention
from portlm.ops.cached_attention import MASKED
from portlm.ops.embedding import embedding
from portlm.ops.linear import linear
from portlm.roles import StateSpec, TensorSpec

Score = Literal["dot", "general", "concat"]
SCORES: dict[str, Score] = {"dot": "dot", "general": "general", "concat": "concat"}


@dataclass(frozen=True)
class LuongConfig(Seq2SeqConfig):
    """The shape of such a model: that of one without attention, a score, and whether h~ is fed back.

    Raises:
        ConfigError: A value out of range, or another score.
    """

    family: ClassVar[str] = "luong"
    ARCHITECTURE: ClassVar[str] = "Luong"
    SETTINGS: ClassVar[dict[str, Any]] = {**Seq2SeqConfig.SETTINGS, "score": "general", "input_feeding": True}

    vocab_size: int = 50_000
    dropout: float = 0.2
    init_range: float = 0.1
    score: Score = "general"
    input_feeding: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in SCORES:
            raise ConfigError(f"score must be one of {', '.join(SCORES)}, got {self.score!r}")
        if type(self.input_feeding) is not bool:
            raise ConfigError(f"input_feeding must be true or false, got {self.input_feeding!r}")

    @classmethod
    def _read_more(cls, read: config_json.Reader) -> dict[str, Any]:
        return {
            "score": read.choice("score", "general", SCORES),
            "input_feeding": read.boolean("input_feeding", True),
        }

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json."""
        return {**super().to_hf(), "score": self.score, "input_feeding": self.input_feeding}


PRESETS = {"luong-wmt14": LuongConfig()}
# The paper prints no count: this is by its equations, without biases, with an embedding of 50,000 words for each side.
PARAMETERS = {"luong-wmt14": 221_000_000}


class Attention(nn.Module):
    """How the decoder looks back: the score, and W_c.

    Args:
        config: The score and C.
    """

    score: nn.Parameter  # v_a (C,), of "concat" alone
    flags: Tensor  # (2, 1), not saved: what a mask of 0 or 1 is as a number

    def __init__(self, config: LuongConfig):
        super().__init__()
        C = config.width
        self.keys = None if config.score == "dot" else Linear(C, C, bias=False)  # W_a, or its half for h_s
        self.query = Linear(C, C, bias=False) if config.score == "concat" else None  # the half for h_t
        v = nn.Parameter(torch.empty(C)) if config.score == "concat" else None
        self.register_parameter("score", v)
        self.combine = Linear(2 * C, C, bias=False)  # W_c
        self.register_buffer("flags", torch.tensor([[0.0], [1.0]]), persistent=False)

    def made(self, h: Tensor) -> Memory:
        """Return what is looked at of h_s (B, S, C): them, and unless the score is "dot", their keys (B, S, C)."""
        return (h,) if self.keys is None else (h, self.keys(h))

    def forward(self, h: Tensor, made: Memory, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Look from h_t (B, T, C) at what `made` returned, where the mask (B, S) is 1.

        Returns:
            h~_t (B, T, C), and the weights (B, T, S), which are 0 where the mask is.
        """
        values, keys = made[0], made[-1]
        if self.query is not None:
            context, weights = additive_attention(self.query(h), keys, values, self.score, mask)
        else:
            scores = h @ keys.transpose(1, 2)  # (B, T, S)
            if mask is None:
                weights = torch.softmax(scores, dim=-1)
            else:
                real = self.real(mask).transpose(1, 2)  # (B, 1, S)
                weights = torch.softmax(scores + (1.0 - real) * MASKED, dim=-1) * real
            context = weights @ values
        return torch.tanh(self.combine(torch.cat((context, h), dim=-1))), weights

    def real(self, mask: Tensor) -> Tensor:
        """Return a mask (B, T) as numbers (B, T, 1)."""
        return embedding(mask, self.flags)


class Luong(RecurrentEncoderDecoder):
    """An encoder-decoder with Luong's global attention and randomly initialised weights.

    Its memory is the states of the decoder's layers, h~ (B, C) where it is fed, what attention made of the source, and
    the mask of the source.

    Args:
        config: Its shape.
        init: False leaves the parameters uninitialised, for a caller that fills them all.
    """

    config: LuongConfig

    def __init__(self, config: LuongConfig, *, init: bool = True):
        super().__init__()
        self.config = config
        fed = config.width if config.input_feeding else 0
        self.encoder = Stack(config, config.vocab_size, reverse=config.reverse_source)
        self.decoder = Stack(config, config.target_vocab, reverse=False, beside=fed)
        self.attention = Attention(config)
        self.lm_head = Linear(config.width, config.target_vocab, bias=False)  # W_s
        if init:
            self.init_weights()

    @property
    def head(self) -> Tensor:
        """The output matrix (V, C)."""
        return self.lm_head.weight

    @property
    def _counts(self) -> tuple[int, int]:
        """How many tensors of the memory are states, and how many are fed."""
        return self.config.n_layer * len(STATES[self.config.cell]), int(self.config.input_feeding)

    def read(self, source_ids: Tensor, source_mask: Tensor | None) -> Memory:
        """Return the memory of sources (B, S)."""
        nothing = self.lm_head.weight.new_zeros(len(source_ids), self.config.width)
        states, fed = self._counts
        h, after = self.encoder(source_ids, source_mask, (nothing,) * states)
        mask = torch.ones_like(source_ids) if source_mask is None else source_mask
        return (*after, *(nothing,) * fed, *self.attention.made(h), mask)

    def write(self, target_ids: Tensor, mask: Tensor | None, memory: Memory) -> tuple[Tensor, Memory]:
        """Read targets (B, T); return h~ (B, T, C) and the next memory."""
        y, memory, _ = self._aligned(target_ids, mask, memory)
        return drop(y, self.config.dropout, self.training), memory

    def align(self, source_ids: Tensor, target_ids: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """Return the weights (B, T, S): what is looked at before the token behind each of target_ids is written."""
        return self._aligned(target_ids, None, self.read(source_ids, source_mask))[2]

    def _aligned(
        self, target_ids: Tensor, mask: Tensor | None, memory: Memory
    ) -> tuple[Tensor, Memory, Tensor]:
        """What `write` returns without its dropout, and the weights (B, T, S)."""
        count, fed = self._counts
        states, made, source_mask = memory[:count], memory[count + fed : -1], memory[-1]
        if not fed:
            h, states = self.decoder(target_ids, mask, states)
            y, weights = self.attention(h, made, source_mask)
            return y, (*states, *memory[count:]), weights
        before, seen, looked = memory[count], [], []
        masks = [None] * target_ids.shape[1] if mask is None else mask.split(1, dim=1)
        for token, real in zip(target_ids.split(1, dim=1), masks, strict=True):
            y, before, weights, states = self._fed(token, real, states, before, made, source_mask)
            seen.append(y)
            looked.append(weights)
        return torch.cat(seen, dim=1), (*states, before, *memory[count + 1 :]), torch.cat(looked, dim=1)

    def _fed(
        self,
        token: Tensor,
        mask: Tensor | None,
        states: Memory,
        before: Tensor,
        made: Memory,
        source_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Memory]:
        """Read one token (B, 1) beside the h~ before it (B, C).

        Returns:
            h~ (B, 1, C); what is fed next, the same (B, C) but where the mask (B, 1) is 0; weights; the next states.
        """
        old = before.unsqueeze(1)
        h, states = self.decoder(token, mask, states, old)
        y, weights = self.attention(h, made, source_mask)
        after = y if mask is None else old + self.attention.real(mask) * (y - old)
        return y, after.squeeze(1), weights, states

    def roles(self) -> dict[str, Role]:
        """Return what this model can be exported as: an encoder and a decoder, which read a token of each row per call.

        The decoder also says what it looked at.
        """
        config, (count, fed) = self.config, self._counts
        C, V = config.width, config.target_vocab
        places = [f"{name}.{layer}" for layer in range(config.n_layer) for name in STATES[config.cell]]
        prefix = "backward_" if config.reverse_source else ""
        made = [
            f"{prefix}{name}" for name in ("annotations", "keys")[: 1 + (self.attention.keys is not None)]
        ]

        def encode(ids: Tensor, mask: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
            h, after = self.encoder(ids, mask, states)
            return *after, *self.attention.made(h), *after

        def decode(ids: Tensor, mask: Tensor, source_mask: Tensor, *memory: Tensor) -> tuple[Tensor, ...]:
            states, kept = memory[:count], memory[count + fed :]
            if fed:
                y, after, weights, states = self._fed(ids, mask, states, memory[count], kept, source_mask)
                return linear(y, self.head), weights, *states, after
            h, states = self.decoder(ids, mask, states)
            y, weights = self.attention(h, kept, source_mask)
            return linear(y, self.head), weights, *states

        encoder = Role(
            encode,
            token_inputs(prefix, below=config.vocab_size),
            (
                *(TensorSpec(place, "float32", ("batch", C)) for place in places),
                *(TensorSpec(name, "float32", ("batch", 1, C)) for name in made),
            ),
            tuple(
                StateSpec(f"past_{place}", f"present_{place}", "float32", ("batch", C), "zeros", "replace")
                for place in places
            ),
        )
        decoder = Role(
            decode,
            token_inputs("", below=V),
            (
                TensorSpec("logits", "float32", ("batch", 1, V)),
                TensorSpec("attention", "float32", ("batch", 1, "source")),
            ),
            (
                StateSpec("encoder_attention_mask", "", "int64", ("batch", "source"), "given", "constant"),
                *(
                    StateSpec(place, f"present_{place}", "float32", ("batch", C), "given", "replace")
                    for place in places
                ),
                *(StateSpec("past_fed", "present_fed", "float32", ("batch", C), "zeros", "replace"),) * fed,
                *(
                    StateSpec(name, "", "float32", ("batch", "source", C), "given", "constant")
                    for name in made
                ),
            ),
        )
        return {"encoder": encoder, "decoder": decoder}

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw fresh weights from PyTorch's global generator, uniform in [-init_range, init_range]."""
        for p in self.parameters():
            p.uniform_(-self.config.init_range, self.config.init_range)
