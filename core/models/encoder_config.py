"""What the configurations of encoders share: sizes, which heads a checkpoint has, and what its labels are called.

A checkpoint is an encoder and the heads that `architectures` of its config.json names. A head that says one of several
labels has their names in `id2label`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from portlm.errors import ConfigError
from portlm.files import shown
from portlm.labels import MAX_LABELS, PROBLEMS, check_problem, label_names
from portlm.models import config_json

LABELLED = ("classify", "tag")  # heads whose answers have names
NO_NAMES = ("LABEL_0", "LABEL_1")  # transformers' where nothing names them

_BOUNDS = {
    "vocab_size": (1, config_json.MAX_VOCAB),
    "context_length": (1, config_json.MAX_CONTEXT),
    "n_layer": (1, config_json.MAX_LAYERS),
    "n_head": (1, config_json.MAX_HEADS),
    "width": (1, config_json.MAX_WIDTH),
    "hidden": (1, config_json.MAX_HIDDEN),
    "segments": (0, 1024),
    "dropout": (0.0, 0.99),
    "layer_norm_eps": (1e-12, 0.1),
    "init_std": (0.0, 1.0),
}


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder, its heads and its labels. A family names its architectures.

    Dropout acts on the embeddings and on what each sublayer adds to the residual stream, not on attention weights.

    Attributes:
        ARCHITECTURES: transformers' class -> the heads that its checkpoints have. The first stands for a missing key.

    Raises:
        ConfigError: A value out of range, a width that the heads do not divide, or labels without a head for them.
    """

    family: ClassVar[str]
    ARCHITECTURES: ClassVar[Mapping[str, tuple[str, ...]]]
    # What [model] of a training run may set, and what it is for a small model on a CPU.
    SETTINGS: ClassVar[dict[str, Any]] = {
        "n_layer": 4,
        "n_head": 4,
        "width": 128,
        "context_length": 64,  # tokens the model sees at once
        "dropout": 0.0,
    }

    vocab_size: int = 30522
    context_length: int = 512  # longest sequence
    n_layer: int = 12
    n_head: int = 12
    width: int = 768
    hidden: int = 3072  # the inner width of the MLP
    segments: int = 2  # kinds of tokens that an embedding tells apart; 0 for none
    dropout: float = 0.0
    layer_norm_eps: float = 1e-12
    gelu: config_json.Gelu = "none"
    init_std: float = 0.02
    heads: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()  # of the heads in LABELLED
    problem: str | None = None  # one of PROBLEMS, or what follows from the number of labels
    bos_token_id: int | None = None  # this and the next two are not computed with, only kept with the model
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        config_json.check_bounds(self, _BOUNDS)
        if self.width % self.n_head:
            raise ConfigError(f"width {self.width} must be a multiple of n_head {self.n_head}")
        if self.gelu not in ("tanh", "none"):
            raise ConfigError(f"gelu must be tanh or none, got {self.gelu!r}")
        if self.heads not in self.ARCHITECTURES.values():
            known = "; ".join(", ".join(heads) or "none" for heads in self.ARCHITECTURES.values())
            raise ConfigError(f"heads of {self.family} are one of: {known}; got {shown(self.heads)}")
        if bool(self.labels) != bool({*self.heads} & {*LABELLED}):
            raise ConfigError(
                f"labels belong to the heads {' and '.join(LABELLED)}, and each of these has some"
            )
        if self.problem not in (None, *PROBLEMS):
            raise ConfigError(f"problem must be one of {', '.join(PROBLEMS)}, got {shown(self.problem)}")
        config_json.check_token_ids(self)

    @property
    def head_dim(self) -> int:
        """D, the width of one attention head."""
        return self.width // self.n_head

    @property
    def first_position(self) -> int:
        """The row of the table of positions that the first token has."""
        return 0

    @classmethod
    def from_settings(cls, **values: Any) -> Self:
        """Return the configuration of a model to pretrain, for values of SETTINGS and of the vocabulary.

        Raises:
            ConfigError: A value out of range, by name.
        """
        return cls(hidden=4 * values["width"], heads=("masked_lm",), **values)

    @classmethod
    def tiny(cls) -> Self:
        """Return a configuration that tests compute in no time: a vocabulary of bytes, few and odd widths."""
        return cls(
            vocab_size=262, context_length=32, n_layer=2, n_head=4, width=24, hidden=44, heads=("masked_lm",)
        )

    @property
    def architecture(self) -> str:
        """The class that transformers opens the checkpoint as."""
        return next(name for name, heads in self.ARCHITECTURES.items() if heads == self.heads)

    def common_to_hf(self) -> dict[str, Any]:
        """Return what config.json of every encoder says in the same words."""
        data: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.context_length + self.first_position,
            "initializer_range": self.init_std,
            "tie_word_embeddings": True,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": config_json.one_or_list(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
        }
        return data | labels_to_hf(self.labels, self.problem)

    @classmethod
    def common_from_hf(cls, read: config_json.Reader) -> dict[str, Any]:
        """Read what config.json of every encoder says in the same words, as arguments of the class.

        Raises:
            ConfigError: A value that portlm does not compute. It is named.
        """
        read.require("model_type", cls.family)
        read.require("is_decoder", False)
        read.require("tie_word_embeddings", True)
        vocab_size = read.integer("vocab_size", cls.vocab_size)
        heads = _heads(read, cls.ARCHITECTURES)
        labels, problem = labels_from_hf(read, heads)
        return {
            "vocab_size": vocab_size,
            "init_std": read.number("initializer_range", 0.02),
            "heads": heads,
            "labels": labels,
            "problem": problem,
            "bos_token_id": read.token_id("bos_token_id", vocab_size),
            "eos_token_ids": read.token_ids("eos_token_id", vocab_size),
            "pad_token_id": read.token_id("pad_token_id", vocab_size),
        }


def _heads(read: config_json.Reader, architectures: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return the heads that a config.json names by its class."""
    named = read.raw("architectures", "one of " + ", ".join(f"[{name}]" for name in architectures))
    if named is None:
        return next(iter(architectures.values()))
    name = named[0] if isinstance(named, list) and len(named) == 1 else None
    if not isinstance(name, str) or name not in architectures:
        raise ConfigError(
            f"architectures = {shown(named)} is not supported: portlm computes {', '.join(architectures)}"
        )
    return architectures[name]


def labels_to_hf(labels: tuple[str, ...], problem: str | None) -> dict[str, Any]:
    """Return what config.json says of labels: their names, and how the numbers of their head are meant."""
    data: dict[str, Any] = {}
    if labels:
        data["id2label"] = {str(i): name for i, name in enumerate(labels)}
        data["label2id"] = {name: i for i, name in enumerate(labels)}
    if problem is not None:
        data["problem_type"] = problem
    return data


def labels_from_hf(read: config_json.Reader, heads: tuple[str, ...]) -> tuple[tuple[str, ...], str | None]:
    """Return the names of labels and what kind of problem they are for; (), None for heads that have none.

    Raises:
        ConfigError: The names are none, or not as many as is said beside them.
    """
    named = read.raw("id2label", "a name for each of 0, 1, ..., LABEL_0 and LABEL_1 if missing")
    count = read.raw("num_labels", "as many as id2label has, if both are there")
    problem = check_problem(read.raw("problem_type", "null, " + ", ".join(PROBLEMS)))
    if count is not None and (type(count) is not int or not 1 <= count <= MAX_LABELS):
        raise ConfigError(f"num_labels must be an integer from 1 to {MAX_LABELS}, got {shown(count)}")
    names = NO_NAMES if count is None else tuple(f"LABEL_{i}" for i in range(count))
    if named is not None:
        names = label_names(named)
        if count not in (None, len(names)):
            raise ConfigError(f"num_labels is {count}, but id2label names {len(names)}: remove the wrong one")
    if "span" in heads and len(names) != 2:
        raise ConfigError(
            f"a head for spans has a start and an end, and id2label or num_labels says {len(names)}: portlm computes 2"
        )
    return (names, problem) if {*heads} & {*LABELLED} else ((), None)
