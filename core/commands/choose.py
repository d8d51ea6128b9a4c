"""``portlm choose``: which of several answers goes with a context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from portlm.commands.reading import model_options, opened


@click.command("choose")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("context")
@click.argument("answers", metavar="ANSWER ANSWER...", nargs=-1, required=True)
@model_options
def command(
    model: Path, context: str, answers: tuple[str, ...], batch_size: int, as_json: bool, **how: Any
) -> None:
    """Choose the ANSWER that goes with CONTEXT, with MODEL, a decoder with a head "choose" (...DoubleHeadsModel).

    Prints each answer with its probability on a line, the best first.
    For example: portlm choose gpt "Why is the grass wet?" "It rained." "It is Monday."
    """
    with opened(model, **how) as session:
        found = session.choose(context, answers, batch_size=batch_size)
    order = sorted(range(len(answers)), key=lambda i: -found.scores[i])
    rows = [{"index": i, "answer": answers[i], "score": found.scores[i]} for i in order]
    if as_json:
        click.echo(json.dumps({"context": context, "answers": rows}, ensure_ascii=False))
        return
    for row in rows:
        click.echo(f"{row['answer']}\t{row['score']:.4f}")
