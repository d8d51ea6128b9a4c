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
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the path.")
def command(source: Path, out: Path, tokenizer: Path | None, as_json: bool) -> None:
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

    if source.name.endswith(hub_arpa.SUFFIXES) and not source.is_dir():
        done = hub_arpa.import_arpa(source, out, tokenizer)
    elif tokenizer is not None:
        raise UsageError("--tokenizer says what the words of an ARPA file are: leave it out")
    elif source.suffix in SUFFIXES and not source.is_dir():
        done = import_word2vec(source, out)
    else:
        done = import_gguf(source, out) if source.suffix == SUFFIX else import_hf(source, out)
    for note in done.notes:
        click.echo(f"import: {note}", err=True)
    click.echo(json.dumps({"path": str(out), "notes": done.notes}) if as_json else out)
