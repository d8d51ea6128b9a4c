"""Fine-tuning: a pretrained model, or a fresh one, learns which label a text has, or what in it answers a question."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from portlm.data.labelled import read_labelled, steps_per_epoch
from portlm.data.questions import read_questions
from portlm.errors import ConfigError, UsageError
from portlm.train.config import FLOORED, PretrainConfig
from portlm.train.loop import train
from portlm.train.pretrain import make_objective

# Radford et al. 2018, section 4.1 and the released code: three epochs of 32 texts, linear decay after 0.2 % warm-up.
PRESET: dict[str, Any] = {
    "objective": "classify",
    "data": {"batch_size": 32},
    "optimizer": {"lr": 6.25e-5, "beta2": 0.999, "weight_decay": 0.01},
    "schedule": {"shape": "linear", "warmup": 0.002, "min_lr": 0.0},
}
SCORES = {"classify": "accuracy", "answer": "exact"}  # objective -> the share in its evaluation


def preset_for(shape: str | None) -> dict[str, Any]:
    """Return PRESET for a shape of the schedule, None for its own; not every one has a floor of the rate to be set."""
    if shape is None or shape in FLOORED:
        return PRESET
    rest = {key: value for key, value in PRESET["schedule"].items() if key != "min_lr"}
    return PRESET | {"schedule": rest}


@dataclass(frozen=True)
class FinetuneResult:
    """What a finished run has to show.

    Attributes:
        checkpoint: The trained model, ready for export and for `portlm classify`.
        run: Everything else.
        steps: Optimiser steps taken, over all sessions.
        parameters: Size of the model.
        trained: Of these, how many were trained.
        loss: On held-out texts, in nats per label, or per end of an answer.
        accuracy: Share of the held-out labels that are right, or of the answers that are found without a fault.
        seconds: Time spent training, over all sessions, without evaluation and saving.
    """

    checkpoint: Path
    run: Path
    steps: int
    parameters: int
    trained: int
    loss: float
    accuracy: float
    seconds: float


def in_epochs(config: PretrainConfig, epochs: float, gradual: bool = False) -> PretrainConfig:
    """Return settings whose steps, and steps between evaluations and checkpoints, are counted in epochs of the data.

    Args:
        config: Of an objective in SCORES, with the files of its data.
        epochs: How often every text is learned from.
        gradual: Let one more layer learn in each epoch, from the top.

    Raises:
        UsageError: There is no file.
        FormatError: A file is missing or holds something else.
        ConfigError: The number of epochs is none.
    """
    if not 0 < epochs <= 10_000:
        raise ConfigError(f"epochs must be above 0 and at most 10000, got {epochs!r}")
    data = config.data
    if not data.texts:
        raise UsageError("there is nothing to learn from: name at least one file")
    read = read_questions if config.objective == "answer" else read_labelled
    count = sum(len(read(path)) for path in data.texts)
    if not data.held_out:
        count -= max(1, round(data.validation_fraction * count))
    each = max(1, steps_per_epoch(count, data.batch_size * data.accumulate))
    return dataclasses.replace(
        config,
        steps=max(1, round(epochs * each)),
        evaluation=dataclasses.replace(config.evaluation, interval=each),
        checkpoint=dataclasses.replace(config.checkpoint, interval=each),
        layers=dataclasses.replace(config.layers, unfreeze=each) if gradual else config.layers,
    )


def finetune(
    config: PretrainConfig,
    out: str | Path,
    *,
    resume: str = "none",
    quiet: bool = False,
    plot: bool = True,
) -> FinetuneResult:
    """Train a model with a head in the folder ``out`` and return where it is and how good it became.

    Args:
        config: Everything that decides the run; its objective is one of SCORES.
        out: The run folder (:mod:`portlm.train.run_folder` draws it).
        resume: ``none``, ``auto`` or the path of a checkpoint.
        quiet: Report nothing but warnings on stderr.
        plot: Draw the loss curve when training ends or is interrupted.

    Raises:
        InterruptedTraining: A signal came; the state is saved.
        DivergenceError: The gradient or loss is not finite; the last good checkpoint is kept.
        StorageError: The disk is full or refuses; earlier checkpoints are kept.
        PortlmError: Whatever else is wrong with the texts, the settings or the folder.
    """
    if config.objective not in SCORES:
        raise ConfigError(f"fine-tuning has the objective {' or '.join(SCORES)}, got {config.objective}")
    done = train(config, out, partial(make_objective, config), resume=resume, quiet=quiet, plot=plot)
    return FinetuneResult(
        checkpoint=done.checkpoint,
        run=done.run,
        steps=done.steps,
        parameters=done.parameters,
        trained=done.trained,
        loss=done.evaluation["loss"],
        accuracy=done.evaluation[SCORES[config.objective]],
        seconds=done.seconds,
    )
