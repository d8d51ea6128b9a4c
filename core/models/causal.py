"""What all causal decoders share: from ids through embeddings and blocks to logits, at once or with a cache.

A family is a configuration, a block and the names of its parts. The loop over the blocks, the loss, the step with a
cache, the roles, the heads (core/models/heads.py) and the names in Hugging Face's files are here, once.

B batch, T time, C width, K key/value heads, D head width, R the rotated part of it, P slots already in the cache, V
vocabulary, N answers of a head.
"""

from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from portlm.errors import UsageError
from portlm.models.heads import KINDS
from portlm.models.layers import Embedding, KeyValue, Linear, check_length
from portlm.models.roles import Role, decoder
from portlm.ops.embedding import embedding
from portlm.ops.linear import linear
from portlm.ops.linear_cross_entropy import linear_cross_entropy


class Parts(NamedTuple):
    """What a family calls its parts, in Hugging Face's words.

    Attributes:
        embedding: The token table.
        blocks: The list of blocks.
        norm: The norm behind the last block.
        head: The output layer, where it has a matrix of its own.
        prefix: What stands before all names but the head's in a file.
    """

    embedding: str
    blocks: str
    norm: str
    head: str
    prefix: str


def last_of(y: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the last real token (B, C) of rows y (B, T, C) whose mask (B, T) is 0 on the padding at their right."""
    return y[torch.arange(len(y), device=y.device), attention_mask.sum(1) - 1]


class NoNorm(nn.Module):
    """What follows the last block of a family whose blocks end with a norm of their own."""

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return both as they are."""
        return x, residual


class Causal(nn.Module):
    """A causal decoder with a key/value cache and randomly initialised weights.

    A family sets PARTS and builds its modules in ``__init__``; see :meth:`assemble`. Where there is more than tokens
    and rotary positions it replaces :meth:`embed` and :meth:`carried`.

    Attributes:
        config: Its shape: vocab_size, context_length, n_layer, n_kv_head, head_dim, width, init_std.
        PARTS: What its parts are called.
        CONSTANTS: Ends of the names of tensors in foreign files that hold no parameter.
        rotary_cos: (context, R/2), not saved: it follows from the configuration. Only with rotary positions.
        rotary_sin: The same.
    """

    PARTS: ClassVar[Parts]
    CONSTANTS: ClassVar[tuple[str, ...]] = (".rotary_emb.inv_freq",)
    config: Any
    rotary_cos: Tensor
    rotary_sin: Tensor

    def assemble(
        self, config: Any, blocks: list[nn.Module], norm: nn.Module, *more: tuple[str, nn.Module]
    ) -> None:
        """Register the parts in the order in which their weights are drawn.

        Args:
            config: Its shape; a head of its own where it has ``tie_embeddings`` that is false, a token table of another
                width where it has ``embedding_width``, and heads that say something of a text where it has ``heads``.
            blocks: One for each layer: (x, h, *carried, mask, past) -> (x, h, present).
            norm: The one behind the last block: (x, h) -> (y, h).
            more: Names and modules that come after the token table.
        """
        self.config = config
        parts = self.PARTS
        width = getattr(config, "embedding_width", config.width)
        self.add_module(parts.embedding, Embedding(config.vocab_size, width))
        for name, module in more:
            self.add_module(name, module)
        self.add_module(parts.blocks, nn.ModuleList(blocks))
        self.add_module(parts.norm, norm)
        heads, tied = getattr(config, "heads", ()), getattr(config, "tie_embeddings", True)
        self.generates = tied or all(KINDS[name].generates for name in heads)
        own = self.generates and not tied
        self.register_module(parts.head, Linear(width, config.vocab_size, bias=False) if own else None)
        made = {name: Linear(width, len(config.labels) or 1, bias=KINDS[name].bias) for name in heads}
        self.heads = nn.ModuleDict(made)

    def rotate_by(self, tables: tuple[Tensor, Tensor]) -> None:
        """Keep cosine and sine (context, R/2) of the rotation at each position for :meth:`carried`."""
        for name, table in zip(("rotary_cos", "rotary_sin"), tables, strict=True):
            self.register_buffer(name, table, persistent=False)

    @property
    def head(self) -> Tensor:
        """The output matrix (V, C).

        Raises:
            UsageError: The model has none: its classifier stands in the place of an output matrix of its own.
        """
        if not self.generates:
            raise UsageError(
                f"this {self.config.family} has a head for labels in the place of its output matrix, so it predicts no "
                "tokens"
            )
        own = getattr(self, self.PARTS.head)
        weight: Tensor = (getattr(self, self.PARTS.embedding) if own is None else own).weight
        return weight

    def embed(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        """Return what enters the first block, (B, T, C), for ids (B, T) at positions (B, T), None for 0 to T - 1."""
        x: Tensor = getattr(self, self.PARTS.embedding)(input_ids)
        return x

    def carried(self, tokens: int, position_ids: Tensor | None) -> tuple[Tensor, ...]:
        """Return what every block is given beside the stream: the rotation, (T, R/2) or (B, T, R/2) each."""
        if position_ids is None:
            return self.rotary_cos[:tokens], self.rotary_sin[:tokens]
        return embedding(position_ids, self.rotary_cos), embedding(position_ids, self.rotary_sin)

    @property
    def packs(self) -> bool:
        """Whether several texts may share a row, see :meth:`forward`."""
        return True

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        position_ids: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Return logits (B, T, V), or the mean cross-entropy when targets are given.

        Args:
            input_ids: (B, T) int64.
            targets: (B, T) int64, the token that follows each input; -100 where there is none to predict.
            position_ids: (B, T) int64, the position of each token in its own text; None for 0 to T - 1.
            bias: (B, 1, T, T), added to the scores of attention in place of hiding what comes later: it hides that, and
                other texts of the row (portlm.data.packing.Packed). None where a row is one text.

        Raises:
            ContextLengthError: T is larger than the context.
            UsageError: There is a bias, and the attention of this model takes none (``packs``).
        """
        check_length(input_ids.shape[1], self.config.context_length)
        y, _ = self._decode(input_ids, position_ids, bias)
        return self.logits(y) if targets is None else self.loss(y, targets)

    def logits(self, y: Tensor) -> Tensor:
        """Return the logits (B, T, V) of normalised output y (B, T, C)."""
        return linear(y, self.head)

    def loss(self, y: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of targets (B, T), without the logits where those are all there is to it."""
        return linear_cross_entropy(y.flatten(0, 1), self.head, targets.flatten())

    @torch.no_grad()
    def step(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        past: list[KeyValue] | None = None,
        logits_to_keep: Tensor | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Continue sequences whose P earlier slots are in the cache.

        Args:
            input_ids: (B, T) int64, the new tokens.
            position_ids: (B, T) int64, the position of each within its own row.
            attention_mask: (B, P + T) int64, 0 on the padding left of a shorter row, 1 elsewhere.
            past: For each layer (key, value), each (B, K, P, D), keys already rotated; None stands for P = 0.
            logits_to_keep: (kept,) int64, which of the T new tokens to give logits for; None for all.

        Returns:
            Logits (B, kept, V), and the cache with P + T slots.

        Raises:
            ContextLengthError: P + T is larger than the context.
        """
        check_length(attention_mask.shape[1], self.config.context_length)
        past = self.no_past(len(input_ids)) if past is None else past
        y, present = self._kept(input_ids, position_ids, attention_mask, past, logits_to_keep)
        return self.logits(y), present

    def no_past(self, rows: int) -> list[KeyValue]:
        """Return the cache of so many rows that have no slots yet."""
        table: Tensor = getattr(self, self.PARTS.embedding).weight
        empty = table.new_empty(rows, self.config.n_kv_head, 0, self.config.head_dim)
        return [(empty, empty)] * self.config.n_layer

    def encode(self, input_ids: Tensor) -> Tensor:
        """Return the normalised output of the last block (B, T, C) for ids (B, T), rows padded on their right or not.

        Raises:
            ContextLengthError: T is larger than the context.
        """
        check_length(input_ids.shape[1], self.config.context_length)
        return self._decode(input_ids)[0]

    def apply_head(self, name: str, y: Tensor) -> Tensor:
        """Return what a head says (..., N) of normalised output y (..., C).

        Raises:
            UsageError: The model has no such head.
        """
        if name not in self.heads:
            known = ", ".join(self.heads) or "none"
            raise UsageError(f"this {self.config.family} has no head {name}, its heads are: {known}")
        said: Tensor = self.heads[name](y)
        return said

    def answer(
        self,
        name: str,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Return what a head says of whole texts, (B, N): at the last token of each, which has seen all others.

        Args:
            name: Of the head.
            input_ids: (B, T) int64.
            attention_mask: (B, T) int64, 0 on the padding right of a shorter row; None if there is none.
            token_type_ids: As an encoder takes them; a decoder tells texts apart by the tokens between them.

        Raises:
            ContextLengthError: T is larger than the context.
            UsageError: The model has no such head.
        """
        y = self.encode(input_ids)
        return self.apply_head(name, y[:, -1] if attention_mask is None else last_of(y, attention_mask))

    def roles(self) -> dict[str, Role]:
        """Return what this model can be exported as: a decoder with a cache, and each head in the place of its logits.

        A model with a head for labels is no decoder, whether or not it could predict tokens.
        """
        config = self.config
        caches = [(config.n_kv_head, config.head_dim)] * config.n_layer
        roles = {}
        if all(KINDS[name].generates for name in self.heads):
            roles["decoder"] = decoder(self.step, vocab_size=config.vocab_size, caches=caches)
        for name, head in self.heads.items():
            matrix = cast(Tensor, head.weight)  # (N, C)
            roles[f"head:{name}"] = decoder(partial(self._say, name), vocab_size=len(matrix), caches=caches)
        return roles

    def _say(self, name: str, *inputs: Any) -> tuple[Tensor, list[KeyValue]]:
        """What a head says (B, kept, N) of the tokens that are asked for, and the next cache; inputs as of step."""
        y, present = self._kept(*inputs)
        return self.apply_head(name, y), present

    def _kept(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        past: list[KeyValue],
        logits_to_keep: Tensor | None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Continue from a cache; the normalised output of the tokens that are asked for, and the next cache."""
        y, present = self._decode(input_ids, position_ids, attention_mask, past)
        return y if logits_to_keep is None else y.index_select(1, logits_to_keep), present

    def _decode(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        mask: Tensor | None = None,
        past: list[KeyValue] | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Embed ids (B, T) and run the blocks; return the normalised output and each layer's new cache.

        The mask is (B, P + T) with a past, and without one a bias (B, 1, T, T).
        """
        return self._through(self.embed(input_ids, position_ids), position_ids, mask, past)

    def _through(
        self,
        x: Tensor,
        position_ids: Tensor | None = None,
        mask: Tensor | None = None,
        past: list[KeyValue] | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Run the blocks on what was embedded, (B, T, C); return the normalised output and each layer's new cache."""
        carried, h = self.carried(x.shape[1], position_ids), None
        presents = []
        for layer, block in enumerate(getattr(self, self.PARTS.blocks)):
            x, h, present = block(x, h, *carried, mask, None if past is None else past[layer])
            presents.append(present)
        y, _ = getattr(self, self.PARTS.norm)(x, h)
        return y, presents

    def num_parameters(self) -> int:
        """Return the number of parameters, a shared one counted once."""
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw fresh weights from PyTorch's global generator: N(0, std²) for matrices, biases 0, gains 1."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif p.dim() == 1:
                p.fill_(1.0)
            else:
                p.normal_(0.0, self.std(name, p))

    def std(self, name: str, parameter: Tensor) -> float:
        """Return the spread of a fresh matrix (out, in)."""
        spread: float = self.config.init_std
        return spread

    @classmethod
    def hf_name(cls, name: str) -> tuple[str, bool]:
        """Return a parameter's name in Hugging Face's files, and whether it is stored transposed there."""
        if name.startswith("heads."):
            _, kind, *rest = name.split(".")
            return ".".join((KINDS[kind].file_name, *rest)), False
        return name if name.startswith(f"{cls.PARTS.head}.") else f"{cls.PARTS.prefix}{name}", False

    @classmethod
    def hf_alias(cls, name: str) -> str | None:
        """Return the usual name of a tensor in a foreign file, or None for one that holds no parameter.

        Files of a bare model, without a head, lack the prefix, and early ones hold causal masks and rotary frequencies.
        """
        head, prefix = cls.PARTS.head, cls.PARTS.prefix
        if not name.startswith((prefix, f"{head}.", *(f"{kind.file_name}." for kind in KINDS.values()))):
            name = f"{prefix}{name}"
        return None if name.endswith(cls.CONSTANTS) else name

    @classmethod
    def hf_tied(cls, config: Any) -> dict[str, str]:
        """Return {name: the tensor it must equal} for what some files store twice."""
        head, prefix, table = cls.PARTS.head, cls.PARTS.prefix, cls.PARTS.embedding
        tied = getattr(config, "tie_embeddings", True)
        return {f"{head}.weight": f"{prefix}{table}.weight"} if tied else {}
