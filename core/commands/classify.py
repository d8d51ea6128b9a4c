"""``portlm classify``: which label a text has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from portlm.commands.reading import model_options, opened, texts_of


@click.command("classify")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@click.option(
    "--file", "-f", type=click.Path(path_type=Path),
    help="A file with a text on each line, or a folder in which each file is a text.",
)  # fmt: skip
@click.option("--other", help="A second text, which each TEXT is compared with.")
@click.option(
    "--head", default="classify", show_default=True, help="Of the model; next_sentence is one, too."
)
@click.option("--top", type=int, default=1, show_default=True, help="Labels of each text; 0 for all.")
@click.option("--truncate", is_flag=True, help="Cut what is longer than the context, instead of refusing it.")
@model_options
def command(
    model: Path, texts: tuple[str, ...], file: Path | None, other: str | None, head: str, top: int, truncate: bool,
    batch_size: int, as_json: bool, **how: Any,
) -> None:  # fmt: skip
    """Classify each TEXT with MODEL, an encoder with a head for whole texts.

    Prints a line for each text: its labels with their scores, the best first. Without TEXT, lines of stdin are texts.
    For example: portlm classify sentiment "what a day"
    """
    given, names = texts_of(texts, file)
    with opened(model, **how) as session:
        others = None if other is None else [other] * len(given)
        found = session.classify(given, others, head=head, truncate=truncate, batch_size=batch_size)
    rows = [each.labels[: top or None] for each in found]
    if as_json:
        shown = [
            {"text": name, "labels": [{"name": x.name, "score": x.score} for x in row]}
            for name, row in zip(names, rows, strict=True)
        ]
        click.echo(json.dumps(shown, ensure_ascii=False))
        return
    for row in rows:
        click.echo("\t".join(f"{label.name}\t{label.score:.4f}" for label in row))
