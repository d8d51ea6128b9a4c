"""BERT: an encoder that fills in hidden tokens and tells whether two texts follow each other.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2018
(arXiv:1810.04805), and the code released with it. The encoder is that of core/models/encoder.py; what is BERT's own:

- a pooler, a linear map with tanh over the first token, which the heads for whole texts read
- a head that says whether the second text follows the first

The presets are the published sizes, without heads, and those of MiniLM (Wang et al., 2020, arXiv:2002.10957), which
are BERTs of another shape.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from portlm.models import config_json
from portlm.models.encoder import POOLED, Encoder, Head, MaskedHead
from portlm.models.encoder_config import EncoderConfig

_POOLED_HEADS = ("next_sentence", "classify")
# What old files say of a pooler that was never published.
HARMLESS = (
    "classifier_dropout", "directionality", "pooler_fc_size", "pooler_num_attention_heads",
    "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type",
)  # fmt: skip


@dataclass(frozen=True)
class BertConfig(EncoderConfig):
    """The shape of a BERT.

    Raises:
        ConfigError: As of EncoderConfig.
    """

    family: ClassVar[str] = "bert"
    ARCHITECTURES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "BertModel": (),
        "BertForPreTraining": ("masked_lm", "next_sentence"),
        "BertForMaskedLM": ("masked_lm",),
        "BertForNextSentencePrediction": ("next_sentence",),
        "BertForSequenceClassification": ("classify",),
        "BertForTokenClassification": ("tag",),
        "BertForQuestionAnswering": ("span",),
    }

    @classmethod
    def from_hf(cls, data: Mapping[str, Any] | config_json.Reader) -> Self:
        """Read the contents of a Hugging Face config.json, strictly.

        Raises:
            ConfigError: A key that is missing, unknown, out of range or asks for another model. It is named.
        """
        read = config_json.Reader.of(data)
        sizes = bert_sizes(read)
        config = cls(
            context_length=read.integer("max_position_embeddings", 512),
            **sizes,
            **cls.common_from_hf(read),
        )
        read.finish(*HARMLESS)
        return config

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json that transformers opens as the class with the same heads."""
        return self.common_to_hf() | sizes_to_hf(self)


def bert_sizes(read: config_json.Reader) -> dict[str, Any]:
    """Read the sizes and rates that BERT and its kin say in the same words, as arguments of the configuration.

    Raises:
        ConfigError: A key that is out of range or asks for another model. It is named.
    """
    dropout = read.number("hidden_dropout_prob", 0.1)
    read.training("attention_probs_dropout_prob", 0.1)
    read.require("position_embedding_type", "absolute")
    return {
        "n_layer": read.integer("num_hidden_layers", 12),
        "n_head": read.integer("num_attention_heads", 12),
        "width": read.integer("hidden_size", 768),
        "hidden": read.integer("intermediate_size", 3072),
        "segments": read.integer("type_vocab_size", 2),
        "dropout": dropout,
        "layer_norm_eps": read.number("layer_norm_eps", 1e-12),
        "gelu": read.choice("hidden_act", "gelu", config_json.GELU),
    }


def sizes_to_hf(config: EncoderConfig) -> dict[str, Any]:
    """Return what :func:`bert_sizes` reads."""
    return {
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "type_vocab_size": config.segments,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_act": "gelu_new" if config.gelu == "tanh" else "gelu",
    }


PRESETS = {
    "bert-base-uncased": BertConfig(),
    "bert-base-cased": BertConfig(vocab_size=28996),
    "bert-base-chinese": BertConfig(vocab_size=21128),
    "bert-large-uncased": BertConfig(n_layer=24, n_head=16, width=1024, hidden=4096),
    "minilm-l6": BertConfig(n_layer=6, width=384, hidden=1536),
    "minilm-l12": BertConfig(width=384, hidden=1536),
}
PARAMETERS = {  # of the encoder with its pooler
    "bert-base-uncased": 109_482_240,
    "bert-base-cased": 108_310_272,
    "bert-base-chinese": 102_267_648,
    "bert-large-uncased": 335_141_888,
    "minilm-l6": 22_713_216,
    "minilm-l12": 33_360_000,
}


class Bert(Encoder):
    """A BERT with randomly initialised weights; see Encoder.

    Args:
        config: Its shape and heads.
        init: False leaves the parameters uninitialised, for a caller that fills them all.
    """

    PREFIX: ClassVar[str] = "bert."
    NAMES: ClassVar[Mapping[str, str]] = {
        "tokens": "bert.embeddings.word_embeddings",
        "positions": "bert.embeddings.position_embeddings",
        "segments": "bert.embeddings.token_type_embeddings",
        "norm": "bert.embeddings.LayerNorm",
        "layers": "bert.encoder.layer",
        "pooler": "bert.pooler.dense",
        "heads.masked_lm": "cls.predictions",
        "heads.masked_lm.dense": "cls.predictions.transform.dense",
        "heads.masked_lm.norm": "cls.predictions.transform.LayerNorm",
        "heads.next_sentence": "cls.seq_relationship",
        "heads.classify": "classifier",
        "heads.tag": "classifier",
        "heads.span": "qa_outputs",
    }
    LAYER_NAMES: ClassVar[Mapping[str, str]] = {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "out": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "norm": "output.LayerNorm",
    }
    TIED: ClassVar[Mapping[str, str]] = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    SPARE: ClassVar[re.Pattern[str]] = re.compile(r"bert\.pooler\.|cls\.|classifier\.|qa_outputs\.")

    def __init__(self, config: BertConfig, *, init: bool = True):
        labels = len(config.labels)
        made = {
            "masked_lm": lambda: MaskedHead(config, config.gelu),
            "next_sentence": lambda: Head(config, 2, POOLED),
            "classify": lambda: Head(config, labels, POOLED),
            "tag": lambda: Head(config, labels),
            "span": lambda: Head(config, 2),
        }
        pooled = not config.heads or bool({*config.heads} & {*_POOLED_HEADS})
        super().__init__(config, {name: made[name]() for name in config.heads}, pooled=pooled, init=init)

    @staticmethod
    def hf_stored(config: BertConfig, names: Collection[str | None]) -> BertConfig:
        """Return the configuration with the head for the next text, where a file for hidden tokens holds it whole.

        The published files name one head in config.json and hold both: with the pooler, which fine-tuning starts from.
        """
        parts = ("bert.pooler.dense", "cls.seq_relationship")
        if config.heads == ("masked_lm",) and {
            f"{part}.{leaf}" for part in parts for leaf in ("weight", "bias")
        } <= {*names}:
            return replace(config, heads=("masked_lm", "next_sentence"))
        return config
