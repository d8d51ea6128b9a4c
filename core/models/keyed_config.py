"""A configuration that says once how config.json has each of its fields, and is read, checked and written by that.

    KEYS = {"width": Key("n_embd", also="hidden_size"), "cell": Key("cell", choices=CELLS), ...}

The type of a field says how it is read, its default what a missing key stands for, and its name, in most families, the
bounds that a number has. What does not follow from fields, such as keys that must have one value, is in FIXED or in
`check`. Whatever nobody asked for is refused, as by all readers (config_json.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

from portlm.errors import ConfigError
from portlm.models import config_json

# The bounds of a field that every family means the same by.
BOUNDS: dict[str, tuple[float, float]] = {
    "vocab_size": (1, config_json.MAX_VOCAB),
    "context_length": (1, config_json.MAX_CONTEXT),
    "n_layer": (1, config_json.MAX_LAYERS),
    "n_decoder_layer": (1, config_json.MAX_LAYERS),
    "n_head": (1, config_json.MAX_HEADS),
    "width": (1, config_json.MAX_WIDTH),
    "hidden": (1, config_json.MAX_HIDDEN),
    "dropout": (0.0, 0.99),
    "layer_norm_eps": (1e-12, 0.1),
    "rms_norm_eps": (1e-12, 0.1),
    "init_std": (0.0, 1.0),
    "init_range": (0.0, 1.0),
}


class Key(NamedTuple):
    """How config.json has a field.

    Attributes:
        name: The key.
        bounds: The lowest and the highest number; None for those in BOUNDS.
        also: Another name of the key.
        missing: What a missing key stands for, as it would be written, or a function of the fields before it; None for
            the default of the field.
        choices: The names that the file may have, and what each stands for. The first that stands for a value is
            written for it.
        read: Reads the field in another way, from the file and the fields before it.
        write: Makes of the field what is written.
        says: What a missing key stands for, for people.
    """

    name: str
    bounds: tuple[float, float] | None = None
    also: str = ""
    missing: Any = None
    choices: Mapping[str, Any] | None = None
    read: Callable[[config_json.Reader, Mapping[str, Any]], Any] | None = None
    write: Callable[[Any], Any] | None = None
    says: str = ""

    def written(self, value: Any) -> Any:
        """Return what config.json has for a value of the field."""
        if self.choices is not None:
            return next(name for name, meant in self.choices.items() if meant == value)
        return value if self.write is None else self.write(value)


@dataclass(frozen=True, kw_only=True)
class KeyedConfig:
    """The base of such configurations.

    Attributes:
        ARCHITECTURE: The class that config.json names, of transformers where it has the family.
        KEYS: How config.json has each field, in the order in which they are read.
        FIXED: Further keys, and the value that they must have and are written with.
        HARMLESS: Keys that change nothing in this family.
        ENCODER_DECODER: Whether it has an encoder and a decoder, and so a field ``decoder_start_token_id``.

    Raises:
        ConfigError: A number out of its bounds, a switch that is none, or a token outside the vocabulary.
    """

    family: ClassVar[str]
    ARCHITECTURE: ClassVar[str]
    KEYS: ClassVar[Mapping[str, Key]]
    FIXED: ClassVar[Mapping[str, Any]] = {}
    HARMLESS: ClassVar[tuple[str, ...]] = ()
    ENCODER_DECODER: ClassVar[bool] = False

    bos_token_id: int | None = None  # this and the next two are not computed with, only kept with the model
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        bounds = {
            field: key.bounds or BOUNDS[field]
            for field, key in self.KEYS.items()
            if self._type(field) in (int, float)
        }
        config_json.check_bounds(self, bounds)
        for field in self.KEYS:
            if self._type(field) is bool and type(getattr(self, field)) is not bool:
                raise ConfigError(f"{field} must be true or false, got {getattr(self, field)!r}")
        config_json.check_token_ids(self, *["decoder_start_token_id"] * self.ENCODER_DECODER)

    @classmethod
    def _type(cls, field: str) -> Any:
        return cls.__dataclass_fields__[field].type

    @classmethod
    def from_settings(cls, **values: Any) -> Self:
        """Return the configuration for values of SETTINGS and of the vocabulary.

        Raises:
            ConfigError: A value out of range, by name.
        """
        return cls(**values)

    @classmethod
    def from_hf(cls, data: Mapping[str, Any] | config_json.Reader) -> Self:
        """Read the contents of a config.json, strictly.

        Raises:
            ConfigError: A key that is missing, unknown, out of range or asks for another model. It is named.
        """
        read = config_json.Reader.of(data)
        read.require("model_type", cls.family)
        values: dict[str, Any] = {}
        for field, key in cls.KEYS.items():
            values[field] = cls._read(read, field, key, values)
        for field, ids in (
            ("bos_token_id", read.token_id),
            ("eos_token_ids", read.token_ids),
            ("pad_token_id", read.token_id),
        ):
            values[field] = ids(field.removesuffix("s"), values["vocab_size"])
        cls.check(read, values)
        config = cls(**values | cls.own(read, values))
        read.finish(*cls.HARMLESS, encoder_decoder=cls.ENCODER_DECODER)
        return config

    @classmethod
    def _read(cls, read: config_json.Reader, field: str, key: Key, values: Mapping[str, Any]) -> Any:
        if key.read is not None:
            return key.read(read, values)
        missing = key.missing
        if missing is None:
            missing = key.written(cls.__dataclass_fields__[field].default)
        elif callable(missing):
            missing = missing(values)
        if key.choices is not None:
            return read.choice(key.name, missing, key.choices)
        kind = cls._type(field)
        if kind is int:
            return read.integer(key.name, missing, also=key.also, says=key.says)
        return read.boolean(key.name, missing) if kind is bool else read.number(key.name, missing)

    @classmethod
    def check(cls, read: config_json.Reader, values: Mapping[str, Any]) -> None:
        """Look at the keys that are no field: those of FIXED, and what a family adds.

        Args:
            read: The config.json.
            values: The fields that were read.

        Raises:
            ConfigError: A key that asks for another model. It is named.
        """
        for key, value in cls.FIXED.items():
            read.require(key, value)

    @classmethod
    def own(cls, read: config_json.Reader, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields that a family reads in its own way.

        Args:
            read: The config.json.
            values: The fields that were read.
        """
        return {}

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json."""
        return {
            "architectures": [self.ARCHITECTURE],
            "model_type": self.family,
            **({"is_encoder_decoder": True} if self.ENCODER_DECODER else {}),
            **{key.name: key.written(getattr(self, field)) for field, key in self.KEYS.items()},
            **self.FIXED,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": config_json.one_or_list(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
        }
