"""Pretraining: learn from plain text, by the objective that the settings name."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from portlm.train.config import PretrainConfig
from portlm.train.corpus import open_corpus
from portlm.train.loop import Start, train
from portlm.train.objectives import Objective, objective_class


@dataclass(frozen=True)
class PretrainResult:
    """What a finished run has to show.

    Attributes:
        checkpoint: The trained model, ready for export.
        run: Everything else.
        steps: Optimiser steps taken, over all sessions.
        tokens: Tokens learned from, counted as often as they were seen.
        parameters: Size of the model.
        loss: Held-out loss in nats per predicted token.
        bits_per_byte: Held-out loss in bits per byte of text; None where not all of the text is predicted.
        seconds: Time spent training, over all sessions, without evaluation and saving.
        tokens_per_second: Over that time.
    """

    checkpoint: Path
    run: Path
    steps: int
    tokens: int
    parameters: int
    loss: float
    bits_per_byte: float | None
    seconds: float
    tokens_per_second: float


def make_objective(config: PretrainConfig, start: Start) -> Objective:
    """Read the data of a run and return what is learned from them."""
    made = objective_class(config.objective)
    read = getattr(made, "open_corpus", open_corpus)
    data = config.data
    if config.init:
        data = dataclasses.replace(data, tokenizer=str(Path(config.init) / "tokenizer.json"))
    corpus = read(data, start.folder.data, fresh=start.fresh, note=start.note)
    objective: Objective = made(config, corpus, start.device)
    return objective


def pretrain(
    config: PretrainConfig,
    out: str | Path,
    *,
    resume: str = "none",
    quiet: bool = False,
    plot: bool = True,
) -> PretrainResult:
    """Train a model in the folder ``out`` and return where it is and how good it became.

    Args:
        config: Everything that decides the run.
        out: The run folder (:mod:`portlm.train.run_folder` draws it).
        resume: ``none``, ``auto`` or the path of a checkpoint.
        quiet: Report nothing but warnings on stderr.
        plot: Draw the loss curve when training ends or is interrupted.

    Raises:
        InterruptedTraining: A signal came; the state is saved.
        DivergenceError: The gradient or loss is not finite; the last good checkpoint is kept.
        StorageError: The disk is full or refuses; earlier checkpoints are kept.
        PortlmError: Whatever else is wrong with the text, the settings or the folder.
    """
    done = train(config, out, partial(make_objective, config), resume=resume, quiet=quiet, plot=plot)
    return PretrainResult(
        checkpoint=done.checkpoint,
        run=done.run,
        steps=done.steps,
        tokens=done.tokens,
        parameters=done.parameters,
        loss=done.evaluation["loss"],
        bits_per_byte=done.evaluation.get("bits_per_byte"),
        seconds=done.seconds,
        tokens_per_second=done.tokens / done.seconds if done.seconds else 0.0,
    )
