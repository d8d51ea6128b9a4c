"""Runs of the lab in processes of their own, several at a time: one that dies takes nothing with it."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from multiprocessing import connection, get_context
from multiprocessing.context import SpawnProcess

from portlm.flows.lab.runs import Result, Run, Tell, run_seed
from portlm.train.interrupt import InterruptedTraining

# A fresh interpreter: a fork would share locks that threads of PyTorch hold.
_FRESH = get_context("spawn")


def in_processes(runs: Sequence[Run], jobs: int, threads: int, tell: Tell) -> Iterator[tuple[Run, Result]]:
    """Yield each run with its result, in the order in which they end.

    Args:
        runs: What to do, begun in this order.
        jobs: How many at a time.
        threads: Of PyTorch and of portlm's kernels, in each process.
        tell: Takes a run and a line about how far it has come.
    """
    waiting = list(reversed(runs))
    alive: dict[connection.Connection, tuple[Run, SpawnProcess]] = {}
    try:
        while waiting or alive:
            while waiting and len(alive) < jobs:
                run = waiting.pop()
                ours, theirs = _FRESH.Pipe()
                process = _FRESH.Process(target=_do, args=(run, threads, theirs), daemon=True)
                process.start()
                theirs.close()  # or its end would not be seen when the process ends
                alive[ours] = run, process
                tell(run, "begins")
            for pipe in connection.wait(list(alive)):
                assert isinstance(pipe, connection.Connection)
                run, process = alive[pipe]
                try:
                    said = pipe.recv()
                except EOFError:
                    process.join()
                    error = f"its process ended: {_cause(process.exitcode or 0)}"
                    said = Result(run.experiment.name, run.seed, run.digest, 0.0, error=error)
                if isinstance(said, str):
                    tell(run, said)
                else:
                    del alive[pipe]
                    pipe.close()
                    yield run, said
    finally:
        for _, process in alive.values():
            process.terminate()
        for _, process in alive.values():
            process.join()  # a training run finishes its step and saves


def _cause(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _do(run: Run, threads: int, pipe: connection.Connection) -> None:
    """What a process does: one run, and tell of it."""
    # Ctrl-C goes to every process of a terminal; the one that began this one asks it to end, in its own time.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    from portlm.train.allocator import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(threads)
    try:
        pipe.send(run_seed(run, pipe.send))
    except (InterruptedTraining, BrokenPipeError):
        raise SystemExit(1) from None
