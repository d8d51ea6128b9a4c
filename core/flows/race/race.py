"""A race from the weights to the figures: files, processes, the gate, the rounds, and the summary of it all."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from portlm.artifact import read_manifest
from portlm.errors import FormatError, ParityError, PortlmError, UsageError
from portlm.flows.measuring import busy_loops, environment
from portlm.flows.race import gate
from portlm.flows.race.contender import Entry, Source
from portlm.flows.race.rounds import Outcome, Pass, run_rounds
from portlm.flows.race.summary import summarize
from portlm.flows.worker_process import WorkerProcess
from portlm.hub import export_hf
from portlm.models import WEIGHTS, load_config
from portlm.threads import cores

WORKER = "portlm.flows.race.worker"
SETTINGS_OF_THREADS = ("OMP_", "GOMP_", "KMP_", "MKL_")
PREPARING, LOADING = 3600.0, 900.0  # seconds of patience

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Rules:
    """How a race is run.

    Attributes:
        passes: what a visit measures.
        rounds: that count.
        loads: fresh processes per contender, for the time that loading takes.
        threads: of every contender; None gives portlm its own choice and the others one per core.
        allowed: share of the machine that others may have in a round that counts.
        repeats: rounds that may be thrown away.
        busy: busy loops of the second race, beside which the middle one of the passes is run again; 0 for none.
        busy_rounds: of that one.
    """

    passes: tuple[Pass, ...]
    rounds: int = 7
    loads: int = 3
    threads: int | None = None
    allowed: float = 0.02
    repeats: int = 10
    busy: int = 0
    busy_rounds: int = 5


@dataclass
class Runner:
    """A contender that may be timed: its process, and what is known of it."""

    entry: Entry
    process: WorkerProcess
    facts: dict[str, Any]


def run(
    artifact: Path,
    entries: Sequence[Entry],
    work: Path,
    rules: Rules,
    progress: Progress = lambda message: None,
    halfway: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Race contenders on the weights of an artifact.

    Args:
        artifact: portlm's folder, which holds its checkpoint.
        entries: who takes part.
        work: a folder for the files that contenders make; what it holds already is used as it is.
        rules: see Rules.
        progress: called with a line before each step.
        halfway: called with the result of the quiet race before that beside busy loops begins, which may take long.

    Returns:
        What summary.summarize gives.

    Raises:
        FormatError: the artifact holds no checkpoint of a family that portlm knows.
        EngineUnavailableError: there is no PyTorch for the reference.
        PortlmError: nobody could be measured.
    """
    source = _source(artifact, work)
    vocab = load_config(source.hf).vocab_size
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        start = _starter(stack, work, source, vocab)
        reference, who = work / "reference.npz", work / "reference.txt"
        if not who.exists():
            progress("the model's own logits")
            with_torch = start("reference", None, None)
            who.write_text(with_torch.call("reference", PREPARING, out=str(reference))["who"])
            with_torch.close()
        runners = []
        for entry in entries:
            progress(f"prepare {entry.name}")
            try:
                runners.append(_enter(entry, start, rules, reference))
            except PortlmError as error:
                failed[entry.name] = str(error).removeprefix(f"{entry.name}: ")
                progress(f"{entry.name} is out: {failed[entry.name]}")
        if not runners:
            raise PortlmError("nobody can race: " + "; ".join(f"{n}: {why}" for n, why in failed.items()))
        prober = start("probe", None, rules.threads)
        outcomes = {"quiet": _race(runners, rules.passes, rules.rounds, prober, rules, progress)}
        if rules.busy:
            halfway(_result(artifact, source, who, rules, runners, outcomes, failed))
            middle = rules.passes[len(rules.passes) // 2 : len(rules.passes) // 2 + 1]
            with busy_loops(rules.busy) as pids:
                progress(f"beside {rules.busy} busy loop")
                survivors = [r for r in runners if r.entry.name not in outcomes["quiet"].failed]
                outcomes["busy"] = _race(survivors, middle, rules.busy_rounds, prober, rules, progress, pids)
        return _result(artifact, source, who, rules, runners, outcomes, failed)


def _result(
    artifact: Path, source: Source, who: Path, rules: Rules, runners: Sequence[Runner], outcomes: dict[str, Outcome],
    failed: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """What was found so far; the processes still run, and are asked for the most memory they had."""
    for runner in runners:
        if not any(runner.entry.name in outcome.failed for outcome in outcomes.values()):
            runner.facts["peak_mib"] = runner.process.call("memory")["peak"]
    config = load_config(source.hf)
    return {
        "model": {"artifact": str(artifact), "family": config.family, "config": config.to_hf()},
        "reference": who.read_text(),
        "rules": asdict(rules),
        "environment": {**environment(), "unix_time": time.time()},
        **summarize(source, [(r.entry, r.facts) for r in runners], outcomes, failed),
    }


def _source(artifact: Path, work: Path) -> Source:
    """The weights as transformers opens them, in a folder that knows which weights they are."""
    weights = read_manifest(artifact).files.get(WEIGHTS)
    if weights is None:
        raise FormatError(
            f"{artifact} holds no {WEIGHTS}, so there is nothing that others could run: export again"
        )
    work.mkdir(parents=True, exist_ok=True)
    hf, stamp = work / "hf", work / "weights.sha256"
    if hf.exists() and (not stamp.exists() or stamp.read_text() != weights.sha256):
        raise UsageError(f"{work} holds the files of another model: choose another folder, or remove it")
    if not hf.exists():
        stamp.write_text(weights.sha256)
        export_hf(artifact, hf)
    return Source(artifact.resolve(), hf.resolve(), work.resolve())


Start = Callable[[str, Entry | None, int | None], WorkerProcess]


def _starter(stack: ExitStack, work: Path, source: Source, vocab: int) -> Start:
    """A function that starts workers, all of which end with the stack."""

    def start(name: str, entry: Entry | None, threads: int | None) -> WorkerProcess:
        settings = {k: v for k, v in os.environ.items() if not k.startswith(SETTINGS_OF_THREADS)}
        settings |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        settings |= {"OMP_NUM_THREADS": str(threads or cores())}
        log = stack.enter_context((work / f"{name.replace(':', '-').replace(' ', '-')}.log").open("w"))
        process = WorkerProcess(name, WORKER, settings | dict(entry.environment if entry else {}), log)
        stack.callback(process.close)
        if entry is not None:
            process.call("enter", entry=asdict(entry), artifact=str(source.artifact), hf=str(source.hf),
                         work=str(source.work), vocab=vocab)  # fmt: skip
        else:
            process.call("place", hf=str(source.hf))
        return process

    return start


def _enter(entry: Entry, start: Start, rules: Rules, reference: Path) -> Runner:
    """Take a contender from its packages to the start line."""
    entry.check()
    maker = start(entry.name, entry, rules.threads)
    maker.call("prepare", PREPARING)
    maker.close()
    threads = rules.threads if entry.ours else rules.threads or cores()
    loads = []
    for i in range(rules.loads):
        process = start(entry.name, entry, rules.threads)
        loads.append(process.call("load", LOADING, threads=threads))
        if i + 1 < rules.loads:
            process.close()
    typical = rules.passes[len(rules.passes) // 2]
    facts = {name: statistics.median(load[name] for load in loads) for name in loads[0]}
    facts |= process.call("tune", LOADING, prompt=typical.context)
    facts |= process.call("describe", LOADING)
    facts["agreement"] = process.call("gate", LOADING, reference=str(reference.resolve()))
    try:
        gate.check(gate.Agreement(**facts["agreement"]), entry.bar or entry.precision)
    except ParityError:
        process.close()
        raise
    return Runner(entry, process, facts)


def _race(
    runners: Sequence[Runner], passes: Sequence[Pass], rounds: int, prober: WorkerProcess, rules: Rules,
    progress: Progress, pids: Iterable[int] = (),
) -> Outcome:  # fmt: skip
    return run_rounds(
        [runner.process for runner in runners], passes, rounds, probe=lambda: prober.call("limits", LOADING),
        allowed=rules.allowed, repeats=rules.repeats, pids=pids, progress=progress,
    )  # fmt: skip
