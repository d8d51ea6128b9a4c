"""``portlm keywords``: the words that say what a text is about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import msgspec

from portlm.commands.reading import texts_of


@click.command("keywords")
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@click.option(
    "--file", "-f", type=click.Path(path_type=Path),
    help="A file with a text on each line, or a folder in which each file is a text.",
)  # fmt: skip
@click.option(
    "--method", default="tfidf", show_default=True,
    type=click.Choice(["tfidf", "rake", "textrank", "lda", "nmf", "lsi"]),
    help="tfidf, rake and textrank: keywords of each text; lda, nmf and lsi: of each topic of all texts.",
)  # fmt: skip
@click.option("--top", default=10, show_default=True, help="Keywords of each text or topic.")
@click.option("--topics", default=10, show_default=True, help="Topics that lda, nmf or lsi look for.")
@click.option(
    "--window",
    default=2,
    show_default=True,
    help="textrank: words that are fewer places apart are joined, 2 to 10.",
)
@click.option(
    "--stop-words", type=click.Path(path_type=Path), metavar="FILE",
    help="UTF-8 file of words that are no keywords; empty lines count for nothing.  [default: scikit-learn's English "
    "list]",
)  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Of lda and nmf.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    texts: tuple[str, ...], file: Path | None, method: str, stop_words: Path | None, as_json: bool, **how: Any
) -> None:
    """List the keywords of each TEXT, or of the topics of all of them.

    Prints a keyword and its score on each line, the best first; an empty line between texts. Without TEXT, lines of
    stdin are texts. tfidf compares a text with the others, so it wants several.
    For example: portlm keywords --file articles/ --method textrank --top 5
    """
    from portlm.data.text import read_text
    from portlm.keywords import ENGLISH, OF_TOPICS, keywords

    given, names = texts_of(texts, file)
    stops = ENGLISH if stop_words is None else read_text(stop_words).split()
    found = keywords(given, method, stop_words=stops, **how)
    if as_json:
        of_topics = method in OF_TOPICS
        called = range(1, len(found) + 1) if of_topics else names
        rows = [
            {"topic" if of_topics else "text": name, "keywords": msgspec.to_builtins(best)}
            for name, best in zip(called, found, strict=True)
        ]
        click.echo(json.dumps(rows, ensure_ascii=False))
        return
    for i, best in enumerate(found):
        if i:
            click.echo()
        for keyword in best:
            click.echo(f"{keyword.text}\t{keyword.score:.4f}")
