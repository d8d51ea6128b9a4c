"""What all encoders share: every position sees every other, and heads read what became of the positions.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", 2018 (arXiv:1810.04805). A family is a
configuration, its heads and the names of its parts in Hugging Face's files; the layers, the loss, the roles and the
names are here, once. Against the encoder of "Attention Is All You Need" (Vaswani et al., 2017):

- learned positions, and a learned vector for which of two texts a token belongs to
- LayerNorm of the embeddings, GELU instead of ReLU
- heads in place of a decoder

B batch, T time, C width, H heads, D = C / H head width, V vocabulary, N answers of a head.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from portlm.errors import UsageError
from portlm.models.encoder_config import EncoderConfig
from portlm.models.layers import Embedding, LayerNorm, Linear, check_length, drop
from portlm.models.roles import Role
from portlm.ops.embedding import embedding
from portlm.ops.gelu_mlp import gelu_mlp
from portlm.ops.linear import linear
from portlm.ops.masked_attention import masked_attention
from portlm.roles import TensorSpec

TOKENS, POOLED = "last_hidden_state", "pooler_output"  # what heads read, as transformers calls it
IGNORED = -100  # as a target


class Layer(nn.Module):
    """Attention over all positions that are no padding, then a two-layer MLP; LayerNorm behind each addition."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        C, eps = config.width, config.layer_norm_eps
        self.n_head, self.head_dim, self.dropout, self.gelu = (
            config.n_head, config.head_dim, config.dropout, config.gelu,
        )  # fmt: skip
        self.query, self.key, self.value, self.out = (Linear(C, C, bias=True) for _ in range(4))
        self.attention_norm = LayerNorm(C, eps)
        self.up, self.down = Linear(C, config.hidden, bias=True), Linear(config.hidden, C, bias=True)
        self.norm = LayerNorm(C, eps)

    def forward(self, x: Tensor, mask: Tensor | None, bias: Tensor | None = None) -> Tensor:
        """Map (B, T, C) to the same; mask (B, T) is 0 on padding, bias (B or 1, 1, T, T) is added to the scores."""
        B, T, _ = x.shape
        q, k, v = (
            part(x).view(B, T, self.n_head, self.head_dim) for part in (self.query, self.key, self.value)
        )
        return self.added(x, masked_attention(q, k, v, mask, bias))

    def added(self, x: Tensor, seen: Tensor) -> Tensor:
        """Return what the layer makes of x (B, T, C) and of what its queries have seen, (B, T, H, D)."""
        return self.through(self.with_seen(x, seen))

    def with_seen(self, x: Tensor, seen: Tensor) -> Tensor:
        """Add to x (B, T, C) what its queries have seen, (B, T, H, D)."""
        return self.attention_norm(self._drop(self.out(seen.reshape(x.shape))), x)[0]

    def through(self, x: Tensor) -> Tensor:
        """Add to x (B, T, C) what the MLP makes of it."""
        y = gelu_mlp(x, self.up.weight, self.up.bias, self.down.weight, self.down.bias, approximate=self.gelu)
        return self.norm(self._drop(y), x)[0]

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout > 0 else x


class Head(Linear):
    """N numbers for each token, or for the pooled first token.

    Attributes:
        reads: TOKENS or POOLED.
        count: N.
        per_token: whether each token has an answer of its own.
    """

    def __init__(self, config: EncoderConfig, count: int, reads: str = TOKENS):
        super().__init__(config.width, count, bias=True)
        self.reads, self.count, self.per_token = reads, count, reads == TOKENS


class MaskedHead(nn.Module):
    """What a hidden token was: linear, GELU, LayerNorm, then the token table with a bias of its own."""

    reads, per_token = TOKENS, True

    def __init__(self, config: EncoderConfig, gelu: str):
        super().__init__()
        self.count, self.gelu = config.vocab_size, gelu
        self.dense = Linear(config.width, config.width, bias=True)
        self.norm = LayerNorm(config.width, config.layer_norm_eps)
        self.bias = nn.Parameter(torch.empty(config.vocab_size))

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """Return logits (..., V) for (..., C) and the token table (V, C)."""
        return linear(self.before(x), table, self.bias)

    def before(self, x: Tensor) -> Tensor:
        """Return what the table is multiplied by, (..., C), for (..., C)."""
        return self.norm(F.gelu(self.dense(x), approximate=self.gelu), None)[0]


class FirstTokenHead(nn.Module):
    """N numbers for the first token: two linear maps with a nonlinearity between them, without a pooler before."""

    reads, per_token = TOKENS, False

    def __init__(self, config: EncoderConfig, count: int, between: Callable[[Tensor], Tensor]):
        super().__init__()
        self.count, self.between = count, between
        self.dense = Linear(config.width, config.width, bias=True)
        self.out = Linear(config.width, count, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, N)."""
        return self.out(self.between(self.dense(x.select(1, 0))))


class Encoder(nn.Module):
    """An encoder with its heads and randomly initialised weights.

    Args:
        config: Its shape.
        heads: By name, in the order of the configuration.
        pooled: Whether there is a linear map with tanh over the first token.
        init: False leaves the parameters uninitialised, for a caller that fills them all.

    Attributes:
        NAMES: What a parameter's name begins with, here and in Hugging Face's files.
        LAYER_NAMES: The same of the parts of a layer; "layers" of NAMES is what stands before their number.
        PREFIX: What names begin with in the files of models with a head, and not in those without.
        LAYER: What its layers are.
        TIED: What some files store twice -> the tensor that it must equal.
        SPARE: Matches names of tensors that belong to heads, or to the pooler.
    """

    NAMES: ClassVar[Mapping[str, str]]
    LAYER_NAMES: ClassVar[Mapping[str, str]]
    PREFIX: ClassVar[str]
    TIED: ClassVar[Mapping[str, str]]
    SPARE: ClassVar[re.Pattern[str]]
    LAYER: ClassVar[type[Layer]] = Layer

    def __init__(self, config: EncoderConfig, heads: Mapping[str, nn.Module], *, pooled: bool, init: bool):
        super().__init__()
        self.config, C = config, config.width
        self.tokens = Embedding(config.vocab_size, C)
        self.positions = Embedding(config.longest + config.first_position, C)
        self.segments = Embedding(config.segments, C) if config.segments else None
        self.norm = LayerNorm(C, config.layer_norm_eps)
        self.layers = nn.ModuleList([self.LAYER(config) for _ in range(config.n_layer)])
        self.pooler = Linear(C, C, bias=True) if pooled else None
        self.heads = nn.ModuleDict(heads)
        if init:
            self.init_weights()

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Return what the head for hidden tokens says: logits (B, T, V), or the mean cross-entropy of targets.

        Args:
            input_ids: (B, T) int64, with mask tokens where something is hidden.
            targets: (B, T) int64, what is hidden; -100 where nothing is. Only those positions go through the head.
            attention_mask: (B, T) int64, 0 on padding; None if there is none.
            token_type_ids: As of :meth:`encode`, like the next two.
            position_ids: See there.
            bias: See there.

        Raises:
            ContextLengthError: T is larger than the context.
            UsageError: the model has no such head.
        """
        hidden, _ = self.encode(input_ids, attention_mask, token_type_ids, position_ids, bias)
        if targets is None:
            return self.apply_head("masked_lm", hidden)
        wanted = targets.flatten()
        places = (wanted != IGNORED).nonzero().squeeze(1)
        logits = self.apply_head("masked_lm", hidden.flatten(0, 1).index_select(0, places))
        return F.cross_entropy(logits, wanted.index_select(0, places))

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the hidden state of every token (B, T, C), and the pooled first one (B, C) if there is a pooler.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T) int64, 0 on padding; None if there is none.
            token_type_ids: (B, T) int64, which text a token belongs to; None for the first one throughout.
            position_ids: (B, T) int64, from 0 on; None for 0, 1, ...
            bias: (B or 1, 1, T, T), added to the scores of all heads, so that a model learns which tokens see which:
                -1e30 where one is not to see another.

        Raises:
            ContextLengthError: T is larger than the context.
        """
        x = self.hidden(input_ids, attention_mask, token_type_ids, position_ids, bias)
        return x, None if self.pooler is None else torch.tanh(self.pooler(x.select(1, 0)))

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden state of every token (B, T, C), for arguments as of :meth:`encode`."""
        x = self.embed(input_ids, token_type_ids, position_ids)
        for layer in self.layers:
            x = layer(x, attention_mask, bias)
        return x

    def embed(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Return what the first layer reads, (B, T, C), for arguments as of :meth:`encode`."""
        T = input_ids.shape[1]
        check_length(T, self.config.longest)
        places = self.positions.weight[self.config.first_position :]
        x = self.tokens(input_ids)
        x = x + (places[:T] if position_ids is None else embedding(position_ids, places))
        if self.segments is not None:
            first = token_type_ids is None or self.config.segments == 1
            x = x + (self.segments.weight[:1] if first else self.segments(token_type_ids))
        return self.entered(x)

    def entered(self, x: Tensor) -> Tensor:
        """Return the sum of embeddings (B, T, C) as the first layer reads it."""
        x, _ = self.norm(x, None)
        return drop(x, self.config.dropout, self.training)

    def apply_head(self, name: str, x: Tensor) -> Tensor:
        """Return the logits of a head for what it reads: (..., N), or (B, N) of one that looks at the first token.

        Raises:
            UsageError: the model has no such head.
        """
        if name not in self.heads:
            known = ", ".join(self.heads) or "none"
            raise UsageError(f"this {self.config.family} has no head {name}, its heads are: {known}")
        head = self.heads[name]
        logits: Tensor = head(x, self.tokens.weight) if isinstance(head, MaskedHead) else head(x)
        return logits

    def answer(
        self,
        name: str,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Return what a head says of texts: (B, N), or (B, T, N) of one with an answer for each token.

        Args:
            name: Of the head.
            input_ids: (B, T) int64.
            attention_mask: (B, T) int64, 0 on padding; None if there is none.
            token_type_ids: (B, T) int64, which text a token belongs to; None for the first one throughout.

        Raises:
            ContextLengthError: T is larger than the context.
            UsageError: The model has no such head.
        """
        hidden, pooled = self.encode(input_ids, attention_mask, token_type_ids)
        reads: Any = self.heads[name].reads if name in self.heads else TOKENS
        return self.apply_head(name, pooled if reads == POOLED and pooled is not None else hidden)

    def roles(self) -> dict[str, Role]:
        """Return what this model can be exported as: the encoder, and each head, which reads what the encoder gives."""
        C, ids = self.config.width, ("batch", "sequence")
        names = ["input_ids", "attention_mask", "token_type_ids", "position_ids"]
        if self.config.segments < 2:
            names.remove("token_type_ids")
        states = {TOKENS: TensorSpec(TOKENS, "float32", (*ids, C))}
        if self.pooler is not None:
            states[POOLED] = TensorSpec(POOLED, "float32", ("batch", C))

        def encode(*inputs: Tensor) -> tuple[Tensor, ...]:
            found = self.encode(**dict(zip(names, inputs, strict=True)))
            return tuple(tensor for tensor in found if tensor is not None)

        def answer(name: str, x: Tensor) -> tuple[Tensor, ...]:
            return (self.apply_head(name, x),)

        inputs = tuple(TensorSpec(name, "int64", ids) for name in names)
        roles = {"encoder": Role(encode, inputs, tuple(states.values()))}
        for name, head in self.heads.items():
            each: Any = head
            shape = (*ids, each.count) if each.per_token else ("batch", each.count)
            logits = TensorSpec("logits", "float32", shape)
            roles[f"head:{name}"] = Role(partial(answer, name), (states[each.reads],), (logits,))
        return roles

    def num_parameters(self) -> int:
        """Return the number of parameters, the shared table counted once."""
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw fresh weights from PyTorch's global generator: biases 0, gains 1, all else :meth:`draw`."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif p.dim() == 1:
                p.fill_(1.0)
            else:
                self.draw(p)

    def draw(self, p: Tensor) -> None:
        """Fill a matrix or a table: a normal distribution, drawn again beyond two deviations, as BERT's code has it."""
        s = self.config.init_std
        nn.init.trunc_normal_(p, 0.0, s, -2 * s, 2 * s)

    @classmethod
    def hf_name(cls, name: str) -> tuple[str, bool]:
        """Return the name of a parameter in Hugging Face's files, and False: none is stored transposed there.

        The paths of modules are renamed alike, for what a graph names after them.
        """
        first, _, rest = name.partition(".")
        if first == "layers" and rest:
            number, _, rest = rest.partition(".")
            part, dot, leaf = rest.partition(".")
            named = f"{cls.NAMES[first]}.{number}"
            return (f"{named}.{cls.LAYER_NAMES.get(part, part)}{dot}{leaf}" if part else named), False
        parts = name.split(".")
        for count in range(len(parts), 0, -1):
            if known := cls.NAMES.get(".".join(parts[:count])):
                return ".".join((known, *parts[count:])), False
        return name, False

    @classmethod
    def hf_alias(cls, name: str) -> str | None:
        """Return the usual name of a tensor in a foreign file, or None for one that holds no parameter.

        Files of models without a head lack the prefix; old ones say gamma and beta, and hold positions 0, 1, ...
        """
        if name.endswith(("embeddings.position_ids", "embeddings.token_type_ids")):
            return None
        if not name.startswith(cls.PREFIX) and not cls.SPARE.match(name):
            name = cls.PREFIX + name
        return re.sub(
            r"(\.LayerNorm)\.gamma$", r"\1.weight", re.sub(r"(\.LayerNorm)\.beta$", r"\1.bias", name)
        )

    @classmethod
    def hf_tied(cls, config: EncoderConfig) -> dict[str, str]:
        """Return {name: the tensor it must equal} for what some files store twice."""
        return dict(cls.TIED) if "masked_lm" in config.heads else {}

    @classmethod
    def hf_spare(cls, name: str) -> bool:
        """Say whether a tensor is of a part that another class of the family has: a head, or the pooler."""
        return cls.SPARE.match(name) is not None
