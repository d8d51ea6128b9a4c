"""DistilBERT: a BERT of half as many layers, taught by a whole one.

Sanh et al., "DistilBERT, a distilled version of BERT", 2019 (arXiv:1910.01108), as Hugging Face has it. Changes since
BERT:

- nothing tells the tokens of two texts apart, and there is no pooler
- classification reads the first token itself, through a linear map with ReLU in the head
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from portlm.errors import ConfigError
from portlm.models import config_json
from portlm.models.encoder import Encoder, FirstTokenHead, Head, MaskedHead
from portlm.models.encoder_config import EncoderConfig


@dataclass(frozen=True)
class DistilBertConfig(EncoderConfig):
    """The shape of a DistilBERT.

    Raises:
        ConfigError: As of EncoderConfig, or what only a BERT has.
    """

    family: ClassVar[str] = "distilbert"
    ARCHITECTURES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "DistilBertModel": (),
        "DistilBertForMaskedLM": ("masked_lm",),
        "DistilBertForSequenceClassification": ("classify",),
        "DistilBertForTokenClassification": ("tag",),
        "DistilBertForQuestionAnswering": ("span",),
    }

    n_layer: int = 6
    segments: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.segments or self.layer_norm_eps != 1e-12:
            raise ConfigError("a distilbert has no segments, and its layer_norm_eps is 1e-12")

    @classmethod
    def from_hf(cls, data: Mapping[str, Any] | config_json.Reader) -> Self:
        """Read the contents of a Hugging Face config.json, strictly.

        Raises:
            ConfigError: A key that is missing, unknown, out of range or asks for another model. It is named.
        """
        read = config_json.Reader.of(data)
        for key in ("attention_dropout", "qa_dropout", "seq_classif_dropout"):
            read.training(key, 0.2 if key == "seq_classif_dropout" else 0.1)
        config = cls(
            context_length=read.integer("max_position_embeddings", 512),
            n_layer=read.integer("n_layers", 6, also="num_hidden_layers"),
            n_head=read.integer("n_heads", 12, also="num_attention_heads"),
            width=read.integer("dim", 768, also="hidden_size"),
            hidden=read.integer("hidden_dim", 3072),
            dropout=read.number("dropout", 0.1),
            gelu=read.choice("activation", "gelu", config_json.GELU),
            **cls.common_from_hf(read),
        )
        # The positions are in the file, whatever they began as.
        read.finish("sinusoidal_pos_embds", "tie_weights_")
        return config

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json that transformers opens as the class with the same heads."""
        return self.common_to_hf() | {
            "n_layers": self.n_layer,
            "n_heads": self.n_head,
            "dim": self.width,
            "hidden_dim": self.hidden,
            "dropout": self.dropout,
            "attention_dropout": 0.0,
            "qa_dropout": 0.0,
            "seq_classif_dropout": 0.0,
            "activation": "gelu_new" if self.gelu == "tanh" else "gelu",
        }


PRESETS = {
    "distilbert-base-uncased": DistilBertConfig(),
    "distilbert-base-cased": DistilBertConfig(vocab_size=28996),
}
PARAMETERS = {
    "distilbert-base-uncased": 66_362_880,
    "distilbert-base-cased": 65_190_912,
}


class DistilBert(Encoder):
    """A DistilBERT with randomly initialised weights; see Encoder.

    Args:
        config: Its shape and heads.
        init: False leaves the parameters uninitialised, for a caller that fills them all.
    """

    PREFIX: ClassVar[str] = "distilbert."
    NAMES: ClassVar[Mapping[str, str]] = {
        "tokens": "distilbert.embeddings.word_embeddings",
        "positions": "distilbert.embeddings.position_embeddings",
        "norm": "distilbert.embeddings.LayerNorm",
        "layers": "distilbert.transformer.layer",
        "heads.masked_lm": "vocab_projector",
        "heads.masked_lm.dense": "vocab_transform",
        "heads.masked_lm.norm": "vocab_layer_norm",
        "heads.classify.dense": "pre_classifier",
        "heads.classify.out": "classifier",
        "heads.tag": "classifier",
        "heads.span": "qa_outputs",
    }
    LAYER_NAMES: ClassVar[Mapping[str, str]] = {
        "query": "attention.q_lin",
        "key": "attention.k_lin",
        "value": "attention.v_lin",
        "out": "attention.out_lin",
        "attention_norm": "sa_layer_norm",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
        "norm": "output_layer_norm",
    }
    TIED: ClassVar[Mapping[str, str]] = {
        "vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight",
    }
    SPARE: ClassVar[re.Pattern[str]] = re.compile(
        r"vocab_(transform|layer_norm|projector)\.|(pre_)?classifier\.|qa_outputs\."
    )

    def __init__(self, config: DistilBertConfig, *, init: bool = True):
        labels = len(config.labels)
        made = {
            "masked_lm": lambda: MaskedHead(config, config.gelu),
            "classify": lambda: FirstTokenHead(config, labels, torch.relu),
            "tag": lambda: Head(config, labels),
            "span": lambda: Head(config, 2),
        }
        super().__init__(config, {name: made[name]() for name in config.heads}, pooled=False, init=init)

    def draw(self, p: Tensor) -> None:
        """Fill a matrix or a table from a normal distribution."""
        p.normal_(0.0, self.config.init_std)
