"""``portlm tag``: a label for each word of a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import msgspec

from portlm.commands.reading import model_options, opened, texts_of


@click.command("tag")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@click.option("--file", "-f", type=click.Path(path_type=Path), help="A file with a text on each line.")
@click.option("--tokens", is_flag=True, help="A label for each token, not for each word by its first token.")
@model_options
def command(
    model: Path, texts: tuple[str, ...], file: Path | None, tokens: bool, batch_size: int, as_json: bool, **how: Any
) -> None:  # fmt: skip
    """Label the words of each TEXT with MODEL, an encoder with a head for tokens.

    Prints a line for each word: the word, its label and the score; an empty line between texts.
    For example: portlm tag names "Ada Lovelace was born in London"
    """
    given, names = texts_of(texts, file)
    with opened(model, **how) as session:
        found = session.tag(given, words=not tokens, batch_size=batch_size)
    if as_json:
        rows = [{"text": n, "tags": msgspec.to_builtins(tags)} for n, tags in zip(names, found, strict=True)]
        click.echo(json.dumps(rows, ensure_ascii=False))
        return
    for i, tags in enumerate(found):
        if i:
            click.echo()
        for tag in tags:
            click.echo(f"{tag.text}\t{tag.label}\t{tag.score:.4f}")
