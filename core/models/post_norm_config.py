"""The configuration of encoder-decoders with a norm behind each sublayer; what they compute is in post_norm.py."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from portlm.errors import ConfigError
from portlm.models import config_json

_BOUNDS = {
    "vocab_size": (1, config_json.MAX_VOCAB),
    "context_length": (1, config_json.MAX_CONTEXT),
    "n_layer": (1, config_json.MAX_LAYERS),
    "n_decoder_layer": (1, config_json.MAX_LAYERS),
    "n_head": (1, config_json.MAX_HEADS),
    "width": (1, config_json.MAX_WIDTH),
    "hidden": (1, config_json.MAX_HIDDEN),
    "dropout": (0.0, 0.99),
    "init_std": (0.0, 1.0),
}
Activation = Literal["relu", "gelu", "gelu_new", "silu"]
_ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu", "gelu": "gelu", "gelu_new": "gelu_new", "silu": "silu", "swish": "silu",
}  # fmt: skip


@dataclass(frozen=True)
class PostNormConfig:
    """The shape of such a model; a family says in FIXED and DEFAULTS what config.json must hold and may leave out.

    Dropout acts on what enters a stack and on what each sublayer adds. Attention weights are not dropped: the fused
    attention never holds them in memory.

    Raises:
        ConfigError: A value out of range, or a width that the heads do not divide.
    """

    family: ClassVar[str]
    ARCHITECTURE: ClassVar[str]
    BARE: ClassVar[str]  # transformers' class without a head
    DEFAULTS: ClassVar[dict[str, Any]]  # of transformers' class, for keys that are missing
    FIXED: ClassVar[
        dict[str, Any]
    ]  # further keys that older versions of it wrote, and the value that is computed
    # What [model] of a training run may set, and what it is for a small model on a CPU.
    SETTINGS: ClassVar[dict[str, Any]] = {
        "n_layer": 2,
        "n_head": 4,
        "width": 128,
        "hidden": 0,  # inner width of the MLP; 0 means 4 times the width
        "context_length": 64,  # tokens of a source, and of a target
        "dropout": 0.0,
    }

    vocab_size: int
    context_length: int
    n_layer: int  # of the encoder
    n_decoder_layer: int
    n_head: int
    width: int
    hidden: int
    activation: Activation = "relu"
    scale_embedding: bool = True  # by sqrt(C)
    dropout: float = 0.0
    output_bias: bool = False  # one for every logit
    init_std: float = 0.02
    decoder_start_token_id: int = 0
    bos_token_id: int | None = None  # this and the next two are not computed with, only kept with the model
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        config_json.check_bounds(self, _BOUNDS)
        if self.width % self.n_head or self.width % 2:
            raise ConfigError(f"width {self.width} must be even and a multiple of n_head {self.n_head}")
        if self.activation not in _ACTIVATIONS.values():
            raise ConfigError(f"activation must be relu, gelu, gelu_new or silu, got {self.activation!r}")
        config_json.check_token_ids(self, "decoder_start_token_id")

    @property
    def head_dim(self) -> int:
        """D, the width of one head."""
        return self.width // self.n_head

    @classmethod
    def from_settings(cls, **values: Any) -> Self:
        """Return the configuration for values of SETTINGS and of the vocabulary, as deep on both sides.

        Raises:
            ConfigError: A value out of range, by name.
        """
        hidden = values.pop("hidden") or 4 * values["width"]
        return cls(**values, hidden=hidden, n_decoder_layer=values["n_layer"])

    @classmethod
    def tiny(cls) -> Self:
        """Return a configuration that tests compute in no time: a vocabulary of bytes, an odd inner width."""
        return cls(
            vocab_size=259, context_length=40, n_layer=2, n_decoder_layer=2, n_head=3, width=24, hidden=37,
            eos_token_ids=(256,), pad_token_id=258, decoder_start_token_id=258,
        )  # fmt: skip

    @classmethod
    def from_hf(cls, data: Mapping[str, Any] | config_json.Reader) -> Self:
        """Read the contents of a Hugging Face config.json, strictly.

        Raises:
            ConfigError: A key that is missing, unknown, out of range or asks for another model. It is named.
        """
        read, usual = config_json.Reader.of(data), cls.DEFAULTS
        read.require("model_type", cls.family)
        vocab_size = read.integer("vocab_size", usual["vocab_size"])
        layers = read.integer("encoder_layers", 12, also="num_hidden_layers")
        heads = read.integer("encoder_attention_heads", 16, also="num_attention_heads")
        hidden = read.integer("encoder_ffn_dim", 4096)
        read.require("decoder_attention_heads", heads, says="encoder_attention_heads")
        read.require("decoder_ffn_dim", hidden, says="encoder_ffn_dim")
        read.require("tie_word_embeddings", True)
        for key, value in cls.FIXED.items():
            read.require(key, value if value != "vocab_size" else vocab_size)
        for key in ("attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop"):
            read.training(key, 0.0)
        # Only files of the class with a language model's head hold a bias of the logits.
        read.require("architectures", [cls.ARCHITECTURE], [cls.BARE])
        takes = f"{cls.ARCHITECTURE} or {cls.BARE}, in a list"
        biased = read.raw("architectures", takes, "checked") != [cls.BARE]
        config = cls(
            vocab_size=vocab_size,
            context_length=read.integer("max_position_embeddings", 1024),
            n_layer=layers,
            n_decoder_layer=read.integer("decoder_layers", 12),
            n_head=heads,
            width=read.integer("d_model", 1024, also="hidden_size"),
            hidden=hidden,
            activation=read.choice("activation_function", "gelu", _ACTIVATIONS),
            scale_embedding=read.boolean("scale_embedding", False),
            dropout=read.number("dropout", 0.1),
            output_bias=read.boolean("portlm_output_bias", biased),
            init_std=read.number("init_std", 0.02),
            decoder_start_token_id=read.integer("decoder_start_token_id", usual["decoder_start_token_id"]),
            bos_token_id=read.token_id("bos_token_id", vocab_size),
            eos_token_ids=read.token_ids("eos_token_id", vocab_size),
            pad_token_id=read.token_id("pad_token_id", vocab_size),
        )
        # The first two are of other heads; the last two said once what generation is told now, and where rows begin.
        read.finish(
            "classif_dropout", "classifier_dropout", "force_bos_token_to_be_generated", "extra_pos_embeddings",
            encoder_decoder=True,
        )  # fmt: skip
        return config

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json that transformers opens as ARCHITECTURE."""
        data = {
            "architectures": [self.ARCHITECTURE],
            "model_type": self.family,
            "is_encoder_decoder": True,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.context_length,
            "encoder_layers": self.n_layer,
            "decoder_layers": self.n_decoder_layer,
            "encoder_attention_heads": self.n_head,
            "decoder_attention_heads": self.n_head,
            "encoder_ffn_dim": self.hidden,
            "decoder_ffn_dim": self.hidden,
            "d_model": self.width,
            "activation_function": self.activation,
            "scale_embedding": self.scale_embedding,
            "tie_word_embeddings": True,
            "dropout": self.dropout,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
            "init_std": self.init_std,
            "decoder_start_token_id": self.decoder_start_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": config_json.one_or_list(self.eos_token_ids),
            "forced_eos_token_id": None,
            "pad_token_id": self.pad_token_id,
        }
        if not self.output_bias:
            data["portlm_output_bias"] = False  # transformers keeps it as an attribute nobody reads
        return data
