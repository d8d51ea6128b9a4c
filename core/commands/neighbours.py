"""``portlm neighbours``: the words whose vectors are near that of a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import msgspec

from portlm.commands.reading import engine_options, opened


@click.command("neighbours")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("words", metavar="WORD...", nargs=-1, required=True)
@click.option("--top", default=10, show_default=True, help="Neighbours of each word.")
@engine_options
def command(model: Path, words: tuple[str, ...], top: int, as_json: bool, **how: Any) -> None:
    """List the words of MODEL, a table of word vectors, that are nearest to each WORD by the cosine of the angle.

    Prints a neighbour and its cosine on each line, the nearest first; an empty line between words.
    For example: portlm neighbours run/final king queen --top 5
    """
    with opened(model, **how) as session:
        found = session.neighbours(words, top=top)
    if as_json:
        rows = [
            {"word": word, "neighbours": msgspec.to_builtins(near)}
            for word, near in zip(words, found, strict=True)
        ]
        click.echo(json.dumps(rows, ensure_ascii=False))
        return
    for i, near in enumerate(found):
        if i:
            click.echo()
        for neighbour in near:
            click.echo(f"{neighbour.word}\t{neighbour.cosine:.4f}")
