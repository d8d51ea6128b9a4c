"""``portlm average``: the mean of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import click

from portlm.errors import UsageError


@click.command("average")
@click.argument(
    "checkpoints", metavar="RUN|CHECKPOINT...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option("--out", "-o", required=True, type=click.Path(path_type=Path), help="Folder of the mean.")
@click.option("--last", type=click.IntRange(2), help="Of a RUN: its newest checkpoints (default: 5).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the checkpoint's path.")
def command(checkpoints: tuple[Path, ...], out: Path, last: int | None, as_json: bool) -> None:
    """Average the weights of the last checkpoints of a RUN, or of some CHECKPOINTs of one model.

    A run keeps as many checkpoints as --set checkpoint.keep=N says. The mean is a checkpoint like any other.
    For example: portlm average run --last 5 --out run/average
    """
    from portlm.train.average import average, last_checkpoints

    chosen = list(checkpoints)
    if len(chosen) == 1:
        chosen = last_checkpoints(chosen[0], last or 5)
    elif last is not None:
        raise UsageError("--last is for one RUN: leave it out where checkpoints are named")
    made = average(chosen, out)
    if as_json:
        click.echo(
            json.dumps({"checkpoint": str(made), "averaged": [str(path) for path in chosen]}, indent=2)
        )
    else:
        click.echo(made)
