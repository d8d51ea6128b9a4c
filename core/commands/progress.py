"""How far a verb that does many things has come: a bar on a terminal, lines elsewhere, with the time that is left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

Progress = Callable[[int, int, str], None]


@contextmanager
def lines_or_bar(verb: str) -> Iterator[Progress]:
    """Show progress on stderr.

    Args:
        verb: What lines begin with.

    Yields:
        What takes how many things are done, of how many, and what is going on.
    """
    from portlm.train.progress import duration

    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=None)

            def move(done: int, total: int, text: str) -> None:
                bar.update(task, completed=done, total=total, description=text.replace("[", "\\["))

            yield move
        return
    begin = time.monotonic()

    def say(done: int, total: int, text: str) -> None:
        left = f", ETA {duration((time.monotonic() - begin) / done * (total - done))}" if done else ""
        click.echo(f"{verb}: {done}/{total}{left}: {text}", err=True)

    yield say
