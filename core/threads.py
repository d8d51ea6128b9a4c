"""The threads that kernels and PyTorch run on: how long they spin, how many a step gets, what a forked child has.

The pool is OpenMP's, one for both. How many of it a loop takes is a setting of the thread that starts the loop.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakSet

from portlm.governor import Governor

# libgomp lets an idle thread spin for milliseconds before it sleeps, which is right for a machine that does nothing
# else. With another busy program on the same cores every loop then waits for a thread that the system has set aside:
# training and decoding were measured eight times slower, and more. This many turns cost nothing measurable on an idle
# machine.
SPIN_COUNT = "2000"
MOST_THREADS = 4096  # that a user may ask for
FEW_TOKENS = 64  # of a call: above, loops are long enough to wait for a thread now and then

_used = False  # an engine was opened, so the pool may have threads
_forked = False  # this process, after that
_engines: WeakSet["Forked"] = WeakSet()


def bound_spinning() -> None:
    """Bound libgomp's spinning, unless the user has said otherwise. Works until PyTorch or the kernels are loaded."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Forked(Protocol):
    """What can go on in a forked child if it is told to."""

    def enter_child(self) -> None:
        """Called in the child, first of all."""


def survive_fork(engine: Forked) -> None:
    """Let an engine go on in children that are forked from now on, in which kernels and PyTorch run on one thread.

    A child has the thread that forked and no other of the pool: a loop on several would wait for them for ever.
    """
    global _used
    _used = True
    _engines.add(engine)


def _enter_child() -> None:
    global _forked
    if not _used:
        return
    _forked = True
    for engine in list(_engines):
        engine.enter_child()
    kernels, torch = sys.modules.get("portlm._C"), sys.modules.get("torch")
    if kernels is not None:
        kernels.set_threads(1)
    if torch is not None and hasattr(torch, "set_num_threads"):  # it has settings of its own for MKL
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_enter_child)


class StepThreads:
    """Runs the steps of an engine on as many threads as suit them, and leaves the caller's setting as it was."""

    def __init__(self, use: Callable[[int], int], threads: int | None):
        """Decide step by step, unless the user has.

        Args:
            use: sets how many threads the loops of the calling thread take; returns what it was before.
            threads: of every step; None takes the caller's setting, or one where a Governor finds that better.
        """
        self._use, self._threads = use, threads
        self._governor = Governor(cores())

    @contextmanager
    def step(self, role: str, first: Any) -> Iterator[list[int]]:
        """Run a call inside the block, which is given a list of one number: how many steps it was, 1 unless changed.

        Args:
            role: that is called.
            first: its first input, an array (B, T, ...), which tells small calls from large ones.
        """
        governed = self._threads is None and not _forked and math.prod(first.shape[:2]) <= FEW_TOKENS
        alone = governed and self._governor.alone
        count = 1 if alone or _forked else self._threads
        before = self._use(count) if count else None
        begin, steps = time.perf_counter(), [1]
        try:
            yield steps
            if governed:
                each = (time.perf_counter() - begin) / steps[0]
                self._governor.took((role, first.size.bit_length()), each, alone, steps[0])
        finally:
            if before is not None:
                self._use(before)
