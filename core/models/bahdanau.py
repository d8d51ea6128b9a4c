"""A recurrent encoder-decoder that looks back at its source: the first attention.

Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate", 2015
(arXiv:1409.0473).

- the encoder is a GRU in each direction, and what it knows at a token, from both sides, is kept: h_j = [->h_j, <-h_j]
- before each token that it writes, the decoder weighs them all: e_ij = v_a tanh(W_a s_{i-1} + U_a h_j), softmax over
  j, c_i = sum_j alpha_ij h_j; the weights say which words of the source a word of the target comes from
- s_i = GRU(s_{i-1}, [E y_{i-1}, c_i]), and s_0 = tanh(W_s <-h_1): what the backward network knows after the first token
- a token is predicted from s_{i-1}, y_{i-1} and c_i by one layer of maxout units (Goodfellow et al., 2013) and a matrix

B batch, S source tokens, T target tokens, E width of embeddings, C width of a state, A of the alignment, R of the
maxout layer, V vocabulary.

The reset gate of the GRUs is behind the recurrent product, as in torch.nn and cuDNN; the paper, like Cho et al. (2014),
has it before. transformers has no such models, so it does not open these checkpoints and says that it does not know
their model_type.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from portlm.errors import ConfigError
from portlm.models import config_json
from portlm.models.layers import Embedding, Linear
from portlm.models.recurrent_decoder import CellLayer
from portlm.models.recurrent_encoder_decoder import (
    Memory,
    PairConfig,
    RecurrentEncoderDecoder,
    token_inputs,
)
from portlm.models.roles import Role
from portlm.ops.additive_attention import additive_attention
from portlm.ops.linear import linear
from portlm.roles import StateSpec, TensorSpec

Init = Literal["published", "scaled"]
INITS: dict[str, Init] = {"published": "published", "scaled": "scaled"}
_BOUNDS = {
    "vocab_size": (1, config_json.MAX_VOCAB),
    "context_length": (1, config_json.MAX_CONTEXT),
    "embed_width": (1, config_json.MAX_WIDTH),
    "width": (1, config_json.MAX_WIDTH),
    "alignment": (1, config_json.MAX_WIDTH),
    "maxout": (1, config_json.MAX_WIDTH),
}


@dataclass(frozen=True)
class BahdanauConfig(PairConfig):
    """The shape of an encoder-decoder with additive attention, and how its weights begin.

    ``init`` is "published" (appendix B.1: recurrent matrices orthogonal, W_a and U_a N(0, 0.001^2), v_a and biases 0,
    others N(0, 0.01^2)) or "scaled": recurrent matrices orthogonal, biases 0, embeddings N(0, 0.1^2), others with the
    variance 1 / inputs. The first was chosen for a width of 1000, and learns slowly at a small one.

    Raises:
        ConfigError: A value out of range, or another init.
    """

    family: ClassVar[str] = "bahdanau"
    # What [model] of a training run may set, and what it is for a small model on a CPU.
    SETTINGS: ClassVar[dict[str, Any]] = {
        "width": 128,
        "embed_width": 0,  # 0: as wide as the state
        "alignment": 0,  # likewise
        "maxout": 0,  # 0: half as wide
        "context_length": 64,  # tokens of a source, and of a target
        "init": "scaled",
    }

    vocab_size: int = 30_000  # of sources and targets alike
    context_length: int = 1024  # the longest source and the longest target
    embed_width: int = 620
    width: int = 1000
    alignment: int = 1000
    maxout: int = 500
    init: Init = "published"

    def __post_init__(self) -> None:
        self._check(_BOUNDS)
        if self.init not in INITS:
            raise ConfigError(f"init must be one of {', '.join(INITS)}, got {self.init!r}")

    @classmethod
    def from_settings(cls, **values: Any) -> Self:
        """Return the configuration for values of SETTINGS and of the vocabulary.

        Raises:
            ConfigError: A value out of range, by name.
        """
        width = values["width"]
        for name in ("embed_width", "alignment"):
            values[name] = values[name] or width
        values["maxout"] = values["maxout"] or max(1, width // 2)
        return cls(**values)

    @classmethod
    def tiny(cls) -> Self:
        """Return a configuration that tests compute in no time: a vocabulary of bytes, few and odd widths."""
        return cls(
            vocab_size=259, context_length=40, embed_width=13, width=21, alignment=19, maxout=11, init="scaled",
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
        vocab_size = read.integer("vocab_size", 30_000)
        config = cls(
            vocab_size=vocab_size,
            context_length=read.integer("max_position_embeddings", 1024),
            embed_width=read.integer("embedding_size", 620),
            width=read.integer("d_model", 1000),
            alignment=read.integer("alignment_size", 1000),
            maxout=read.integer("maxout_size", 500),
            init=read.choice("init_scheme", "published", INITS),
            **cls._read_ids(read, vocab_size),
        )
        read.require("tie_word_embeddings", False)
        read.finish(encoder_decoder=True)
        return config

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json."""
        return {
            "architectures": ["Bahdanau"],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.context_length,
            "embedding_size": self.embed_width,
            "d_model": self.width,
            "alignment_size": self.alignment,
            "maxout_size": self.maxout,
            "init_scheme": self.init,
            **self._written_ids(),
        }


PRESETS = {"rnnsearch": BahdanauConfig()}
# The paper prints no count: this is by the equations of its appendix, which leave biases out, with those of torch.nn's
# GRU and of the maxout layer.
PARAMETERS = {"rnnsearch": 80_420_000}


class Encoder(nn.Module):
    """A GRU in each direction, and what attention and the decoder ask of them."""

    def __init__(self, config: BahdanauConfig):
        super().__init__()
        E, C, A = config.embed_width, config.width, config.alignment
        self.embed = Embedding(config.vocab_size, E)
        self.forwards = CellLayer("gru", E, C)
        self.backwards = CellLayer("gru", E, C, reverse=True)
        # U_a, by the half of h_j that it is multiplied with.
        self.forward_keys = Linear(C, A, bias=False)
        self.backward_keys = Linear(C, A, bias=False)
        self.first = Linear(C, C, bias=False)  # W_s


class Decoder(nn.Module):
    """A GRU that reads a target and what attention sees, and the maxout layer above it."""

    def __init__(self, config: BahdanauConfig):
        super().__init__()
        E, C, A = config.embed_width, config.width, config.alignment
        self.embed = Embedding(config.vocab_size, E)
        self.query = Linear(C, A, bias=False)  # W_a
        self.score = nn.Parameter(torch.empty(A))  # v_a
        self.cell = CellLayer("gru", E + 2 * C, C)
        # U_o, V_o and C_o side by side; the two rows that a maxout unit chooses between are R apart.
        self.deep = Linear(C + E + 2 * C, 2 * config.maxout, bias=True)

    def forward(
        self, y: Tensor, mask: Tensor | None, s: Tensor, keys: Tensor, h: Tensor, source_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Read one token.

        Args:
            y: (B, 1, E), E y_{i-1}.
            mask: (B, 1), 0 where it is padding.
            s: (B, C), s_{i-1}.
            keys: (B, S, A), U_a h.
            h: (B, S, 2 C).
            source_mask: (B, S), 0 where h is padding.

        Returns:
            s_i (B, C), what the maxout layer takes (B, 1, 3 C + E), and the weights alpha_i (B, 1, S).
        """
        before = s.unsqueeze(1)
        context, weights = additive_attention(self.query(before), keys, h, self.score, source_mask)
        _, (after,) = self.cell(torch.cat((y, context), dim=-1), (s,), mask)
        return after, torch.cat((before, y, context), dim=-1), weights

    def maxout(self, inputs: Tensor) -> Tensor:
        """Return t_i (B, T, R) for what goes into its layer (B, T, 3 C + E)."""
        one, other = self.deep(inputs).chunk(2, dim=-1)
        return torch.maximum(one, other)


class Bahdanau(RecurrentEncoderDecoder):
    """An encoder-decoder with additive attention and randomly initialised weights.

    Its memory is s (B, C), ->h and <-h (B, S, C), their shares of the keys (B, S, A), and the mask of the source.

    Args:
        config: Its shape.
        init: False leaves the parameters uninitialised, for a caller that fills them all.
    """

    config: BahdanauConfig

    def __init__(self, config: BahdanauConfig, *, init: bool = True):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.lm_head = Linear(config.maxout, config.vocab_size, bias=False)  # W_o
        if init:
            self.init_weights()

    @property
    def head(self) -> Tensor:
        """The output matrix (V, R)."""
        return self.lm_head.weight

    def read(self, source_ids: Tensor, source_mask: Tensor | None) -> Memory:
        """Return the memory of sources (B, S)."""
        nothing = self.encoder.embed.weight.new_zeros(len(source_ids), self.config.width)
        mask = torch.ones_like(source_ids) if source_mask is None else source_mask
        return *self._encoded((source_ids, mask), (source_ids, mask), nothing, nothing)[0], mask

    def _encoded(
        self, forward: tuple[Tensor, Tensor], backward: tuple[Tensor, Tensor], f: Tensor, b: Tensor
    ) -> tuple[Memory, Memory]:
        """Read ids and masks (B, S) in both directions, from the states f and b on.

        Returns:
            s_0, ->h, <-h and their shares of the keys; and the next states.
        """
        encoder = self.encoder
        forwards, (f,) = encoder.forwards(encoder.embed(forward[0]), (f,), forward[1])
        backwards, (b,) = encoder.backwards(encoder.embed(backward[0]), (b,), backward[1])
        s = torch.tanh(encoder.first(b))
        keys = encoder.forward_keys(forwards), encoder.backward_keys(backwards)
        return (s, forwards, backwards, *keys), (f, b)

    def write(self, target_ids: Tensor, mask: Tensor | None, memory: Memory) -> tuple[Tensor, Memory]:
        """Read targets (B, T); return t (B, T, R) and the next memory."""
        t, memory, _ = self._aligned(target_ids, mask, memory)
        return t, memory

    def align(self, source_ids: Tensor, target_ids: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """Return alpha (B, T, S), what is looked at before the token behind each of target_ids is written."""
        return self._aligned(target_ids, None, self.read(source_ids, source_mask))[2]

    def _aligned(
        self, target_ids: Tensor, mask: Tensor | None, memory: Memory
    ) -> tuple[Tensor, Memory, Tensor]:
        """What `write` returns, and alpha (B, T, S)."""
        s, forwards, backwards, forward_keys, backward_keys, source_mask = memory
        keys, h = forward_keys + backward_keys, torch.cat((forwards, backwards), dim=-1)
        inputs, weights = [], []
        words = self.decoder.embed(target_ids)
        masks = [None] * words.shape[1] if mask is None else mask.split(1, dim=1)
        for y, real in zip(words.split(1, dim=1), masks, strict=True):
            s, seen, alpha = self.decoder(y, real, s, keys, h, source_mask)
            inputs.append(seen)
            weights.append(alpha)
        t = self.decoder.maxout(torch.cat(inputs, dim=1))
        return t, (s, *memory[1:]), torch.cat(weights, dim=1)

    def roles(self) -> dict[str, Role]:
        """Return what this model can be exported as: an encoder and a decoder, which read a token of each row per call.

        The encoder reads a source from both ends at once, and portlm.memory puts what it gives together. The decoder
        also says what it looked at, alpha.
        """
        C, A, V = self.config.width, self.config.alignment, self.config.vocab_size
        widths = {"forward_states": C, "backward_states": C, "forward_keys": A, "backward_keys": A}
        state = ("batch", C)

        def encode(
            ids: Tensor, mask: Tensor, backward_ids: Tensor, backward_mask: Tensor, f: Tensor, b: Tensor
        ) -> tuple[Tensor, ...]:
            made, after = self._encoded((ids, mask), (backward_ids, backward_mask), f, b)
            return *made, *after

        def decode(
            ids: Tensor, mask: Tensor, source_mask: Tensor, s: Tensor, *given: Tensor
        ) -> tuple[Tensor, ...]:
            keys, h = given[2] + given[3], torch.cat(given[:2], dim=-1)
            s, seen, alpha = self.decoder(self.decoder.embed(ids), mask, s, keys, h, source_mask)
            return linear(self.decoder.maxout(seen), self.head), alpha, s

        encoder = Role(
            encode,
            token_inputs("", "backward_", below=V),
            (
                TensorSpec("hidden", "float32", state),
                *(TensorSpec(name, "float32", ("batch", 1, width)) for name, width in widths.items()),
            ),
            tuple(
                StateSpec(f"past_{name}", f"present_{name}", "float32", state, "zeros", "replace")
                for name in ("forward", "backward")
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
                StateSpec("hidden", "present_hidden", "float32", state, "given", "replace"),
                *(
                    StateSpec(name, "", "float32", ("batch", "source", width), "given", "constant")
                    for name, width in widths.items()
                ),
            ),
        )
        return {"encoder": encoder, "decoder": decoder}

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw fresh weights from PyTorch's global generator, as BahdanauConfig says."""
        published = self.config.init == "published"
        for name, p in self.named_parameters():
            if name.endswith("recurrent.weight"):
                for gate in p.chunk(3):
                    nn.init.orthogonal_(gate)
            elif name.endswith("bias") or (published and name == "decoder.score"):
                p.zero_()
            elif published:
                p.normal_(0.0, 0.001 if "keys" in name or "query" in name else 0.01)
            else:
                p.normal_(0.0, 0.1 if "embed" in name else 1 / math.sqrt(p.shape[-1]))
