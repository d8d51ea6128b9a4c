"""Models that begin as what a checkpoint has learned, changed: another head, more tokens."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from portlm import models
from portlm.errors import ConfigError
from portlm.models import Config
from portlm.train.config import PretrainConfig


def family_of(config: PretrainConfig) -> str:
    """Return the family of the model of a run: that of the checkpoint it begins with, or what the settings say."""
    return models.load_config(config.init).family if config.init else config.model.family


def with_ids(vocab_size: int, config: Config) -> Config:
    """Return the configuration with at least so many ids."""
    return dataclasses.replace(config, vocab_size=max(vocab_size, config.vocab_size))


def begun_from(folder: str | Path, change: Callable[[Config], Config]) -> tuple[Any, tuple[str, ...]]:
    """Return a model with the weights of a checkpoint and, where that has none, fresh ones.

    Args:
        folder: The checkpoint.
        change: Makes the configuration of the model from that of the checkpoint: heads, labels, a larger vocabulary, or
            one of a family whose parts begin as that of the checkpoint: its class says which as what (`adopted`).

    Returns:
        The model on the CPU, and the names of its parameters that are fresh, in whole or in their last rows.

    Raises:
        FormatError: The checkpoint is damaged, or no model portlm computes.
        ConfigError: The vocabulary would become smaller.
    """
    old = models.load_model(folder)
    config = change(old.config)
    if config.vocab_size < old.config.vocab_size:
        raise ConfigError(
            f"{folder} has {old.config.vocab_size} ids and its tokenizer {config.vocab_size}: they do not belong "
            "together"
        )
    model: Any = models.build(config)
    as_what: Callable[[str], str | None] = str if config.family == old.config.family else model.adopted
    known, fresh = dict(old.named_parameters()), []
    if getattr(old.config, "labels", ()) != getattr(
        config, "labels", ()
    ):  # a head for others says nothing of these
        known = {name: p for name, p in known.items() if not name.startswith("heads.")}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            learned = known.get(as_what(name) or "")
            if learned is not None:
                parameter[: len(learned)].copy_(learned)
            if learned is None or len(learned) < len(parameter):
                fresh.append(name)
    return model, tuple(fresh)
