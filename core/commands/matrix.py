"""``portlm matrix``: every family on every engine that is here, against eager PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from portlm.commands.engines import engine_options

if TYPE_CHECKING:
    from portlm.flows.matrix import Matrix


@click.command("matrix")
@click.option("--family", "families", multiple=True, help="Only this one; repeat for several (default: all).")
@click.option(
    "--out", "-o", default="matrix", show_default=True, type=click.Path(path_type=Path),
    help="Folder of the results; what is there of the same versions is kept.",
)  # fmt: skip
@engine_options("Measure", "everything that runs here")
@click.option("--seed", default=0, show_default=True, help="Of the weights.")
@click.option("--anew", is_flag=True, help="Measure again what OUT already has.")
@click.option(
    "--markdown", type=click.Path(path_type=Path), help="Also write the matrix as a page, to this file."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(
    families: tuple[str, ...], out: Path, engines: tuple[str, ...], device: str | None, profile: str | None, seed: int,
    anew: bool, markdown: Path | None, as_json: bool,
) -> int:  # fmt: skip
    """Export a small random model of every family, and compare every role on every engine with eager PyTorch.

    Also counts the parameters of every published size. What an engine refuses is shown with its reason. If an engine
    differs, or a count does, the exit code is 1.
    """
    import msgspec

    from portlm.commands.progress import lines_or_bar
    from portlm.files import write_atomic
    from portlm.flows.matrix import markdown as page
    from portlm.flows.matrix import measure
    from portlm.flows.targets import read_choices

    given = engines or device is not None or profile is not None
    only = read_choices(engines, device, profile) if given else []
    with lines_or_bar("matrix") as progress:
        matrix = measure(families, out, only=only, seed=seed, anew=anew, progress=progress)
    if markdown is not None:
        write_atomic(markdown, page(matrix))
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(matrix) | {"wrong": matrix.wrong}, indent=2))
    else:
        _print(matrix)
    return int(bool(matrix.wrong))


def _print(matrix: Matrix) -> None:
    from rich.console import Console

    from portlm.commands.tables import figures

    table = figures(
        "distance from eager PyTorch", ("model", "role", "target"),
        ("error", "allowed", "greedy", "beams", "off\ndevice"), gap=1,
    )  # fmt: skip
    console = Console()
    for variant in matrix.variants:
        name = variant.name
        for cell in variant.cells:
            if cell.error is None:
                table.add_row(name, cell.role, cell.target, cell.verdict, "", "", "", "")
            else:
                counts = ["/".join(map(str, pair)) if pair[1] else "" for pair in (cell.greedy, cell.beams)]
                table.add_row(
                    name, cell.role, cell.target, f"{cell.error:.1e}", f"{cell.allowed:.1e}", *counts,
                    str(cell.off_device),
                )  # fmt: skip
            name = ""
    console.print(table)
    lines = [
        f"{variant.name} {cell.role} on {cell.target}: {cell.reason}"
        for variant in matrix.variants
        for cell in variant.cells
        if cell.verdict == "refused"
    ]
    lines += [f"not measured: {target}: {reason}" for target, reason in matrix.absent.items()]
    right = sum(p.counted == p.expected for p in matrix.presets)
    lines.append(
        f"{right} of {len(matrix.presets)} published sizes have the number of parameters they must have"
    )
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for line in matrix.wrong:
        console.print(line, highlight=False, markup=False, soft_wrap=True, style="red")
