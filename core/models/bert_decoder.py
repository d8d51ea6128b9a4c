"""A BERT that reads and a BERT that writes: generation on top of a pretrained encoder.

Rothe, Narayan and Severyn, "Leveraging Pre-trained Checkpoints for Sequence Generation Tasks", 2019
(arXiv:1907.12461), there BERT2BERT; EncoderDecoderModel of two BERTs in Hugging Face's words.

- the encoder is BERT as it is; nothing reads its pooler, which checkpoints have all the same
- the decoder is BERT with its head for hidden tokens, which here says the next one: its layers see only what is before
  them, and behind that look at what the encoder made of the source
- both begin as the same checkpoint, and what looks at the source begins fresh (:meth:`BertDecoder.adopted`)

B batch, S source tokens, T target tokens, P slots in the cache, C width, H heads, D head width, V vocabulary.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar, Self, cast

from torch import Tensor

from portlm.errors import ConfigError
from portlm.files import shown
from portlm.models import config_json
from portlm.models.bert import HARMLESS, Bert, BertConfig, bert_sizes
from portlm.models.encoder import Layer, MaskedHead
from portlm.models.encoder_config import EncoderConfig
from portlm.models.encoder_decoder import EncoderDecoder
from portlm.models.layers import KeyValue, LayerNorm, Linear
from portlm.ops.attention import attention
from portlm.ops.cached_attention import cached_attention
from portlm.ops.masked_attention import masked_attention

_SIDES = ("encoder", "decoder")


@dataclass(frozen=True)
class BertDecoderConfig(BertConfig):
    """The shape of two BERTs that differ at most in their depth.

    Raises:
        ConfigError: As of BertConfig, or other heads than that for hidden tokens.
    """

    family: ClassVar[str] = "encoder-decoder"
    ARCHITECTURES: ClassVar[Mapping[str, tuple[str, ...]]] = {"EncoderDecoderModel": ("masked_lm",)}

    heads: tuple[str, ...] = ("masked_lm",)
    n_decoder_layer: int = 12
    decoder_start_token_id: int = 101  # [CLS]

    def __post_init__(self) -> None:
        super().__post_init__()
        config_json.check_bounds(self, {"n_decoder_layer": (1, config_json.MAX_LAYERS)})
        config_json.check_token_ids(self, "decoder_start_token_id")

    @classmethod
    def from_settings(cls, **values: Any) -> Self:
        """Return the configuration of a model to pretrain, as deep on both sides."""
        return super().from_settings(**values, n_decoder_layer=values["n_layer"], decoder_start_token_id=0)

    @classmethod
    def tiny(cls) -> Self:
        """Return a configuration that tests compute in no time: a vocabulary of bytes and control tokens."""
        return replace(
            super().tiny(), n_decoder_layer=2, eos_token_ids=(256,), pad_token_id=258, decoder_start_token_id=258
        )  # fmt: skip

    @classmethod
    def of(cls, bert: BertConfig) -> Self:
        """Return the configuration of two BERTs of this shape."""
        values = {field.name: getattr(bert, field.name) for field in fields(BertConfig)}
        own = {"heads": cls.heads, "labels": (), "problem": None, "n_decoder_layer": bert.n_layer}
        return cls(**values | own, decoder_start_token_id=0)

    @classmethod
    def from_hf(cls, data: Mapping[str, Any] | config_json.Reader) -> Self:
        """Read the contents of a Hugging Face config.json, which holds one of each side, strictly.

        Raises:
            ConfigError: A key that is missing, unknown, out of range or asks for another model. It is named.
        """
        read = config_json.Reader.of(data)
        read.require("model_type", cls.family)
        read.require("architectures", [*cls.ARCHITECTURES])
        read.require("tie_word_embeddings", True, False)  # that of the decoder counts
        encoder = read.part("encoder", partial(_side, writes=False))
        decoder = read.part("decoder", partial(_side, writes=True))
        for key, value in encoder.items():
            if key != "n_layer" and decoder[key] != value:
                raise ConfigError(
                    f"the encoder's {key} is {shown(value)} and the decoder's {shown(decoder[key])}: portlm computes "
                    "two that differ in their depth alone"
                )
        vocab_size = encoder["vocab_size"]
        start = read.integer("decoder_start_token_id", cls.decoder_start_token_id)
        config = cls(
            **encoder,
            n_decoder_layer=decoder["n_layer"],
            decoder_start_token_id=start,
            bos_token_id=read.token_id("bos_token_id", vocab_size),
            eos_token_ids=read.token_ids("eos_token_id", vocab_size),
            pad_token_id=read.token_id("pad_token_id", vocab_size),
        )
        read.require("vocab_size", vocab_size, says="that of both sides")
        read.finish(encoder_decoder=True)
        return config

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json that transformers opens as EncoderDecoderModel."""
        return {
            "architectures": [self.architecture],
            "model_type": self.family,
            "is_encoder_decoder": True,
            "encoder": self._side_to_hf(self.n_layer),
            "decoder": self._side_to_hf(self.n_decoder_layer, is_decoder=True, add_cross_attention=True),
            "tie_word_embeddings": True,
            "decoder_start_token_id": self.decoder_start_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": config_json.one_or_list(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
        }

    def side(self, layers: int, heads: tuple[str, ...]) -> BertConfig:
        """Return the configuration of one of the two."""
        values = {field.name: getattr(self, field.name) for field in fields(BertConfig)}
        return BertConfig(**values | {"n_layer": layers, "heads": heads})

    def _side_to_hf(self, layers: int, **flags: bool) -> dict[str, Any]:
        data = self.side(layers, ()).to_hf() | flags
        del data["architectures"]
        return data


def _side(read: config_json.Reader, *, writes: bool) -> dict[str, Any]:
    """Return the sizes of one of the two, as arguments of the configuration."""
    read.require("model_type", "bert")
    read.require("is_decoder", writes)
    if writes and not (read.holds("is_decoder") and read.holds("add_cross_attention")):
        raise ConfigError("is_decoder and add_cross_attention must be there, and true")
    read.require("tie_word_embeddings", True)
    sizes = {
        "vocab_size": read.integer("vocab_size", EncoderConfig.vocab_size),
        "context_length": read.integer("max_position_embeddings", 512),
        "init_std": read.number("initializer_range", 0.02),
        **bert_sizes(read),
    }
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        read.token_ids(key, sizes["vocab_size"])
    read.finish(*HARMLESS, decoder=writes)
    return sizes


PRESETS = {"bert2bert-base-uncased": BertDecoderConfig()}
PARAMETERS = {
    "bert2bert-base-uncased": 247_363_386
}  # with a pooler that nothing reads; the paper leaves it out


class DecoderLayer(Layer):
    """A layer that sees the tokens before it, and then the source."""

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        C = config.width
        self.source_query, self.source_key, self.source_value, self.source_out = (
            Linear(C, C, bias=True) for _ in range(4)
        )
        self.source_norm = LayerNorm(C, config.layer_norm_eps)

    def memory(self, encoded: Tensor) -> KeyValue:
        """Return keys and values (B, S, H, D) of an encoded source (B, S, C)."""
        return self._heads(self.source_key(encoded)), self._heads(self.source_value(encoded))

    def decode(
        self,
        x: Tensor,
        mask: Tensor | None,
        past: KeyValue | None,
        memory: KeyValue,
        source_mask: Tensor | None,
    ) -> tuple[Tensor, KeyValue | None]:
        """Map (B, T, C) to the same; return the grown cache of a layer that was given one."""
        q, k, v = (self._heads(part(x)) for part in (self.query, self.key, self.value))
        present = None
        if past is None:
            y = attention(q, k, v)
        else:
            y, key, value = cached_attention(q, k, v, *past, mask)
            present = (key, value)
        x = self.with_seen(x, y)
        y = masked_attention(self._heads(self.source_query(x)), *memory, source_mask)
        y = self._drop(self.source_out(y.reshape(x.shape)))
        return self.through(self.source_norm(y, x)[0]), present

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.n_head, self.head_dim)


class Decoder(Bert):
    """The side that writes."""

    LAYER: ClassVar[type[Layer]] = DecoderLayer
    LAYER_NAMES: ClassVar[Mapping[str, str]] = {
        **Bert.LAYER_NAMES,
        "source_query": "crossattention.self.query",
        "source_key": "crossattention.self.key",
        "source_value": "crossattention.self.value",
        "source_out": "crossattention.output.dense",
        "source_norm": "crossattention.output.LayerNorm",
    }

    def each(self) -> Sequence[DecoderLayer]:
        """Return the layers, first to last."""
        return cast("Sequence[DecoderLayer]", self.layers)


class BertDecoder(EncoderDecoder):
    """Two BERTs with randomly initialised weights; see EncoderDecoder.

    Args:
        config: Their shape.
        init: False leaves the parameters uninitialised, for a caller that fills them all.
    """

    def __init__(self, config: BertDecoderConfig, *, init: bool = True):
        super().__init__()
        self.config = config
        self.encoder = Bert(config.side(config.n_layer, ()), init=init)
        self.decoder = Decoder(config.side(config.n_decoder_layer, ("masked_lm",)), init=init)

    @property
    def _says(self) -> MaskedHead:
        return cast("MaskedHead", self.decoder.heads["masked_lm"])

    @property
    def head(self) -> Tensor:
        """The output matrix (V, C): the decoder's table of tokens."""
        return self.decoder.tokens.weight

    @property
    def output_bias(self) -> Tensor:
        """What is added to the logits, (1, V)."""
        return self._says.bias[None]

    def scaled(self, y: Tensor) -> Tensor:
        """Return what the head for hidden tokens makes of the decoder's output (B, T, C) before its matrix."""
        return self._says.before(y)

    def encode(self, ids: Tensor, mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """Return what the encoder makes of source ids (B, S); see EncoderDecoder."""
        return self.encoder.hidden(ids, mask, None, position_ids)

    def memory(self, encoded: Tensor) -> list[KeyValue]:
        """Return each decoder layer's keys and values of an encoded source; see EncoderDecoder."""
        return [layer.memory(encoded) for layer in self.decoder.each()]

    def decode(
        self,
        ids: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        past: Sequence[KeyValue] | None,
        memory: Sequence[KeyValue],
        source_mask: Tensor | None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Run the decoder on target ids (B, T); see EncoderDecoder."""
        x, presents = self.decoder.embed(ids, None, position_ids), []
        for number, layer in enumerate(self.decoder.each()):
            own = None if past is None else past[number]
            x, present = layer.decode(x, mask, own, memory[number], source_mask)
            if present is not None:
                presents.append(present)
        return x, presents

    @staticmethod
    def adopted(name: str) -> str | None:
        """Return the name in a BERT of what a parameter begins as; None for one that begins fresh."""
        name = name.partition(".")[2]
        return None if ".source_" in name else name

    @staticmethod
    def hf_name(name: str) -> tuple[str, bool]:
        """Return a parameter's name in Hugging Face's files, and False: none is stored transposed there."""
        side, dot, rest = name.partition(".")
        if side not in _SIDES:
            return name, False
        named = (Bert if side == "encoder" else Decoder).hf_name(rest)[0]
        return side + dot + (named.removeprefix("bert.") if side == "encoder" else named), False

    @staticmethod
    def hf_alias(name: str) -> str | None:
        """Return the usual name of a tensor in a foreign file, or None for one that holds no parameter."""
        if name.endswith(("embeddings.position_ids", "embeddings.token_type_ids")):
            return None
        return re.sub(
            r"(\.LayerNorm)\.gamma$", r"\1.weight", re.sub(r"(\.LayerNorm)\.beta$", r"\1.bias", name)
        )

    @staticmethod
    def hf_tied(config: BertDecoderConfig) -> dict[str, str]:
        """Return {name: the tensor it must equal} for what some files store twice."""
        return {f"decoder.{copy}": f"decoder.{name}" for copy, name in Bert.TIED.items()}
