"""The configuration of the encoder-decoder with additive attention; what it computes is in bahdanau.py."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from portlm.errors import ConfigError
from portlm.models import config_json
from portlm.models.recurrent_encoder_decoder import PairConfig

Init = Literal["published", "scaled"]
INITS: dict[str, Init] = {"published": "published", "scaled": "scaled"}
_BOUNDS = {
    "vocab_size": (1, config_json.MAX_VOCAB),
    "context_length": (1, config_json.MAX_CONTEXT),
    "embed_width": (1, config_json.MAX_WIDTH),
    "width": (1, config_json.MAX_WIDTH),
    "alignment": (1, config_json.MAX_WIDTH),
    "maxout": (1, config_json.MAX_WIDTH),
    "dropout": (0.0, 0.99),
}


@dataclass(frozen=True)
class BahdanauConfig(PairConfig):
    """The shape of an encoder-decoder with additive attention, and how its weights begin.

    Dropout acts on the embeddings of both sides and on what the maxout layer gives: on what goes up and never on what
    goes on in time.

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
        "dropout": 0.0,
        "init": "scaled",
    }

    vocab_size: int = 30_000  # of sources and targets alike
    context_length: int = 1024  # the longest source and the longest target
    embed_width: int = 620
    width: int = 1000
    alignment: int = 1000
    maxout: int = 500
    dropout: float = 0.0  # the paper has none
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
            dropout=read.number("dropout", 0.0),
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
            "dropout": self.dropout,
            "init_scheme": self.init,
            **self._written_ids(),
        }
