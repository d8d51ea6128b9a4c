"""``portlm import``: a Hugging Face folder, or a file of another program, becomes a portlm checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("import")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--tokenizer", type=click.Path(path_type=Path),
    help="tokenizer.json, or a folder with one, whose tokens the words of an ARPA file are.",
)  # fmt: skip
@click.option(
    "--context", type=int, metavar="N",
    help="Positions to use, where rotary positions depend on how many there are (longrope).",
)  # fmt: skip
@click.option(
    "--keep-integers", is_flag=True,
    help="Of a GGUF file in Q4_0 or Q8_0: keep the scales, so that export --quantize has the file's own numbers.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the path.")
def command(
    source: Path, out: Path, tokenizer: Path | None, context: int | None, keep_integers: bool, as_json: bool
) -> None:
    """Import the model in SOURCE, of a family that portlm has, into the checkpoint folder OUT.

    SOURCE is a Hugging Face folder, of which safetensors, config.json and tokenizer.json are read, a GGUF file, a text
    file (.vec, .txt) of word vectors as word2vec and GloVe write them, or an n-gram model (.arpa, .arpa.gz); never a
    pickle, never code. Prints the path of OUT, and on stderr what was changed or left out.
    """
    from portlm import hub_arpa
    from portlm.errors import UsageError
    from portlm.hub import import_hf
    from portlm.hub_gguf import SUFFIX, import_gguf
    from portlm.hub_word2vec import SUFFIXES, import_word2vec

    arpa, vectors = (
        source.name.endswith(suffixes) and not source.is_dir()
        for suffixes in (hub_arpa.SUFFIXES, tuple(SUFFIXES))
    )
    if tokenizer is not None and not arpa:
        raise UsageError("--tokenizer says what the words of an ARPA file are: leave it out")
    if keep_integers and source.suffix != SUFFIX:
        raise UsageError(
            f"--keep-integers is for {SUFFIX} files, whose weights may be whole numbers: leave it out"
        )
    if context is not None and (arpa or vectors):
        raise UsageError("--context is for models with rotary positions, and this one has none: leave it out")
    if arpa:
        done = hub_arpa.import_arpa(source, out, tokenizer)
    elif vectors:
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
