"""Progress on stderr: a bar with tokens/s, loss and ETA on a terminal, plain lines elsewhere."""

import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


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
        self.stream = stream if stream is not None else sys.stderr
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
            try:
                print(text, file=self.stream, flush=True)
            except BrokenPipeError:
                # Whoever read our progress has gone (`portlm pretrain ... 2>&1 | head`): no reason to stop training.
                self.stream = Path(os.devnull).open("w")  # noqa: SIM115 - lives as long as the process

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
            console=Console(file=self.stream),
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
