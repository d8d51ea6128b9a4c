"""Runs experiments, one seed after the other, and keeps each result: what was interrupted goes on where it stopped.

OUT/NAME/SEED.json holds the figures of one seed, or why there are none, beside a digest of the source they come from.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from portlm.errors import FormatError, UsageError
from portlm.files import read_json, write_atomic
from portlm.flows.lab.experiment import Bar, DataExperiment, Experiment
from portlm.train.interrupt import InterruptedTraining

LAB = "portlm.flows.lab"


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


class Outcome(msgspec.Struct, frozen=True):
    """An experiment's results over its seeds.

    Attributes:
        experiment: It.
        results: In the order of the seeds.
    """

    experiment: Experiment
    results: list[Result]

    @property
    def measured(self) -> dict[int, dict[str, Any]]:
        """Figures by seed, of those that did not fail."""
        return {result.seed: result.figures for result in self.results if result.figures is not None}

    @property
    def failed(self) -> dict[int, str]:
        """Errors by seed."""
        return {result.seed: result.error for result in self.results if result.error is not None}

    def values(self, bar: Bar) -> list[float]:
        """Return the figure of a bar for every seed that has one."""
        return [figures[bar.figure] for figures in self.measured.values()]

    def met(self, bar: Bar) -> bool:
        """Say whether every seed has the figure and meets the bar."""
        return not self.failed and all(bar.met(value) for value in self.values(bar))

    def as_dict(self) -> dict[str, Any]:
        """Return what --json prints."""
        return {
            "name": self.experiment.name,
            "shows": self.experiment.shows,
            "source": self.experiment.source,
            "bars": [
                {**_bar(bar), "values": self.values(bar), "met": self.met(bar)}
                for bar in self.experiment.bars
            ],
            "seconds": sum(result.seconds for result in self.results),
            "results": {str(seed): figures for seed, figures in self.measured.items()},
            "failed": {str(seed): error for seed, error in self.failed.items()},
        }


def _bar(bar: Bar) -> dict[str, Any]:
    return {"figure": bar.figure, "relation": bar.relation, "bound": bar.bound}


class Progress(Protocol):
    """Takes how far the lab has come."""

    def __call__(self, done: int, total: int, text: str, /) -> None:
        """Show that ``done`` of ``total`` runs are behind, and what is going on."""


def run_lab(
    experiments: Sequence[Experiment],
    out: Path,
    *,
    seeds: int | None = None,
    threads: int = 1,
    anew: bool = False,
    data: Path | None = None,
    progress: Progress = lambda done, total, text: None,
) -> Iterator[Outcome]:
    """Run experiments, and yield each as soon as its seeds are done.

    A result in ``out`` is taken as it is if it comes from the same source and did not fail. A seed that fails is
    recorded, and the others go on.

    Args:
        experiments: Which, in order.
        out: The folder of the results.
        seeds: Only the first so many of each experiment; None for all.
        threads: Of PyTorch and of portlm's kernels. The small steps of recurrent models get slower by more than one.
        anew: Run what is there, too.
        data: The folder of what an experiment needs that brings no data of its own.
        progress: Takes how far it has come.

    Raises:
        UsageError: A number below 1, or an experiment needs data and there are none, or others.
        InterruptedTraining: A signal came; what was trained is kept.
        StorageError: A result cannot be written.
    """
    import torch

    for name, number in (("--seeds", seeds), ("--threads", threads)):
        if number is not None and number < 1:
            raise UsageError(f"{name} must be at least 1, got {number}")
    torch.set_num_threads(threads)
    runs = sum(len(it.seeds[:seeds]) for it in experiments)
    done = 0
    for chosen in experiments:
        it = chosen
        digest, results = source_digest(type(it)), []
        if isinstance(it, DataExperiment):
            it = _with_data(it, data, out / it.name)
            digest = hashlib.sha256(f"{digest} {it.digest}".encode()).hexdigest()
        for seed in it.seeds[:seeds]:
            path = out / it.name / f"{seed}.json"
            result = None if anew else _kept(path, digest)
            if result is None:
                told = _Told(progress, done, runs, f"{it.name}, seed {seed}")
                told("begins")
                result = run_seed(it, seed, digest, told)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, json.dumps(msgspec.to_builtins(result), indent=2) + "\n")
            done += 1
            what = f"failed: {result.error}" if result.error else f"{result.seconds:.0f} s of processor time"
            progress(done, runs, f"{it.name}, seed {seed}: {what}")
            results.append(result)
        yield Outcome(it, results)


def _with_data(it: DataExperiment, data: Path | None, work: Path) -> DataExperiment:
    if data is None:
        raise UsageError(f"{it.name} needs data: give --data, a folder with {it.needs}")
    if not data.is_dir():
        raise UsageError(f"--data {data} is no folder")
    return it.given(data, work)


class _Told:
    """Passes an experiment's own lines on, with its name before them."""

    def __init__(self, progress: Progress, done: int, total: int, name: str):
        self.progress, self.done, self.total, self.name = progress, done, total, name

    def __call__(self, text: str) -> None:
        self.progress(self.done, self.total, f"{self.name}: {text}")


def run_seed(it: Experiment, seed: int, digest: str, tell: Callable[[str], None]) -> Result:
    """Run one seed, whatever goes wrong; an interruption goes through."""
    begin = time.process_time()
    figures, error, trace = None, None, None
    try:
        figures = it.run(seed, tell)
        _check(it, figures)
    except InterruptedTraining:
        raise
    except Exception as problem:
        figures, error = None, f"{type(problem).__name__}: {problem}"
        trace = traceback.format_exc()
    return Result(it.name, seed, digest, round(time.process_time() - begin, 1), figures, error, trace)


def _check(it: Experiment, figures: dict[str, Any]) -> None:
    """Raise ValueError unless JSON can hold the figures and those of the bars are numbers among them."""
    json.dumps(figures, allow_nan=False)
    for bar in it.bars:
        value = figures.get(bar.figure)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"the bar {bar} needs a number {bar.figure}, and the experiment gives {value!r}")


def _kept(path: Path, digest: str) -> Result | None:
    """The result in a file, if it is one of this source that did not fail."""
    if not path.exists():
        return None
    try:
        result = msgspec.convert(read_json(path), Result)
    except msgspec.ValidationError as error:
        raise FormatError(f"{path} is no result of the lab: {error}: remove it") from error
    return result if result.digest == digest and result.error is None else None


def source_digest(kind: type) -> str:
    """Return the sha256 over the file of an experiment and the files of the lab that it imports."""
    digest, waiting, seen = hashlib.sha256(), [Path(inspect.getfile(kind))], set()
    while waiting:
        path = waiting.pop(0)
        if path in seen:
            continue
        seen.add(path)
        source = path.read_bytes()
        digest.update(hashlib.sha256(source).digest())
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{LAB}."):
                spec = importlib.util.find_spec(node.module)
                assert spec is not None
                assert spec.origin is not None
                waiting.append(Path(spec.origin))
    return digest.hexdigest()
