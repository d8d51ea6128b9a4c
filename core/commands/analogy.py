"""``portlm analogy``: what is to one word as a second is to a third."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import msgspec

from portlm.commands.reading import engine_options, opened


@click.command("analogy")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("a")
@click.argument("b")
@click.argument("c")
@click.option("--top", default=5, show_default=True, help="Answers.")
@engine_options
def command(model: Path, a: str, b: str, c: str, top: int, as_json: bool, **how: Any) -> None:
    """Say what is to C as B is to A, by MODEL, a table of word vectors: the words nearest to B - A + C.

    Prints an answer and its cosine on each line, the nearest first; A, B and C are never among them.
    For example: portlm analogy run/final man king woman
    """
    with opened(model, **how) as session:
        found = session.analogy(a, b, c, top=top)
    if as_json:
        click.echo(
            json.dumps({"a": a, "b": b, "c": c, "answers": msgspec.to_builtins(found)}, ensure_ascii=False)
        )
        return
    for neighbour in found:
        click.echo(f"{neighbour.word}\t{neighbour.cosine:.4f}")
