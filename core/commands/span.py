"""``portlm span``: the part of a text that answers a question."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import msgspec

from portlm.commands.reading import model_options, one_text, opened


@click.command("span")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("question")
@click.argument("text", required=False)
@click.option("--file", "-f", type=click.Path(path_type=Path), help="Read the text from this file.")
@click.option("--longest", default=30, show_default=True, help="Tokens of the answer, at most.")
@click.option(
    "--no-answer", type=float, metavar="THRESHOLD",
    help="Answer nothing where that beats the best answer by more than this, in logits; 0 is usual.",
)  # fmt: skip
@model_options
def command(
    model: Path, question: str, text: str | None, file: Path | None, longest: int, no_answer: float | None,
    batch_size: int, as_json: bool, **how: Any,
) -> None:  # fmt: skip
    """Find the part of TEXT that answers QUESTION with MODEL, an encoder with a head for spans.

    Prints it, an empty line for no answer. Without TEXT, it is read from stdin.
    For example: portlm span qa "Who wrote it?" "Ada wrote it in 1843."
    """
    context = one_text(text, file)
    with opened(model, **how) as session:
        found = session.span(question, context, longest=longest, no_answer=no_answer, batch_size=batch_size)
    click.echo(json.dumps(msgspec.to_builtins(found), ensure_ascii=False) if as_json else found.text)
