"""Runs experiments, seed after seed, and keeps each result: what was interrupted goes on where it stopped.

OUT/NAME/SEED.json holds the figures of one seed, or why there are none, beside a digest of the source they come from.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import msgspec

from portlm.errors import FormatError, UsageError
from portlm.files import read_json, write_atomic
from portlm.flows.lab.experiment import Bar, DataExperiment, Experiment
from portlm.flows.lab.runs import Result, Run, Tell, run_seed
from portlm.flows.lab.workers import in_processes

LAB = "portlm.flows.lab"


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
    jobs: int = 1,
    anew: bool = False,
    data: Path | None = None,
    progress: Progress = lambda done, total, text: None,
) -> list[Outcome]:
    """Run experiments and keep every result.

    A result in ``out`` is taken as it is if it comes from the same source and did not fail. A seed that fails is
    recorded, and the others go on.

    Args:
        experiments: Which, in order.
        out: The folder of the results.
        seeds: Only the first so many of each experiment; None for all.
        threads: Of PyTorch and of portlm's kernels. The small steps of recurrent models get slower by more than one.
        jobs: How many seeds are run at a time, if more than one each in a process of its own.
        anew: Run what is there, too.
        data: The folder of what an experiment needs that brings no data of its own.
        progress: Takes how far it has come.

    Returns:
        The outcome of each experiment, in order.

    Raises:
        UsageError: A number below 1, or an experiment needs data and there are none, or others.
        InterruptedTraining: A signal came; what was trained is kept.
        StorageError: A result cannot be written.
    """
    for name, number in (("--seeds", seeds), ("--threads", threads), ("--jobs", jobs)):
        if number is not None and number < 1:
            raise UsageError(f"{name} must be at least 1, got {number}")
    planned = [_planned(it, out, seeds, data) for it in experiments]
    runs = [run for of_one in planned for run in of_one]
    results: dict[Path, Result] = {}  # by the file of each

    def tell(run: Run, text: str) -> None:
        progress(len(results), len(runs), f"{run}: {text}")

    def ended(run: Run, result: Result) -> None:
        results[_file(out, run)] = result
        tell(run, f"failed: {result.error}" if result.error else f"{result.seconds:.0f} s of processor time")

    waiting = []
    for run in runs:
        kept = None if anew else _kept(_file(out, run), run.digest)
        if kept is None:
            waiting.append(run)
        else:
            ended(run, kept)
    for run, result in (
        _here(waiting, threads, tell) if jobs == 1 else in_processes(waiting, jobs, threads, tell)
    ):
        path = _file(out, run)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(msgspec.to_builtins(result), indent=2) + "\n")
        ended(run, result)
    return [Outcome(of_one[0].experiment, [results[_file(out, run)] for run in of_one]) for of_one in planned]


def _planned(it: Experiment, out: Path, seeds: int | None, data: Path | None) -> list[Run]:
    digest = source_digest(type(it))
    if isinstance(it, DataExperiment):
        it = _with_data(it, data, out / it.name)
        digest = hashlib.sha256(f"{digest} {it.digest}".encode()).hexdigest()
    return [Run(it, seed, digest) for seed in it.seeds[:seeds]]


def _file(out: Path, run: Run) -> Path:
    return out / run.experiment.name / f"{run.seed}.json"


def _here(runs: Sequence[Run], threads: int, tell: Tell) -> Iterator[tuple[Run, Result]]:
    """Do one run after the other, in this process."""
    import torch

    torch.set_num_threads(threads)
    for run in runs:
        tell(run, "begins")
        yield run, run_seed(run, partial(tell, run))


def _with_data(it: DataExperiment, data: Path | None, work: Path) -> DataExperiment:
    if data is None:
        raise UsageError(f"{it.name} needs data: give --data, a folder with {it.needs}")
    if not data.is_dir():
        raise UsageError(f"--data {data} is no folder")
    return it.given(data, work)


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
