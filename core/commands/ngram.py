"""``portlm ngram``: text in, n-gram model out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click


@click.command("ngram")
@click.argument("texts", metavar="TEXT...", nargs=-1, required=True)
@click.option(
    "--out", "-o", type=click.Path(path_type=Path), default=Path("run"), show_default=True,
    help="Run folder: tokens in OUT/data, the model in OUT/final.",
)  # fmt: skip
@click.option(
    "--order", "-n", default=5, show_default=True, help="n: the next token is seen behind n - 1 others."
)
@click.option(
    "--smoothing", type=click.Choice(["modified-kneser-ney", "kneser-ney"]), default="modified-kneser-ney",
    show_default=True, help="Three discounts of each length, or one.",
)  # fmt: skip
@click.option(
    "--tokenizer", default="byte", show_default=True,
    help="byte, bpe:SIZE (trained on TEXT) or a tokenizer.json.",
)  # fmt: skip
@click.option(
    "--held-out",
    default=0.1,
    show_default=True,
    help="Share of the text, its end, that is scored and not counted.",
)
@click.option(
    "--arpa", type=click.Path(path_type=Path),
    help="Also write the model as this ARPA file, which KenLM opens; compressed if its name ends with .gz.",
)  # fmt: skip
@click.option("--context", default=32768, show_default=True, help="Longest text that the model will read.")
@click.option("--quiet", "-q", is_flag=True, help="Say nothing on stderr but errors.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON instead of the checkpoint's path."
)
def command(
    texts: tuple[str, ...], out: Path, order: int, smoothing: str, tokenizer: str, held_out: float, arpa: Path | None,
    context: int, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Count the UTF-8 files TEXT and print the path of an n-gram model with Kneser-Ney smoothing.

    The model is a checkpoint like any other: export, compile, generate. TEXT may also be one folder of prepared token
    shards.
    """
    from portlm.hub_arpa import export_arpa
    from portlm.train.config import DataSettings
    from portlm.train.ngram import train_ngram

    def note(text: str) -> None:
        if not quiet:
            click.echo(f"ngram: {text}", err=True)

    data = DataSettings(texts=texts, tokenizer=tokenizer, validation_fraction=held_out)
    result = train_ngram(data, out, order=order, smoothing=smoothing, context_length=context, note=note)
    note(f"held-out perplexity {result.perplexity:.4g}, {result.bits_per_byte:.4f} bits per byte")
    if arpa is not None:
        export_arpa(result.checkpoint, arpa)
        note(f"{arpa} is written")
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result), default=str, indent=2))
    else:
        click.echo(result.checkpoint)
