"""The threads that kernels and PyTorch run on: how long they spin, how many a step gets, what a forked child has.

There are two pools. OpenMP's is PyTorch's, and the kernels' while PyTorch runs beside them. The other one is the
kernels' own, for engines without PyTorch (csrc/cpu/threads.h). How many threads a loop takes is a setting of the thread
that starts it, one for both.
"""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
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
    """Runs the steps of an engine on as many threads as the user wants, and leaves the caller's setting as it was."""

    def __init__(self, use: Callable[[int], int], threads: int | None):
        """Keep what was asked for.

        Args:
            use: sets how many threads the loops of the calling thread take; returns what it was before.
            threads: of every step; None takes the caller's setting.
        """
        self._use, self._threads = use, threads

    def step(self) -> AbstractContextManager[None]:
        """Run a call inside the block."""
        return self._on(1 if _forked else self._threads)

    @contextmanager
    def _on(self, count: int | None) -> Iterator[None]:
        before = self._use(count) if count else None
        try:
            yield
        finally:
            if before is not None:
                self._use(before)


class GovernedThreads(StepThreads):
    """The same for loops that PyTorch begins, which wait for OpenMP's threads: on one where a Governor prefers it.

    Engines without PyTorch need none: portlm's own pool measures every single loop (csrc/cpu/pool.h).
    """

    def __init__(self, use: Callable[[int], int], threads: int | None):
        """Decide step by step, unless the user has; see StepThreads."""
        super().__init__(use, threads)
        self._governor = Governor(cores())

    @contextmanager
    def governed_step(self, role: str, first: Any) -> Iterator[None]:
        """Run a call inside the block.

        Args:
            role: that is called.
            first: its first input, an array (B, T, ...), which tells small calls from large ones.
        """
        if self._threads is not None or _forked or math.prod(first.shape[:2]) > FEW_TOKENS:
            with self.step():
                yield
            return
        alone = self._governor.alone
        begin = time.perf_counter()
        with self._on(1 if alone else None):
            yield
            self._governor.took((role, first.size.bit_length()), time.perf_counter() - begin, alone)
