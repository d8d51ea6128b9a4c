"""The configurations of decoders whose positions are learned: what GPT-1, GPT-2, GPT-3 and GPT-Neo share, and OPT.

Heads divide the width, each with keys and values of its own, and dropout has one rate, where transformers has several.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from portlm.errors import ConfigError
from portlm.models import config_json
from portlm.models.keyed_config import KeyedConfig

# Of the heads of transformers' other classes.
SUMMARY = tuple(
    f"summary_{what}" for what in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout")
)


@dataclass(frozen=True)
class LearnedConfig(KeyedConfig):
    """The fields of them all; a family adds its own.

    Dropout acts on the embeddings and on what each sublayer adds to the residual stream. Attention weights
    are not dropped: the fused attention never holds them in memory.

    Raises:
        ConfigError: A value out of range, or a width that the heads do not divide.
    """

    FIXED: ClassVar[Mapping[str, Any]] = {"tie_word_embeddings": True}
    # What [model] of a training run may set, and what it is for a small model on a CPU.
    SETTINGS: ClassVar[dict[str, Any]] = {
        "n_layer": 4,
        "n_head": 4,
        "width": 128,
        "context_length": 64,  # tokens the model sees at once
        "dropout": 0.0,
    }

    vocab_size: int = 50257
    context_length: int = 1024  # longest sequence, and the number of learned positions
    n_layer: int = 12
    n_head: int = 12
    width: int = 768
    dropout: float = 0.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.n_head:
            raise ConfigError(f"width {self.width} must be a multiple of n_head {self.n_head}")

    @property
    def head_dim(self) -> int:
        """D, the width of one head."""
        return self.width // self.n_head

    @property
    def n_kv_head(self) -> int:
        """Every query head has its own key and value head."""
        return self.n_head

    @classmethod
    def check(cls, read: config_json.Reader, values: Mapping[str, Any]) -> None:
        """Accept only models in which every position sees all before it."""
        super().check(read, values)
        read.require_full_attention(values["context_length"])


@dataclass(frozen=True)
class GPTConfig(LearnedConfig):
    """The fields of the GPTs.

    Attributes:
        DROPOUTS: The keys of the rates of embeddings and of attention weights.
        MISSING_RATE: What they are where they are missing.
    """

    DROPOUTS: ClassVar[tuple[str, str]] = ("embd_pdrop", "attn_pdrop")
    MISSING_RATE: ClassVar[float] = 0.1
    HARMLESS: ClassVar[tuple[str, ...]] = SUMMARY

    layer_norm_eps: float = 1e-5

    @classmethod
    def check(cls, read: config_json.Reader, values: Mapping[str, Any]) -> None:
        """Look at the other rates of dropout."""
        embeddings, attention = cls.DROPOUTS
        why = f"portlm drops at one rate, that of {cls.KEYS['dropout'].name}"
        read.training(embeddings, cls.MISSING_RATE, kept=values["dropout"], why=why)
        read.training(attention, cls.MISSING_RATE)
        super().check(read, values)

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json that transformers opens as ARCHITECTURE."""
        embeddings, attention = self.DROPOUTS
        return super().to_hf() | {embeddings: self.dropout, attention: 0.0}
