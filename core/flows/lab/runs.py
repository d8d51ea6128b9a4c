"""One seed of an experiment: what is to be done, what came of it, and the doing."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from typing import Any

import msgspec

from portlm.flows.lab.experiment import Experiment
from portlm.train.interrupt import InterruptedTraining


class Run(msgspec.Struct, frozen=True):
    """An experiment with one seed.

    Attributes:
        experiment: It, with its data.
        seed: The seed.
        digest: Of the source files that its figures come from, and of its data.
    """

    experiment: Experiment
    seed: int
    digest: str

    def __str__(self) -> str:
        return f"{self.experiment.name}, seed {self.seed}"


Tell = Callable[[Run, str], None]  # takes a run and a line about how far it has come


class Result(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one seed gave.

    Attributes:
        experiment: Its name.
        seed: The seed.
        digest: Of the source files the figures come from.
        seconds: Processor time.
        figures: What the experiment returned, or None if it failed.
        error: What went wrong, in one line, or None.
        trace: Where, for a person.
    """

    experiment: str
    seed: int
    digest: str
    seconds: float
    figures: dict[str, Any] | None = None
    error: str | None = None
    trace: str | None = None


def run_seed(run: Run, tell: Callable[[str], None]) -> Result:
    """Do it, whatever goes wrong; an interruption goes through."""
    begin = time.process_time()
    figures, error, trace = None, None, None
    try:
        figures = run.experiment.run(run.seed, tell)
        _check(run.experiment, figures)
    except InterruptedTraining:
        raise
    except Exception as problem:
        figures, error = None, f"{type(problem).__name__}: {problem}"
        trace = traceback.format_exc()
    seconds = round(time.process_time() - begin, 1)
    return Result(run.experiment.name, run.seed, run.digest, seconds, figures, error, trace)


def _check(it: Experiment, figures: dict[str, Any]) -> None:
    """Raise ValueError unless JSON can hold the figures and those of the bars are numbers among them."""
    json.dumps(figures, allow_nan=False)
    for bar in it.bars:
        value = figures.get(bar.figure)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"the bar {bar} needs a number {bar.figure}, and the experiment gives {value!r}")
