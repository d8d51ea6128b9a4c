"""``portlm engines``: what an artifact holds, and which engines run it here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from portlm.flows.contents import Contents


@click.command("engines")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(model: Path, as_json: bool) -> None:
    """List the engines of this machine that run the artifact MODEL, and what its weights and its cache are.

    Nothing is run: what is shown of an engine's answer is what 'portlm verify' measured.
    """
    from portlm.flows.contents import contents

    found = contents(model, lambda message: click.echo(f"engines: {message}", err=True))
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=2))
        return
    print_contents(model, found)


def print_contents(model: Path, found: Contents) -> None:
    """Print a table of engines, and beneath it what the weights are."""
    from rich.console import Console

    from portlm.commands.tables import figures
    from portlm.flows.contents import described_numbers, weights

    manifest = found.manifest
    table = figures(f"{model}: engines", ("engine", "profile", "precision"), ("logit error", "measured"))
    for target in found.targets:
        for role in manifest.roles:
            row = found.certificate(target, role)
            name = f"{target.engine}:{target.device}" + ("" if role == "decoder" else f" {role}")
            measured = (row.precision, f"{row.max_logit_error:.1e}", row.date) if row else ("", "", "never")
            table.add_row(name, target.profile, *measured)
    console = Console()
    console.print(table)
    cache = "float32" if manifest.cache is None else manifest.cache.kind
    about = f"{manifest.model.family} of {manifest.model.parameters:,} parameters"
    for line in (f"{about}, weights {weights(manifest)}, cache {cache}", *described_numbers(manifest)):
        console.print(line, highlight=False, soft_wrap=True)
