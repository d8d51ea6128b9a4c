"""Progress on stderr: a bar with tokens/s, loss and ETA on a terminal, plain lines elsewhere.

Nobody may be reading: a terminal was closed, or `head` has seen enough. That is no reason to stop training.
"""

import contextlib
import errno
import io
import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO, cast

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Unread(io.TextIOBase):
    """A stream that may be written to although its reader has gone."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The stream's own."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Say whether it is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """Return the stream's descriptor."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write, or do nothing."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._failed(error)
            return len(text)

    def flush(self) -> None:
        """Flush, or do nothing."""
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        if error.errno in (errno.EIO, errno.EPIPE):
            let_go(self._stream)


def let_go(stream: TextIO) -> None:
    """Let a stream whose reader has gone lead nowhere, for whoever writes to it and for the flush at exit."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


class ProgressReport:
    """Shows how far a run has come. Standard output stays untouched: it is for the result.

    Args:
        steps: Number of the last step.
        start: The step a resumed run continues from.
        stream: Where to write, normally stderr.
        quiet: Say nothing but warnings.
    """

    def __init__(self, steps: int, start: int = 0, stream: TextIO | None = None, quiet: bool = False):
        self.steps, self.start, self.quiet = steps, start, quiet
        self.stream = Unread(stream if stream is not None else sys.stderr)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._begin = time.monotonic()

    def __enter__(self) -> "ProgressReport":
        if not self.quiet and self.stream.isatty():
            self._start_bar()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Show the state after ``step`` steps."""
        if self.quiet:
            return
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task, completed=step, loss=f"{loss:.4f}", speed=f"{_short(tokens_per_second)} tokens/s"
            )
            return
        width = len(str(self.steps))
        self._print(
            f"step {step:>{width}}/{self.steps}  loss {loss:.4f}  {_short(tokens_per_second)} tokens/s  "
            f"ETA {duration(self._remaining(step))}"
        )

    def note(self, text: str) -> None:
        """Print a line of news above the bar."""
        if not self.quiet:
            self._print(text)

    def warn(self, text: str) -> None:
        """Print a line that must be seen, even when quiet."""
        self._print(text)

    def _remaining(self, step: int) -> float:
        done = step - self.start
        return (time.monotonic() - self._begin) / done * (self.steps - step) if done > 0 else 0.0

    def _print(self, text: str) -> None:
        if self._bar is not None:
            # Plain text: a model's sample may look like rich markup.
            self._bar.console.print(text, markup=False, highlight=False, emoji=False)
        else:
            print(text, file=self.stream, flush=True)

    def _start_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=Console(file=cast("TextIO", self.stream)),
            refresh_per_second=4,
        )
        self._task = self._bar.add_task("train", total=self.steps, completed=self.start, loss="-", speed="")
        self._bar.start()


def duration(seconds: float) -> str:
    """Return a duration for people: ``45s``, ``3m05s``, ``2h10m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _short(number: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"
