"""The configuration of T5; what it computes is in t5.py."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from portlm.errors import ConfigError
from portlm.models import config_json
from portlm.models.keyed_config import Key, KeyedConfig

Activation = Literal["relu", "gated-gelu"]
_ACTIVATIONS: dict[str, Activation] = {"relu": "relu", "gated-gelu": "gated-gelu"}


@dataclass(frozen=True)
class T5Config(KeyedConfig):
    """The shape of a T5 model.

    Dropout acts on embeddings, on what each sublayer adds to the residual stream, inside the MLP and on what a stack
    gives. Attention weights are not dropped: the fused attention never holds them in memory.

    Raises:
        ConfigError: A value out of range.
    """

    family: ClassVar[str] = "t5"
    ARCHITECTURE: ClassVar[str] = "T5ForConditionalGeneration"
    ENCODER_DECODER: ClassVar[bool] = True
    KEYS: ClassVar[Mapping[str, Key]] = {
        "vocab_size": Key("vocab_size"),
        "n_layer": Key("num_layers"),
        "activation": Key("feed_forward_proj", choices=_ACTIVATIONS),
        "tie_embeddings": Key("tie_word_embeddings"),
        "context_length": Key("n_positions"),
        "n_decoder_layer": Key(
            "num_decoder_layers", missing=lambda values: values["n_layer"], says="num_layers"
        ),
        "n_head": Key("num_heads"),
        "width": Key("d_model"),
        "head_dim": Key("d_kv", (1, config_json.MAX_WIDTH)),
        "hidden": Key("d_ff"),
        "buckets": Key("relative_attention_num_buckets", (4, 1 << 16)),
        "max_distance": Key("relative_attention_max_distance", (2, config_json.MAX_CONTEXT)),
        "scale_output": Key("scale_decoder_outputs", missing=lambda values: values["tie_embeddings"]),
        "dropout": Key("dropout_rate", missing=0.1),
        "rms_norm_eps": Key("layer_norm_epsilon"),
        "init_factor": Key("initializer_factor", (0.0, 1e3)),
    }
    HARMLESS: ClassVar[tuple[str, ...]] = ("classifier_dropout",)
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in _ACTIVATIONS:
            raise ConfigError(f"activation must be relu or gated-gelu, got {self.activation!r}")
        if self.buckets % 4 or self.max_distance <= self.buckets // 2:
            raise ConfigError(
                f"buckets must be a multiple of 4 and max_distance more than half of them, got {self.buckets} and "
                f"{self.max_distance}"
            )

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
    def check(cls, read: config_json.Reader, values: Mapping[str, Any]) -> None:
        """Look at what transformers writes of the activation a second time."""
        gated = values["activation"] == "gated-gelu"
        inner = "gelu_new" if gated else "relu"
        read.require("dense_act_fn", inner, says="the activation that feed_forward_proj names")
        read.require("is_gated_act", gated, says="whether feed_forward_proj is gated")

    @classmethod
    def own(cls, read: config_json.Reader, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the token that begins a target: what pads, where the file does not say."""
        start = read.token_id("decoder_start_token_id", values["vocab_size"])
        found = (start, values["pad_token_id"], 0)
        return {"decoder_start_token_id": next(token for token in found if token is not None)}

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json that transformers opens as T5ForConditionalGeneration."""
        data = super().to_hf() | {"decoder_start_token_id": self.decoder_start_token_id}
        if self.scale_output == self.tie_embeddings:
            del data["scale_decoder_outputs"]
        return data
