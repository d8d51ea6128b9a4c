"""What takes part in a race: one line of a table, and the class that it names.

The table is read without importing a single engine. The class lives in a worker process (worker.py), and only there.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from portlm.errors import EngineUnavailableError, StorageError

Array = np.ndarray
Choice = dict[str, Any]

PRECISIONS = ("f32", "f16", "q8", "q4")
"""What is compared with what: weights of 32, 16, 8 to 9, and 4 to 7 bits."""


@dataclass(frozen=True)
class Entry:
    """A contender, before anything of it is loaded.

    Attributes:
        name: of its row.
        precision: one of PRECISIONS.
        target: "module:Class", a Contender.
        arguments: of the class, what JSON can hold.
        needs: module -> what pip is asked for where it is missing.
        environment: of its process, on top of one without the caller's settings of threads.
        ours: it is portlm.
        note: what a reader of the table should know.
        bar: of its logits, one of portlm.flows.race.gate.BARS; that of its precision where it is empty.
    """

    name: str
    precision: str
    target: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    needs: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    ours: bool = False
    note: str = ""
    bar: str = ""

    def check(self) -> None:
        """Raise EngineUnavailableError with a pip command if a package is not installed."""
        missing = [package for module, package in self.needs.items() if not importlib.util.find_spec(module)]
        if missing:
            raise EngineUnavailableError(f"not installed: pip install {' '.join(dict.fromkeys(missing))}")

    def make(self) -> Contender:
        """An object of its class."""
        module, _, name = self.target.partition(":")
        cls: type[Contender] = getattr(importlib.import_module(module), name)
        return cls(**self.arguments)


@dataclass(frozen=True)
class Source:
    """The one set of weights.

    Attributes:
        artifact: portlm's folder.
        hf: the same weights as transformers opens them.
        work: where contenders keep the files that they make of them.
    """

    artifact: Path
    hf: Path
    work: Path


class Contender(ABC):
    """A model on an engine that continues one sequence greedily.

    Attributes:
        cache_item: bytes of one number of the key/value cache, once loaded.
        choices: settings to try for the fastest of, with `configure`; none where there is one right one.
    """

    cache_item: float = 4.0
    choices: Sequence[Choice] = ()

    def prepare(self, source: Source) -> None:  # noqa: B027 - most read the source as it is
        """Make the files that `load` opens and that are not there yet. Runs in a process of its own."""

    @abstractmethod
    def bring(self) -> None:
        """Import the engine: what a program does once, and no part of loading a model."""

    @abstractmethod
    def load(self, source: Source, threads: int | None) -> None:
        """Open the model on so many threads, None for the engine's own choice."""

    def configure(self, choice: Choice) -> None:
        """Take one of `choices`."""
        raise NotImplementedError

    @abstractmethod
    def reset(self) -> None:
        """Forget what was read."""

    @abstractmethod
    def read(self, ids: Array) -> Array:
        """Read further tokens (T,) int64; return the logits (V,) float32 behind the last."""

    def decode(self, logits: Array, count: int) -> float:
        """Continue greedily and return the seconds of `count` steps.

        Args:
            logits: behind what was read, as `read` gave them.
            count: steps; each reads the token that the logits before it chose, and chooses the next.
        """
        token = int(np.argmax(logits))
        begin = time.perf_counter()
        for _ in range(count):
            token = int(np.argmax(self.read(np.array([token], np.int64))))
        return time.perf_counter() - begin

    @abstractmethod
    def weight_bytes(self, source: Source) -> int:
        """Bytes of weights that one token needs: everything but rows of a lookup table that are not asked for."""


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Yield a path beside `target`, which takes its place if the block ends well, and is removed otherwise."""
    temporary = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.rename(target)
    except OSError as error:
        raise StorageError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
