"""``portlm import``: a Hugging Face folder, a GGUF file or a file of word vectors becomes a portlm checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("import")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--context", type=int, metavar="N",
    help="Positions to use, where rotary positions depend on how many there are (longrope).",
)  # fmt: skip
@click.option(
    "--keep-integers", is_flag=True,
    help="Of a GGUF file in Q4_0 or Q8_0: keep the scales, so that export --quantize has the file's own numbers.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the path.")
def command(source: Path, out: Path, context: int | None, keep_integers: bool, as_json: bool) -> None:
    """Import the model in SOURCE, of a family that portlm has, into the checkpoint folder OUT.

    SOURCE is a Hugging Face folder, of which safetensors, config.json and tokenizer.json are read, a GGUF file, or a
    text file (.vec, .txt) of word vectors as word2vec and GloVe write them; never a pickle, never code. Prints the path
    of OUT, and on stderr what was changed or left out.
    """
    from portlm.errors import UsageError
    from portlm.hub import import_hf
    from portlm.hub_gguf import SUFFIX, import_gguf
    from portlm.hub_word2vec import SUFFIXES, import_word2vec

    if keep_integers and source.suffix != SUFFIX:
        raise UsageError(
            f"--keep-integers is for {SUFFIX} files, whose weights may be whole numbers: leave it out"
        )
    if source.suffix in SUFFIXES and not source.is_dir():
        if context is not None:
            raise UsageError(
                "--context is for models with rotary positions, and word vectors have none: leave it out"
            )
        done = import_word2vec(source, out)
    else:
        done = (
            import_gguf(source, out, context, keep_integers)
            if source.suffix == SUFFIX
            else import_hf(source, out, context)
        )
    for note in done.notes:
        click.echo(f"import: {note}", err=True)
    click.echo(json.dumps({"path": str(out), "notes": done.notes}) if as_json else out)
