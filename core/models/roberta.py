"""RoBERTa: BERT, trained longer, on whole texts alone.

Liu et al., "RoBERTa: A Robustly Optimized BERT Pretraining Approach", 2019 (arXiv:1907.11692), as fairseq and
Hugging Face have it. Changes since BERT:

- byte-level BPE instead of WordPiece
- no head for the next text, and one kind of token only
- the first token has the position after that of padding, whose id is 1: row 2 of the table
- classification reads the first token itself, through a linear map with tanh in the head

As in fairseq, weights begin as plain normals, and the rows of padding as zeros.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from portlm.errors import ConfigError
from portlm.models import config_json
from portlm.models.bert import Bert, bert_sizes, sizes_to_hf
from portlm.models.encoder import Encoder, FirstTokenHead, Head, MaskedHead
from portlm.models.encoder_config import EncoderConfig


@dataclass(frozen=True)
class RobertaConfig(EncoderConfig):
    """The shape of a RoBERTa.

    Raises:
        ConfigError: As of EncoderConfig, or there is no id of padding, which decides where positions begin.
    """

    family: ClassVar[str] = "roberta"
    ARCHITECTURES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "RobertaModel": (),
        "RobertaForMaskedLM": ("masked_lm",),
        "RobertaForSequenceClassification": ("classify",),
        "RobertaForTokenClassification": ("tag",),
        "RobertaForQuestionAnswering": ("span",),
    }

    vocab_size: int = 50265
    segments: int = 1
    layer_norm_eps: float = 1e-5
    pad_token_id: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pad_token_id is None:
            raise ConfigError("pad_token_id of a roberta decides where positions begin: give it")

    @property
    def first_position(self) -> int:
        """The row of the table of positions that the first token has: the one behind the row of padding."""
        return 1 + (self.pad_token_id or 0)

    @classmethod
    def from_hf(cls, data: Mapping[str, Any] | config_json.Reader) -> Self:
        """Read the contents of a Hugging Face config.json, strictly.

        Raises:
            ConfigError: A key that is missing, unknown, out of range or asks for another model. It is named.
        """
        read = config_json.Reader.of(data)
        sizes, common = bert_sizes(read), cls.common_from_hf(read)
        pad = read.integer("pad_token_id", 1)
        rows = read.integer("max_position_embeddings", 512)
        if rows <= pad + 1:
            raise ConfigError(
                f"max_position_embeddings = {rows} leaves no position behind those up to {pad} for padding"
            )
        config = cls(context_length=rows - pad - 1, **sizes, **common | {"pad_token_id": pad})
        read.finish("classifier_dropout")
        return config

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json that transformers opens as the class with the same heads."""
        return self.common_to_hf() | sizes_to_hf(self)


PRESETS = {
    "roberta-base": RobertaConfig(),
    "roberta-large": RobertaConfig(n_layer=24, n_head=16, width=1024, hidden=4096),
}
PARAMETERS = {  # of the encoder with its pooler
    "roberta-base": 124_645_632,
    "roberta-large": 355_359_744,
}


class Roberta(Encoder):
    """A RoBERTa with randomly initialised weights; see Encoder.

    Args:
        config: Its shape and heads.
        init: False leaves the parameters uninitialised, for a caller that fills them all.
    """

    PREFIX: ClassVar[str] = "roberta."
    NAMES: ClassVar[Mapping[str, str]] = {
        **{
            part: name.replace("bert.", "roberta.", 1)
            for part, name in Bert.NAMES.items()
            if not part.startswith("heads.")
        },
        "heads.masked_lm": "lm_head",
        "heads.masked_lm.dense": "lm_head.dense",
        "heads.masked_lm.norm": "lm_head.layer_norm",
        "heads.classify.dense": "classifier.dense",
        "heads.classify.out": "classifier.out_proj",
        "heads.tag": "classifier",
        "heads.span": "qa_outputs",
    }
    LAYER_NAMES: ClassVar[Mapping[str, str]] = Bert.LAYER_NAMES
    TIED: ClassVar[Mapping[str, str]] = {
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }
    SPARE: ClassVar[re.Pattern[str]] = re.compile(r"roberta\.pooler\.|lm_head\.|classifier\.|qa_outputs\.")

    def __init__(self, config: RobertaConfig, *, init: bool = True):
        labels = len(config.labels)
        made = {
            "masked_lm": lambda: MaskedHead(config, "none"),
            "classify": lambda: FirstTokenHead(config, labels, torch.tanh),
            "tag": lambda: Head(config, labels),
            "span": lambda: Head(config, 2),
        }
        heads = {name: made[name]() for name in config.heads}
        super().__init__(config, heads, pooled=not config.heads, init=init)

    def init_weights(self) -> None:
        """Draw fresh weights from PyTorch's global generator."""
        super().init_weights()
        with torch.no_grad():
            padding = self.config.first_position - 1
            self.tokens.weight[padding].zero_()
            self.positions.weight[padding].zero_()

    def draw(self, p: Tensor) -> None:
        """Fill a matrix or a table from a normal distribution."""
        p.normal_(0.0, self.config.init_std)
