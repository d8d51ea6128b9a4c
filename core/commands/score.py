"""``portlm score``: how probable a model finds a text."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from portlm.commands.generate import HARMLESS
from portlm.commands.reading import model_options, opened, texts_of
from portlm.errors import UsageError

if TYPE_CHECKING:
    from portlm.runtimes.results import Score
    from portlm.tokenizer import Tokenizer


@click.command("score")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@click.option(
    "--file", "-f", type=click.Path(path_type=Path),
    help="A file with a text on each line, or a folder in which each file is a text.",
)  # fmt: skip
@click.option("--tokens", "each_token", is_flag=True, help="Also say how probable each token is.")
@click.option(
    "--no-special-tokens", is_flag=True, help="Leave off what the tokenizer puts around every text."
)
@model_options
def command(
    model: Path, texts: tuple[str, ...], file: Path | None, each_token: bool, no_special_tokens: bool, batch_size: int,
    as_json: bool, **how: Any,
) -> None:  # fmt: skip
    """Score each TEXT with MODEL, a decoder or a recurrent model.

    Prints a line for each text: the natural logarithm of its probability, the perplexity of a token, and bits per byte.
    A line for all of them follows if there are several. What the first token of a text is has no probability, unless
    the tokenizer puts one in front of it; it and its bytes are left out. Without TEXT, lines of stdin are texts.
    """
    from portlm.tokenizer import Tokenizer

    given, names = texts_of(texts, file)
    with opened(model, **how) as session:
        if session.textless:
            raise UsageError(f"{session.textless}, so it scores token ids alone: use Session.score")
        found = session.score(given, batch_size=batch_size, add_special_tokens=not no_special_tokens)
        tokenizer = session.tokenizer
    assert isinstance(tokenizer, Tokenizer)
    rows = [described(name, each, tokenizer) for name, each in zip(names, found, strict=True)]
    whole = summary([each.total for each in found], rows)
    if as_json:
        if not each_token:
            for row in rows:
                del row["tokens"]
        click.echo(json.dumps({"texts": rows, "all": whole}, ensure_ascii=False))
        return
    for row in rows:
        click.echo(_line(row))
        if each_token:
            for token in row["tokens"]:
                mark = "" if token["greedy"] else "\t*"
                click.echo(f"\t{token['logprob']:.4f}\t{_printable(token['text'])}{mark}")
    if len(rows) > 1:
        click.echo(_line(whole))


def described(name: str, score: Score, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what --json prints of one text, with its tokens.

    Args:
        name: Of the text.
        score: Of its tokens.
        tokenizer: Which made them.
    """
    scored = score.token_ids[1:]
    tokens = [
        {"id": token, "text": tokenizer.decode([token]), "logprob": logprob, "greedy": greedy}
        for token, logprob, greedy in zip(scored, score.logprobs, score.greedy, strict=True)
    ]
    size = len(tokenizer.decode_bytes(scored, skip_special=True))
    return {"text": name, **_figures(score.total, len(scored), size), "tokens": tokens}


def summary(totals: Sequence[float], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of all texts together, each token and each byte counting the same."""
    tokens, size = (sum(row[name] for row in rows) for name in ("token_count", "byte_count"))
    return {"text": f"all {len(rows)} texts", **_figures(math.fsum(totals), tokens, size)}


def _figures(total: float, tokens: int, size: int) -> dict[str, Any]:
    """What is said of a text; null where there is no token, or no byte, to divide by."""
    return {
        "logprob": total,
        "perplexity": math.exp(-total / tokens) if tokens else None,
        "bits_per_byte": -total / math.log(2) / size if size else None,
        "token_count": tokens,
        "byte_count": size,
    }


def _line(row: dict[str, Any]) -> str:
    means = ("-" if row[name] is None else f"{row[name]:.4f}" for name in ("perplexity", "bits_per_byte"))
    return "\t".join((f"{row['logprob']:.4f}", *means, _printable(row["text"])))


def _printable(text: str) -> str:
    """A text on one line, without what moves a terminal's cursor."""
    return text.replace("\t", "\\t").replace("\n", "\\n").translate(HARMLESS)
