"""The configuration of T5; what it computes is in t5.py."""

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
    "head_dim": (1, config_json.MAX_WIDTH),
    "hidden": (1, config_json.MAX_HIDDEN),
    "buckets": (4, 1 << 16),
    "max_distance": (2, config_json.MAX_CONTEXT),
    "dropout": (0.0, 0.99),
    "rms_norm_eps": (1e-12, 0.1),
    "init_factor": (0.0, 1e3),
}
Activation = Literal["relu", "gated-gelu"]
_ACTIVATIONS: dict[str, Activation] = {"relu": "relu", "gated-gelu": "gated-gelu"}
_INNER = {"relu": "relu", "gated-gelu": "gelu_new"}  # what transformers also writes of it


@dataclass(frozen=True)
class T5Config:
    """The shape of a T5 model.

    Dropout acts on embeddings, on what each sublayer adds to the residual stream, inside the MLP and on what a stack
    gives. Attention weights are not dropped: the fused attention never holds them in memory.

    Raises:
        ConfigError: A value out of range.
    """

    family: ClassVar[str] = "t5"
    # What [model] of a training run may set, and what it is for a small model on a CPU.
    SETTINGS: ClassVar[dict[str, Any]] = {
        "n_layer": 2,
        "n_head": 4,
        "width": 128,
        "hidden": 0,  # inner width of the MLP; 0 means 4 times the width
        "context_length": 64,  # tokens of a source, and of a target
        "dropout": 0.0,
    }

    vocab_size: int = 32128
    context_length: int = 512  # longest source and longest target: nothing in the model bounds them
    n_layer: int = 6  # of the encoder
    n_decoder_layer: int = 6
    n_head: int = 8
    width: int = 512
    head_dim: int = 64
    hidden: int = 2048
    buckets: int = 32
    max_distance: int = 128
    activation: Activation = "relu"
    tie_embeddings: bool = True
    scale_output: bool = True
    dropout: float = 0.0
    rms_norm_eps: float = 1e-6
    init_factor: float = 1.0
    decoder_start_token_id: int = 0
    bos_token_id: int | None = None  # this and the next two are not computed with, only kept with the model
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        config_json.check_bounds(self, _BOUNDS)
        if self.activation not in _ACTIVATIONS:
            raise ConfigError(f"activation must be relu or gated-gelu, got {self.activation!r}")
        if self.buckets % 4 or self.max_distance <= self.buckets // 2:
            raise ConfigError(
                f"buckets must be a multiple of 4 and max_distance more than half of them, got {self.buckets} and "
                f"{self.max_distance}"
            )
        config_json.check_token_ids(self, "decoder_start_token_id")

    @classmethod
    def from_settings(cls, **values: Any) -> Self:
        """Return the configuration for values of SETTINGS and of the vocabulary: version 1.1, as deep on both sides.

        Raises:
            ConfigError: A value out of range, by name.
        """
        hidden = values.pop("hidden") or 4 * values["width"]
        if values["width"] % max(values["n_head"], 1):
            raise ConfigError(f"width {values['width']} must be a multiple of n_head {values['n_head']}")
        return cls(
            **values, hidden=hidden, n_decoder_layer=values["n_layer"],
            head_dim=values["width"] // max(values["n_head"], 1), activation="gated-gelu",
        )  # fmt: skip

    @classmethod
    def tiny(cls) -> Self:
        """Return a configuration that tests compute in no time: a vocabulary of bytes, heads wider than the model."""
        return cls(
            vocab_size=259, context_length=40, n_layer=2, n_decoder_layer=2, n_head=3, width=24, head_dim=16, hidden=20,
            buckets=8, max_distance=12, eos_token_ids=(256,), pad_token_id=258, decoder_start_token_id=258,
        )  # fmt: skip

    @classmethod
    def from_hf(cls, data: Mapping[str, Any] | config_json.Reader) -> Self:
        """Read the contents of a Hugging Face config.json, strictly.

        Raises:
            ConfigError: A key that is missing, unknown, out of range or asks for another model. It is named.
        """
        read = config_json.Reader.of(data)
        read.require("model_type", "t5")
        vocab_size, layers = read.integer("vocab_size", 32128), read.integer("num_layers", 6)
        activation = read.choice("feed_forward_proj", "relu", _ACTIVATIONS)
        read.require("dense_act_fn", _INNER[activation], says="the activation that feed_forward_proj names")
        read.require("is_gated_act", activation == "gated-gelu", says="whether feed_forward_proj is gated")
        tied = read.boolean("tie_word_embeddings", True)
        pad = read.token_id("pad_token_id", vocab_size)
        start = read.token_id("decoder_start_token_id", vocab_size)
        config = cls(
            vocab_size=vocab_size,
            context_length=read.integer("n_positions", 512),
            n_layer=layers,
            n_decoder_layer=read.integer("num_decoder_layers", layers, says="num_layers"),
            n_head=read.integer("num_heads", 8),
            width=read.integer("d_model", 512),
            head_dim=read.integer("d_kv", 64),
            hidden=read.integer("d_ff", 2048),
            buckets=read.integer("relative_attention_num_buckets", 32),
            max_distance=read.integer("relative_attention_max_distance", 128),
            activation=activation,
            tie_embeddings=tied,
            scale_output=read.boolean("scale_decoder_outputs", tied),
            dropout=read.number("dropout_rate", 0.1),
            rms_norm_eps=read.number("layer_norm_epsilon", 1e-6),
            init_factor=read.number("initializer_factor", 1.0),
            decoder_start_token_id=next(i for i in (start, pad, 0) if i is not None),
            bos_token_id=read.token_id("bos_token_id", vocab_size),
            eos_token_ids=read.token_ids("eos_token_id", vocab_size),
            pad_token_id=pad,
        )
        read.finish("classifier_dropout", encoder_decoder=True)
        return config

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json that transformers opens as T5ForConditionalGeneration."""
        data = {
            "architectures": ["T5ForConditionalGeneration"],
            "model_type": "t5",
            "is_encoder_decoder": True,
            "vocab_size": self.vocab_size,
            "n_positions": self.context_length,
            "num_layers": self.n_layer,
            "num_decoder_layers": self.n_decoder_layer,
            "num_heads": self.n_head,
            "d_model": self.width,
            "d_kv": self.head_dim,
            "d_ff": self.hidden,
            "relative_attention_num_buckets": self.buckets,
            "relative_attention_max_distance": self.max_distance,
            "feed_forward_proj": self.activation,
            "tie_word_embeddings": self.tie_embeddings,
            "dropout_rate": self.dropout,
            "layer_norm_epsilon": self.rms_norm_eps,
            "initializer_factor": self.init_factor,
            "decoder_start_token_id": self.decoder_start_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": config_json.one_or_list(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
        }
        if self.scale_output != self.tie_embeddings:
            data["scale_decoder_outputs"] = self.scale_output
        return data
