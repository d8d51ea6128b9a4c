"""``portlm tokenizer train``: a tokenizer from text files, of byte sequences or of whole words."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.group("tokenizer")
def command() -> None:
    """Train a tokenizer."""


@command.command("train")
@click.argument("text", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", "-o", required=True, type=click.Path(path_type=Path), help="Folder for tokenizer.json."
)
@click.option(
    "--vocab-size", default=8192, show_default=True, help="Tokens, the 256 bytes and specials included."
)
@click.option(
    "--kind", type=click.Choice(["bpe", "word"]), default="bpe", show_default=True,
    help="bpe: byte-level BPE; word: the most frequent words, whole.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the path.")
def train(text: tuple[Path, ...], out: Path, vocab_size: int, kind: str, as_json: bool) -> None:
    """Train a tokenizer on UTF-8 TEXT files and write OUT/tokenizer.json.

    With byte-level BPE any bytes encode, and decode to the same bytes; of whole words those that are too rare for the
    vocabulary become [UNK]. Prints the path of the tokenizer.
    """
    from portlm.data.text import read_text
    from portlm.text_tokenizer import train_words
    from portlm.tokenizer import train_bpe

    texts = [read_text(path) for path in text]
    tokenizer = (train_words if kind == "word" else train_bpe)(texts, vocab_size=vocab_size)
    tokenizer.save(out)
    if as_json:
        size = sum(len(t.encode()) for t in texts)
        tokens = sum(len(tokenizer.encode(t)) for t in texts)
        click.echo(
            json.dumps(
                {
                    "path": str(out / "tokenizer.json"),
                    "vocab_size": tokenizer.vocab_size,
                    "bytes": size,
                    "tokens": tokens,
                    "bytes_per_token": size / tokens,
                }
            )
        )
    else:
        click.echo(out / "tokenizer.json")
