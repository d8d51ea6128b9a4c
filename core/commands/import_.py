"""``portlm import``: a Hugging Face folder becomes a portlm checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("import")
@click.argument("hf_dir", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the path.")
def command(hf_dir: Path, out: Path, as_json: bool) -> None:
    """Import the model in HF_DIR, of a family that portlm has, into the checkpoint folder OUT.

    Reads safetensors, config.json and tokenizer.json; never a pickle, never code. Prints the path of OUT,
    and on stderr what was changed or left out.
    """
    from portlm.hub import import_hf

    done = import_hf(hf_dir, out)
    for note in done.notes:
        click.echo(f"import: {note}", err=True)
    click.echo(json.dumps({"path": str(out), "notes": done.notes}) if as_json else out)
