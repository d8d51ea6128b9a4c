"""``portlm embed``: texts become vectors."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import click
import numpy as np

from portlm.commands.reading import model_options, opened, texts_of


@click.command("embed")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@click.option(
    "--file", "-f", type=click.Path(path_type=Path),
    help="A file with a text on each line, or a folder in which each file is a text, in the order of their names.",
)  # fmt: skip
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Write the vectors to this .npy file.")
@click.option(
    "--pooling", type=click.Choice(["mean", "cls"]), default="mean", show_default=True,
    help="A text's vector is the mean of those of its tokens, or that of the first.",
)  # fmt: skip
@click.option("--normalize/--no-normalize", default=True, help="Make each vector 1 long (default: yes).")
@click.option("--truncate", is_flag=True, help="Cut what is longer than the context, instead of refusing it.")
@model_options
def command(
    model: Path, texts: tuple[str, ...], file: Path | None, out: Path | None, pooling: str, normalize: bool,
    truncate: bool, batch_size: int, as_json: bool, **how: Any,
) -> None:  # fmt: skip
    """Embed each TEXT with MODEL, an encoder: an artifact or (for the torch engine) a checkpoint folder.

    Prints a vector on each line, or writes all to OUT, float32 (texts, width). Without TEXT, lines of stdin are texts.
    For example: portlm embed minilm "a cat" "a dog"; portlm embed minilm --file notes/ --out notes.npy --truncate
    """
    given, names = texts_of(texts, file)
    with opened(model, **how) as session:
        vectors = session.embed(
            given, pooling=pooling, normalize=normalize, truncate=truncate, batch_size=batch_size
        )
    if out is not None:
        from portlm.files import write_atomic

        raw = io.BytesIO()
        np.save(raw, vectors, allow_pickle=False)
        write_atomic(out, raw.getvalue())
    if as_json:
        shown: dict[str, Any] = {"texts": names, "width": vectors.shape[1]}
        shown |= {"path": str(out)} if out is not None else {"vectors": vectors.tolist()}
        click.echo(json.dumps(shown, ensure_ascii=False))
    elif out is not None:
        click.echo(out)
    else:
        for vector in vectors:
            click.echo(" ".join(f"{value:.7g}" for value in vector))
