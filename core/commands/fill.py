"""``portlm fill``: what a mask in a text stands for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import msgspec

from portlm.commands.reading import model_options, opened, texts_of


@click.command("fill")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@click.option("--file", "-f", type=click.Path(path_type=Path), help="A file with a text on each line.")
@click.option("--top", default=5, show_default=True, help="Guesses for each mask.")
@model_options
def command(
    model: Path, texts: tuple[str, ...], file: Path | None, top: int, batch_size: int, as_json: bool, **how: Any
) -> None:  # fmt: skip
    """Guess with MODEL, an encoder with a head for hidden tokens, what each [MASK] (or <mask>) of TEXT stands for.

    Prints the guesses with their probabilities, the best first; an empty line between masks.
    For example: portlm fill bert "Paris is the [MASK] of France."
    """
    given, names = texts_of(texts, file)
    with opened(model, **how) as session:
        found = session.fill(given, top_k=top, batch_size=batch_size)
    if as_json:
        rows = [
            {"text": n, "masks": msgspec.to_builtins(masks)} for n, masks in zip(names, found, strict=True)
        ]
        click.echo(json.dumps(rows, ensure_ascii=False))
        return
    for i, guesses in enumerate(guesses for masks in found for guesses in masks):
        if i:
            click.echo()
        for guess in guesses:
            click.echo(f"{guess.token}\t{guess.score:.4f}")
