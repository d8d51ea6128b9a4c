"""The configuration that LLaMA and its descendants share; what they compute is in grouped.py.

A family's config.json is this and a few keys of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from portlm.errors import ConfigError
from portlm.models import config_json, config_rope
from portlm.models.rope import KINDS, Scaling

_BOUNDS = {
    "vocab_size": (1, config_json.MAX_VOCAB),
    "context_length": (1, config_json.MAX_CONTEXT),
    "n_layer": (1, config_json.MAX_LAYERS),
    "n_head": (1, config_json.MAX_HEADS),
    "n_kv_head": (1, config_json.MAX_HEADS),
    "width": (1, config_json.MAX_WIDTH),
    "hidden": (1, config_json.MAX_HIDDEN),
    "head_width": (0, config_json.MAX_WIDTH),
    "rope_theta": (1.0, 1e12),
    "init_std": (0.0, 1.0),
}


@dataclass(frozen=True)
class GroupedConfig:
    """The shape of such a decoder.

    A family adds the fields that only it has, and says in ``own`` and ``own_to_hf`` how config.json has them.

    Attributes:
        ARCHITECTURE: The name of transformers' class.
        NEEDS_KV_HEADS: Whether config.json must say num_key_value_heads, because transformers takes null for
            num_attention_heads, but a missing key for another number.
        THETA: The base of the rotary frequencies where config.json has none.
        SCALINGS: How rotary positions may be stretched.
        HARMLESS: Keys of config.json that change nothing in this family.
        ACTIVATIONS: The names that config.json may have for that of the perceptron.
        EPS: The key of the norms' epsilon, here and in config.json, which a family has as a field.

    Raises:
        ConfigError: A value out of range, heads that do not divide the width or each other, or an odd rotated part.
    """

    family: ClassVar[str]
    ARCHITECTURE: ClassVar[str]
    NEEDS_KV_HEADS: ClassVar[bool] = False
    THETA: ClassVar[float] = 10000.0
    SCALINGS: ClassVar[tuple[str, ...]] = tuple(KINDS)
    HARMLESS: ClassVar[tuple[str, ...]] = ()
    ACTIVATIONS: ClassVar[tuple[str, ...]] = ("silu", "swish")
    EPS: ClassVar[str] = "rms_norm_eps"
    # What [model] of a training run may set, and what it is for a small model on a CPU.
    SETTINGS: ClassVar[dict[str, Any]] = {
        "n_layer": 4,
        "n_head": 4,
        "n_kv_head": 0,  # 0 means n_head, fewer means grouped-query attention
        "width": 128,
        "hidden": 0,  # width of the feed-forward layer; 0 means 8/3 of the width
        "context_length": 64,  # tokens the model sees at once
        "rope_theta": 10000.0,
        "tie_embeddings": True,
    }

    vocab_size: int = 32000
    context_length: int = 2048
    n_layer: int = 32
    n_head: int = 32
    n_kv_head: int = 32  # fewer than n_head for grouped heads
    width: int = 4096
    hidden: int = 11008  # inner width of the perceptron
    head_width: int = 0  # D; 0 for width / n_head
    rope_theta: float = 10000.0
    rope_scaling: Scaling | None = None
    tie_embeddings: bool = False
    init_std: float = 0.02  # of every matrix
    bos_token_id: int | None = None  # this and the next two are not computed with, only kept with the model
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        config_json.check_bounds(self, {**_BOUNDS, self.EPS: (1e-12, 0.1)})
        if self.width % self.n_head:
            raise ConfigError(f"width {self.width} must be a multiple of n_head {self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ConfigError(f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")
        if self.rotary_dim % 2 or not self.rotary_dim:
            raise ConfigError(
                "rotary positions turn pairs: they need an even head width, or rotated part of it, got "
                f"{self.rotary_dim} with width {self.width} and n_head {self.n_head}"
            )
        if self.rope_scaling is not None and self.rope_scaling.kind not in self.SCALINGS:
            raise ConfigError(
                f"rope_scaling {self.rope_scaling.kind} is not one of {', '.join(self.SCALINGS)}"
            )
        for field, kind in self.__dataclass_fields__.items():
            if kind.type in (bool, "bool") and not isinstance(getattr(self, field), bool):
                raise ConfigError(f"{field} must be true or false, got {getattr(self, field)!r}")
        config_json.check_token_ids(self)
        if self.head_width * self.n_head == self.width:  # one spelling of one shape
            object.__setattr__(self, "head_width", 0)

    @property
    def head_dim(self) -> int:
        """D, the width of one head."""
        return self.head_width or self.width // self.n_head

    @property
    def rotary_dim(self) -> int:
        """R, how many elements of each head are rotated."""
        return self.head_dim

    @classmethod
    def from_settings(cls, **values: Any) -> Self:
        """Return the configuration for values of SETTINGS and of the vocabulary; 0 stands for what follows from others.

        Raises:
            ConfigError: A value out of range, by name.
        """
        # LLaMA's own rule: three matrices of 8/3 C hold as much as two of 4 C; a multiple of 32 suits kernels.
        derived = {"n_kv_head": values["n_head"], "hidden": -(-8 * values["width"] // 3 // 32) * 32}
        return cls(**values | {name: values[name] or value for name, value in derived.items()})

    @classmethod
    def tiny(cls) -> Self:
        """Return a configuration that tests compute in no time: a vocabulary of bytes, grouped heads, odd widths."""
        return cls(
            vocab_size=259,
            context_length=32,
            n_layer=2,
            n_head=4,
            n_kv_head=2,
            width=32,
            hidden=44,
            bos_token_id=1,
        )

    @classmethod
    def from_hf(cls, data: Mapping[str, Any] | config_json.Reader) -> Self:
        """Read the contents of a Hugging Face config.json, strictly.

        Raises:
            ConfigError: A key that is missing, unknown, out of range or asks for another model. It is named.
        """
        read = config_json.Reader.of(data)
        read.require("model_type", cls.family)
        defaults: dict[str, Any] = {name: field.default for name, field in cls.__dataclass_fields__.items()}
        vocab_size = read.integer("vocab_size", defaults["vocab_size"])
        context = read.integer("max_position_embeddings", defaults["context_length"])
        n_head = read.integer("num_attention_heads", defaults["n_head"])
        width = read.integer("hidden_size", defaults["width"])
        read.require("hidden_act", *cls.ACTIVATIONS)
        cls.check_windows(read, context)
        read.training("attention_dropout", 0.0)
        heads, says = (None, "") if cls.NEEDS_KV_HEADS else (n_head, "num_attention_heads")
        values: dict[str, Any] = {
            "vocab_size": vocab_size,
            "context_length": context,
            "n_layer": read.integer("num_hidden_layers", defaults["n_layer"]),
            "n_head": n_head,
            "n_kv_head": read.integer("num_key_value_heads", heads, says=says),
            "width": width,
            "hidden": read.integer("intermediate_size", defaults["hidden"]),
            cls.EPS: read.number(cls.EPS, defaults[cls.EPS]),
            "tie_embeddings": read.boolean("tie_word_embeddings", defaults["tie_embeddings"]),
            "init_std": read.number("initializer_range", 0.02),
            "bos_token_id": read.token_id("bos_token_id", vocab_size),
            "eos_token_ids": read.token_ids("eos_token_id", vocab_size),
            "pad_token_id": read.token_id("pad_token_id", vocab_size),
        }
        values |= cls.own(read, values)
        config = cls(**values)
        read.finish(*cls.HARMLESS)
        return config

    @classmethod
    def check_windows(cls, read: config_json.Reader, context_length: int) -> None:
        """Accept only models in which every position may look back to the first."""
        read.require_full_attention(context_length)

    @classmethod
    def own(cls, read: config_json.Reader, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields that a family reads in its own way, here those of heads that are rotated as a whole.

        Args:
            read: The config.json.
            values: The fields that were read so far.
        """
        return {"head_width": head_width(read, values), **rotation(cls, read, values)}

    def own_to_hf(self) -> dict[str, Any]:
        """Return the keys of config.json for what ``own`` reads."""
        return {"head_dim": self.head_dim, **config_rope.to_hf(self.rope_theta, self.rope_scaling)}

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json that transformers opens as ARCHITECTURE."""
        return {
            "architectures": [self.ARCHITECTURE],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.context_length,
            "num_hidden_layers": self.n_layer,
            "num_attention_heads": self.n_head,
            "num_key_value_heads": self.n_kv_head,
            "hidden_size": self.width,
            "intermediate_size": self.hidden,
            "hidden_act": self.ACTIVATIONS[0],
            self.EPS: getattr(self, self.EPS),
            "initializer_range": self.init_std,
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": config_json.one_or_list(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
            **self.own_to_hf(),
        }


def head_width(read: config_json.Reader, values: Mapping[str, Any], default: int = 0) -> int:
    """Return D from head_dim, ``default`` where it is missing: 0 for width / n_head."""
    return read.integer(
        "head_dim", default, says=str(default) if default else "hidden_size / num_attention_heads"
    )


def rotation(cls: type[GroupedConfig], read: config_json.Reader, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of rotary positions on whole heads."""
    found = config_rope.rotary(read, values["context_length"], default_base=cls.THETA, kinds=cls.SCALINGS)
    read.require("partial_rotary_factor", 1, 1.0, says="1")
    if found.share != 1:
        raise ConfigError(
            f"partial_rotary_factor = {found.share:g} is not supported: only 1 gives the model portlm computes"
        )
    return {"rope_theta": found.theta, "rope_scaling": found.scaling}
