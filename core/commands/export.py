"""``portlm export``: a checkpoint as ONNX or as a Hugging Face folder."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import click

from portlm.errors import UsageError


@click.command("export")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "form",
    type=click.Choice(["onnx", "hf"]),
    default="onnx",
    show_default=True,
    help="onnx: an artifact for 'portlm compile' and portlm.load; hf: a folder that transformers opens.",
)
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    type=click.Choice(["portable", "fused"]),
    help="Which graphs to write (default: both).",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the path.")
def command(checkpoint: Path, out: Path, form: str, profiles: tuple[str, ...], as_json: bool) -> None:
    """Export CHECKPOINT (from pretrain or import) to the folder OUT, and print OUT.

    The same checkpoint always gives the same bytes.
    """
    if form == "hf":
        from portlm.hub import export_hf

        if profiles:
            raise UsageError("--profile chooses ONNX graphs, and --to hf writes none: leave it out")
        for note in export_hf(checkpoint, out).notes:
            click.echo(f"export: {note}", err=True)
    else:
        from portlm.compile.export import export

        with warnings.catch_warnings(record=True, action="always", category=UserWarning) as caught:
            export(checkpoint, out, profiles=profiles or ("portable", "fused"))
        for warning in caught:
            click.echo(f"export: {warning.message}", err=True)
    click.echo(json.dumps({"path": str(out), "form": form}) if as_json else out)
