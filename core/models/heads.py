"""Decoders with a head that says something of a text, beside the language model or in its place.

Radford et al., "Improving Language Understanding by Generative Pre-Training", 2018: a linear map of the last block's
output at the last token, which alone has seen the whole text. In transformers' words, by the ends of class names:

- ``...ForSequenceClassification``: a head "classify", one number for each label. Files have no output matrix of the
  language model; where that is the token table, the model still predicts tokens
- ``...DoubleHeadsModel``: the language model and a head "choose", one number for a text. Of several texts that answer
  one question, the softmax over their numbers says which is right

Every decoder can have them: the class of its configuration is extended here, and core/models/causal.py has the modules.
An encoder's heads are among the fields of its own configuration.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

from portlm.errors import ConfigError
from portlm.files import shown
from portlm.labels import check_problem
from portlm.models import config_json
from portlm.models.encoder_config import labels_from_hf, labels_to_hf

CLASSIFY, CHOOSE = "classify", "choose"


class Kind(NamedTuple):
    """A head of decoders.

    Attributes:
        ending: Of transformers' classes that have it.
        file_name: Of its map in a file.
        bias: Whether that has one.
        generates: Whether the language model's output matrix is beside it.
    """

    ending: str
    file_name: str
    bias: bool
    generates: bool


KINDS = {
    CLASSIFY: Kind("ForSequenceClassification", "score", bias=False, generates=False),
    CHOOSE: Kind("DoubleHeadsModel", "multiple_choice_head.summary", bias=True, generates=True),
}
_GENERATES = ("LMHeadModel", "ForCausalLM")  # ends of the classes without a head
# Of a DoubleHeadsModel: what transformers does before and behind the map, by the values that do nothing.
_SUMMARY = {
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "summary_activation": None,
    "summary_proj_to_labels": True,
}


class Headed:
    """What a decoder's configuration with a head has besides its own fields. Its class is made by :func:`headed`.

    Attributes:
        PLAIN: The family's own class.
        heads: Of KINDS, one or none.
        labels: Names of what the head "classify" tells apart; () for any other.
        problem: One of portlm.labels.PROBLEMS, or None for what follows from the number of labels.
    """

    PLAIN: ClassVar[Any]
    heads: tuple[str, ...]
    labels: tuple[str, ...]
    problem: str | None
    family: ClassVar[str]
    vocab_size: int

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        if len(self.heads) > 1 or not {*KINDS}.issuperset(self.heads):
            raise ConfigError(
                f"heads of {self.family} are one of {', '.join(KINDS)}, got {shown(self.heads)}"
            )
        if bool(self.labels) != (CLASSIFY in self.heads):
            raise ConfigError(f"labels belong to the head {CLASSIFY}, which has some, and to no other")
        if len(self.labels) > self.vocab_size:
            raise ConfigError(
                f"{len(self.labels)} labels are more than the {self.vocab_size} ids of the model"
            )
        check_problem(self.problem)

    @property
    def architecture(self) -> str:
        """The class that transformers opens the checkpoint as."""
        (named,) = super().to_hf()["architectures"]  # type: ignore[misc]
        if not self.heads:
            return str(named)
        stem = next((named.removesuffix(end) for end in _GENERATES if named.endswith(end)), named)
        return f"{stem}{KINDS[self.heads[0]].ending}"

    @classmethod
    def from_hf(cls, data: Mapping[str, Any] | config_json.Reader) -> Self:
        """Read the contents of a Hugging Face config.json, strictly.

        Raises:
            ConfigError: A key that is missing, unknown, out of range or asks for another model. It is named.
        """
        read = config_json.Reader.of(data)
        heads = heads_of(read)
        if CHOOSE in heads:
            for key, value in _SUMMARY.items():
                read.require(key, *(() if value is None else (value,)))
        labels, problem = labels_from_hf(read, heads)
        return cls._of(cls.PLAIN.from_hf(read), heads, labels, problem)

    @classmethod
    def _of(cls, plain: Any, heads: tuple[str, ...], labels: tuple[str, ...], problem: str | None) -> Self:
        own = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
        return cls(**own | {"heads": heads, "labels": labels, "problem": problem})

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json that transformers opens as the class with the same head."""
        data: dict[str, Any] = super().to_hf()  # type: ignore[misc]
        data["architectures"] = [self.architecture]
        if CHOOSE in self.heads:
            data |= _SUMMARY | {"num_labels": 1}
        return data | labels_to_hf(self.labels, self.problem)


@functools.cache
def headed(plain: Any) -> Any:
    """Return the class of a decoder's configuration with heads, given that without."""
    fields: list[Any] = [
        ("heads", tuple[str, ...], dataclasses.field(default=())),
        ("labels", tuple[str, ...], dataclasses.field(default=())),
        ("problem", str | None, dataclasses.field(default=None)),
    ]
    return dataclasses.make_dataclass(
        f"Headed{plain.__name__}", fields, bases=(Headed, plain), frozen=True, namespace={"PLAIN": plain}
    )


def heads_of(read: config_json.Reader) -> tuple[str, ...]:
    """Return the heads of a decoder whose config.json names a class with some, () for any other."""
    if not read.holds("architectures"):
        return ()
    takes = ", ".join(f"...{kind.ending}" for kind in KINDS.values())
    named = read.raw("architectures", f"one class, or any: {takes} have a head")
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        return ()
    return tuple(name for name, kind in KINDS.items() if named[0].endswith(kind.ending))


def with_labels(config: Any, labels: Sequence[str], problem: str | None = None) -> Any:
    """Return the configuration of the same model with a head "classify" for these labels, and no other head.

    Args:
        config: Of an encoder or a decoder.
        labels: Their names, at least two for a problem of one label among several.
        problem: One of portlm.labels.PROBLEMS, or None for what follows from their number.

    Raises:
        ConfigError: The family has no head for labels.
    """
    from portlm.models import FAMILIES

    kind, labels = FAMILIES[config.family].kind, tuple(labels)
    if kind == "encoder" and (CLASSIFY,) in config.ARCHITECTURES.values():
        return dataclasses.replace(config, heads=(CLASSIFY,), labels=labels, problem=problem)
    if kind != "decoder":
        raise ConfigError(
            f"a {config.family} has no head for labels: encoders and decoders have, and it is of kind {kind}"
        )
    plain: Any = config.PLAIN if isinstance(config, Headed) else type(config)
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(plain)}
    return headed(plain)(**own, heads=(CLASSIFY,), labels=labels, problem=problem)
