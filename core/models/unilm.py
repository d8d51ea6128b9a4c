"""UniLM: one BERT that reads, continues and translates, as a mask of its attention says.

Dong et al., "Unified Language Model Pre-training for Natural Language Understanding and Generation", 2019
(arXiv:1905.03197). Weights and their names are BERT's with its head for hidden tokens, so a folder of such a BERT is
one of this family once its config.json says ``"model_type": "unilm"``. What is new:

- which tokens see which follows from a mode, see :func:`seen`
- a target is written one token after the other behind its source: what comes next is what the head says of a mask token
  in the next place, which sees the source and the tokens before it

A source, [CLS] and its text, has segment 0, and so has the [SEP] behind it; a target and the [SEP] at its end have
segment 1. Here the [SEP] between them is the first token of what is written: it sees the source, and the source does
not see it, where the paper's does. So a source can be read before it is known where it ends, and each token is read
once.

While a model decodes, the tokens of a target go through the layers twice: as themselves, for keys and values, and as
the masks behind them, which nobody else sees. So T tokens are read at once, each with the answer behind it.

B batch, S source tokens, T target tokens, P slots in the cache, C width, H heads, D head width, R rows of the table of
positions, V vocabulary.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from portlm.errors import ConfigError
from portlm.models import config_json
from portlm.models.bert import HARMLESS, Bert, BertConfig, bert_sizes
from portlm.models.encoder import Layer
from portlm.models.encoder_decoder import source_roles
from portlm.models.layers import KeyValue, check_length
from portlm.models.roles import Role
from portlm.ops.embedding import embedding
from portlm.ops.masked_attention import masked_attention
from portlm.ops.relative_bias import relative_bias

HIDDEN = -1e30  # added to the score of a key that is not to be seen
MODES = ("bidirectional", "seq2seq", "left_to_right", "right_to_left")


@dataclass(frozen=True)
class UniLMConfig(BertConfig):
    """The shape of a UniLM.

    The table of positions has 2 context_length + 2 rows, for a source and a target as long as the context and a mask.

    Raises:
        ConfigError: As of BertConfig, or other heads or segments than BERT's for hidden tokens.
    """

    family: ClassVar[str] = "unilm"
    ARCHITECTURES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "UniLMForConditionalGeneration": ("masked_lm",),
        "BertForMaskedLM": ("masked_lm",),
        "BertForPreTraining": ("masked_lm",),
    }

    context_length: int = 255  # longest source, and longest target
    heads: tuple[str, ...] = ("masked_lm",)
    decoder_start_token_id: int = 102  # [SEP], which ends a source and a target
    mask_token_id: int = 103

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.segments != 2:
            raise ConfigError(f"segments of a unilm are source and target: write 2, got {self.segments}")
        config_json.check_token_ids(self, "decoder_start_token_id", "mask_token_id")
        if self.decoder_start_token_id == self.mask_token_id:
            raise ConfigError(
                f"decoder_start_token_id and mask_token_id are both {self.mask_token_id}: give two ids"
            )

    @property
    def longest(self) -> int:
        """R."""
        return 2 * self.context_length + 2

    @classmethod
    def from_settings(cls, **values: Any) -> Self:
        """Return the configuration of a model to pretrain; its last two ids are [SEP] and the mask."""
        last = values["vocab_size"] - 1
        return super().from_settings(**values, decoder_start_token_id=last - 1, mask_token_id=last)

    @classmethod
    def tiny(cls) -> Self:
        """Return a configuration that tests compute in no time: a vocabulary of bytes and control tokens."""
        return replace(
            super().tiny(), eos_token_ids=(258,), pad_token_id=256, decoder_start_token_id=258, mask_token_id=259
        )  # fmt: skip

    @classmethod
    def common_from_hf(cls, read: config_json.Reader) -> dict[str, Any]:
        """Read what is this family's own beside what all encoders say."""
        found = super().common_from_hf(read)
        for key in ("decoder_start_token_id", "mask_token_id"):
            found[key] = read.integer(key, getattr(cls, key))
        return found

    @classmethod
    def from_hf(cls, data: Mapping[str, Any] | config_json.Reader) -> Self:
        """Read the contents of a config.json, BERT's words and two ids, strictly.

        Raises:
            ConfigError: A key that is missing, unknown, out of range or asks for another model. It is named.
        """
        read = config_json.Reader.of(data)
        rows = read.integer("max_position_embeddings", 512)
        if rows < 4 or rows % 2:
            raise ConfigError(
                f"max_position_embeddings = {rows} must be even, and at least 4: a source and a target are equally long"
            )
        config = cls(context_length=rows // 2 - 1, **bert_sizes(read), **cls.common_from_hf(read))
        read.finish(*HARMLESS)
        return config

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json."""
        return super().to_hf() | {
            "max_position_embeddings": self.longest,
            "decoder_start_token_id": self.decoder_start_token_id,
            "mask_token_id": self.mask_token_id,
        }


PRESETS = {
    "unilm-base-cased": UniLMConfig(vocab_size=28996),
    "unilm-large-cased": UniLMConfig(vocab_size=28996, n_layer=24, n_head=16, width=1024, hidden=4096),
}
PARAMETERS = {  # BERT's of the shapes, with the head for hidden tokens and without a pooler
    "unilm-base-cased": 108_340_804,
    "unilm-large-cased": 333_610_308,
}


def seen(mode: str, kinds: Tensor) -> Tensor:
    """Return which tokens see which in a mode, (B, T, T) bool: entry (i, j) says whether i sees j.

    Args:
        mode: one of MODES. bidirectional: all see all. left_to_right, right_to_left: each sees itself and what is
            before it, or behind it. seq2seq: a source sees itself, a target the source and itself from left to right.
        kinds: (B, T) int64, 0 for tokens of a source and 1 from the [SEP] behind it on; only asked in seq2seq.

    Raises:
        ConfigError: There is no such mode.
    """
    if mode not in MODES:
        raise ConfigError(f"the mode of attention must be one of {', '.join(MODES)}, got {mode!r}")
    B, T = kinds.shape
    places = torch.arange(T, device=kinds.device)
    before = places[None, :] <= places[:, None]  # (T, T)
    if mode == "bidirectional":
        return torch.ones(B, T, T, dtype=torch.bool, device=kinds.device)
    if mode == "left_to_right":
        return before.expand(B, T, T)
    if mode == "right_to_left":
        return before.t().expand(B, T, T)
    return (kinds == 0)[:, None, :] | (before & (kinds == 1)[:, :, None])


def bias_of(seen: Tensor) -> Tensor:
    """Return what is added to scores, (B, 1, T, T) float32, for which tokens see which, (B, T, T) bool."""
    return torch.where(seen, 0.0, HIDDEN)[:, None]


class UniLM(Bert):
    """A UniLM with randomly initialised weights; see Encoder for what it shares with BERT.

    Args:
        config: Its shape.
        init: False leaves the parameters uninitialised, for a caller that fills them all.
    """

    config: UniLMConfig
    # Not saved, as they follow from the configuration: a graph reads numbers of positions from tables.
    numbers: Tensor  # (context, 1), the number of each place of a target
    kinds: Tensor  # (context, 1), its segment
    rows: Tensor  # (R,)
    ones: Tensor  # (2, 1): 0, 1, what a mask counts
    hiding: Tensor  # (2, 1): what a mask adds to scores
    causal: Tensor  # (2, 1): biases by distance of those that see what is before them
    alone: Tensor  # (4, 1): 1 for no distance

    def __init__(self, config: UniLMConfig, *, init: bool = True):
        super().__init__(config, init=init)
        n = config.context_length
        tables = {
            "numbers": torch.arange(n)[:, None],
            "kinds": (torch.arange(n) > 0)[:, None],
            "rows": torch.arange(config.longest),
            "ones": torch.tensor([[0.0], [1.0]]),
            "hiding": torch.tensor([[HIDDEN], [0.0]]),
            "causal": torch.zeros(2, 1),
            "alone": torch.tensor([[1.0], [0.0], [0.0], [0.0]]),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.to(torch.get_default_dtype()), persistent=False)

    def write(self, source_ids: Tensor, target_ids: Tensor, source_mask: Tensor | None = None) -> Tensor:
        """Return logits (B, T, V) of what follows each token of a target.

        Args:
            source_ids: (B, S) int64, [CLS] and the text.
            target_ids: (B, T) int64, [SEP] and the target without its last token.
            source_mask: (B, S) int64, 0 on padding; None if there is none.

        Raises:
            ContextLengthError: S or T is larger than the context.
        """
        check_length(max(source_ids.shape[1], target_ids.shape[1]), self.config.context_length)
        mask = torch.ones_like(source_ids) if source_mask is None else source_mask
        _, memory = self.read(source_ids, mask, (mask.cumsum(1) - 1).clamp(min=0))
        places = torch.arange(target_ids.shape[1], device=target_ids.device).expand_as(target_ids)
        return self._step(target_ids, places, torch.ones_like(target_ids), memory, mask, None)[0]

    def read(
        self, ids: Tensor, mask: Tensor | None, position_ids: Tensor | None
    ) -> tuple[Tensor, list[KeyValue]]:
        """Read a source (B, S); return its hidden states (B, S, C) and each layer's keys and values (B, S, H, D)."""
        x, memory = self.embed(ids, None, position_ids), []
        for layer in self._each():
            q, k, v = self._maps(layer, x)
            memory.append((k, v))
            x = layer.added(x, masked_attention(q, k, v, mask))
        return x, memory

    @torch.no_grad()
    def step(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        memory: Sequence[KeyValue],
        source_mask: Tensor,
        past: Sequence[KeyValue] | None = None,
        logits_to_keep: Tensor | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Continue targets whose P earlier slots are in the cache; see EncoderDecoder.step.

        Returns:
            Logits (B, kept, V) of what follows each of the T new tokens, and the cache, (B, P + T, H, D) each.

        Raises:
            ContextLengthError: P + T is larger than the context.
        """
        check_length(attention_mask.shape[1], self.config.context_length)
        return self._step(input_ids, position_ids, attention_mask, memory, source_mask, past, logits_to_keep)

    def _step(
        self,
        ids: Tensor,
        places: Tensor,
        mask: Tensor,
        memory: Sequence[KeyValue],
        source_mask: Tensor,
        past: Sequence[KeyValue] | None,
        logits_to_keep: Tensor | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        x, z = self._enter(ids, places, source_mask)
        see, see_one = self._biases(x, mask, source_mask)
        layers, presents = self._each(), []
        for number, layer in enumerate(layers):
            q, k, v = self._maps(layer, x)
            if past is not None:
                k, v = (torch.cat(pair, dim=1) for pair in zip(past[number], (k, v), strict=True))
            presents.append((k, v))
            keys, values = (torch.cat(pair, dim=1) for pair in zip(memory[number], (k, v), strict=True))
            if layer is not layers[-1]:  # behind the last one nobody asks for what the tokens became
                x = layer.added(x, masked_attention(q, keys, values, None, see))
            q, k, v = self._maps(layer, z)
            keys, values = torch.cat((keys, k), dim=1), torch.cat((values, v), dim=1)
            z = layer.added(z, masked_attention(q, keys, values, None, see_one))
        if logits_to_keep is not None:
            z = z.index_select(1, logits_to_keep)
        return self.apply_head("masked_lm", z), presents

    def _enter(self, ids: Tensor, places: Tensor, source_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the first layer reads of target tokens (B, T) and of the masks behind them, (B, T, C) each."""
        count = embedding(source_mask, self.ones)  # (B, S, 1)
        count = count.flatten(1).unsqueeze(1) @ count  # (B, 1, 1): the tokens of each source
        place = embedding(places, self.numbers) + count  # (B, T, 1)
        kind, segments = embedding(places, self.kinds), self.segments
        assert segments is not None
        source, target = segments.weight[:1], segments.weight[1:2]
        x = self.tokens(ids) + self._positions(place) + (source + kind * (target - source))
        hole = self.tokens.weight[self.config.mask_token_id : self.config.mask_token_id + 1]
        z = self._positions(place + 1.0) + (hole + target)
        return self.entered(x), self.entered(z)

    def _positions(self, place: Tensor) -> Tensor:
        """Return rows (B, T, C) of the table of positions by number, (B, T, 1): 1 among zeros, times the table."""
        off = torch.relu(place - self.rows) + torch.relu(self.rows - place)  # (B, T, R)
        return torch.relu(off * -1.0 + 1.0) @ self.positions.weight

    def _biases(self, x: Tensor, mask: Tensor, source_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return what tokens (B, T, C) see, (B, 1, T, S + P + T), and the masks behind them, with T more keys."""
        # A mask (B, S) as what it adds to scores, (B, 1, 1, S). Masks are not joined themselves: ONNX Runtime's
        # WebGPU has no Concat of int64.
        source, target = (
            embedding(each, self.hiding).transpose(1, 2).unsqueeze(1) for each in (source_mask, mask)
        )
        back = relative_bias(x, mask, self.causal, False, 2)  # (1, T, P + T)
        rows = back.select(2, 0).unsqueeze(2) * 0.0  # (1, T, 1), so that the source has as many
        see = torch.cat((source + rows, target + back), dim=3)  # (B, 1, T, S + P + T)
        # 1 where a key is the query's own token; times its transpose it says which of the T tokens are the same.
        own = relative_bias(x, mask, self.alone, True, 2)  # (1, T, P + T)
        others = (own * -HIDDEN) @ own.transpose(1, 2) + HIDDEN  # (1, T, T)
        none = embedding(source_mask, self.ones).select(1, 0) * 0.0  # (B, 1)
        others = others + none.unsqueeze(1).unsqueeze(1)  # (B, 1, T, T)
        return see, torch.cat((see, others), dim=3)

    def _each(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def _maps(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x (B, T, C), each (B, T, H, D)."""
        H, D = self.config.n_head, self.config.head_dim
        q, k, v = (part(x).view(*x.shape[:2], H, D) for part in (layer.query, layer.key, layer.value))
        return q, k, v

    def roles(self) -> dict[str, Role]:
        """Return what this model can be exported as: it reads a source, and writes a target behind it."""
        config = self.config
        return source_roles(
            self.read,
            self._step,
            sizes=(config.vocab_size, config.width, config.n_layer, config.n_head, config.head_dim),
            cache_shape=("batch", "past", config.n_head, config.head_dim),
            has_positions=True,
        )

    @staticmethod
    def hf_stored(config: BertConfig, names: Collection[str | None]) -> BertConfig:
        """Return the configuration as it is: a file's head for the next text is not kept."""
        return config
