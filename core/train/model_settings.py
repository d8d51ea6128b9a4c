"""``[model]`` of a training run: a family, and what that family's own configuration lets a run set."""

import dataclasses
import functools
from typing import Any, ClassVar, Literal

from portlm import settings
from portlm.errors import ConfigError
from portlm.models import FAMILIES, Config

# Stands for the tokenizer's vocabulary until there is a tokenizer: all else can be checked before.
_SOME_VOCABULARY = 256


class ModelSettings(settings.Variants):
    """The shape of the model. The vocabulary comes from the tokenizer.

    The class of an instance is made from ``SETTINGS`` of the family's configuration: those are its further fields.
    Naming a family's class imports PyTorch.

    Attributes:
        family: A key of :data:`portlm.models.FAMILIES`.
        context_length: Tokens that a row of a batch holds; every family has it.
    """

    tag: ClassVar[str] = "family"
    family: str
    context_length: int

    @classmethod
    def variants(cls) -> tuple[str, ...]:
        """Return the names of all families, the default first."""
        return tuple(FAMILIES)

    @classmethod
    def variant(cls, name: str) -> type["ModelSettings"]:
        """Return the class for a family."""
        return _variant(name)

    def config(self, vocab_size: int, eos_token_ids: tuple[int, ...] = ()) -> Config:
        """Return the family's configuration for this shape and a vocabulary.

        Raises:
            ConfigError: The family refuses a value. The message names it as a key of ``[model]``.
        """
        family = FAMILIES[self.family].config_class()
        values: dict[str, Any] = {name: getattr(self, name) for name in family.SETTINGS}
        try:
            return family.from_settings(vocab_size=vocab_size, eos_token_ids=eos_token_ids, **values)
        except ConfigError as error:
            name = str(error).partition(" ")[0]
            raise ConfigError(f"model{'.' if name in values else ': '}{error}") from error


@functools.cache
def _variant(name: str) -> type[ModelSettings]:
    fields: list[Any] = [("family", Literal[name], name)]
    for key, default in FAMILIES[name].config_class().SETTINGS.items():
        fields.append((key, type(default), default))
    return dataclasses.make_dataclass(
        f"ModelSettings[{name}]", fields, bases=(ModelSettings,), frozen=True,
        namespace={"__post_init__": lambda self: self.config(_SOME_VOCABULARY) and None},
    )  # fmt: skip


def default_model() -> ModelSettings:
    """Return the default family with its defaults."""
    return ModelSettings.variant(ModelSettings.variants()[0])()
