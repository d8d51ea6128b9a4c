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

import torch
from torch import Tensor, nn

from portlm.models.bahdanau_config import BahdanauConfig
from portlm.models.layers import Embedding, Linear, drop
from portlm.models.recurrent_decoder import CellLayer
from portlm.models.recurrent_encoder_decoder import Memory, RecurrentEncoderDecoder, token_inputs
from portlm.models.roles import Role
from portlm.ops.additive_attention import additive_attention
from portlm.ops.linear import linear
from portlm.roles import StateSpec, TensorSpec

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
        forwards, (f,) = encoder.forwards(self._words(encoder.embed, forward[0]), (f,), forward[1])
        backwards, (b,) = encoder.backwards(self._words(encoder.embed, backward[0]), (b,), backward[1])
        s = torch.tanh(encoder.first(b))
        keys = encoder.forward_keys(forwards), encoder.backward_keys(backwards)
        return (s, forwards, backwards, *keys), (f, b)

    def _words(self, embed: Embedding, ids: Tensor) -> Tensor:
        """Return embeddings (B, T, E) of ids (B, T)."""
        return drop(embed(ids), self.config.dropout, self.training)

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
        words = self._words(self.decoder.embed, target_ids)
        masks = [None] * words.shape[1] if mask is None else mask.split(1, dim=1)
        for y, real in zip(words.split(1, dim=1), masks, strict=True):
            s, seen, alpha = self.decoder(y, real, s, keys, h, source_mask)
            inputs.append(seen)
            weights.append(alpha)
        t = self.decoder.maxout(torch.cat(inputs, dim=1))
        t = drop(t, self.config.dropout, self.training)
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
