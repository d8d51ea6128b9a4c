"""``portlm verify``: the same answer on every engine, proved on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from portlm.commands.engines import engine_options

if TYPE_CHECKING:
    from portlm.artifact import Manifest
    from portlm.flows.verify import Result


@click.command("verify")
@click.argument("model", type=click.Path(path_type=Path))
@engine_options("Check", "everything that runs here")
@click.option("--certify", is_flag=True, help="Write the certificate anew instead of checking against it.")
@click.option(
    "--bisect/--no-bisect",
    "search",
    default=True,
    show_default=True,
    help="Search for the node that differs.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(
    model: Path, engines: tuple[str, ...], device: str | None, profile: str | None, certify: bool, search: bool,
    as_json: bool,
) -> int:  # fmt: skip
    """Check every file of the artifact MODEL, and every engine against eager PyTorch.

    The first call writes the parity certificate into the manifest; later calls measure again and compare. If an
    engine differs, the first node that does is named and the exit code is 1.
    """
    from portlm.artifact import read_manifest
    from portlm.flows.targets import read_choices
    from portlm.flows.verify import verify_artifact

    choices = read_choices(engines, device, profile)
    results = verify_artifact(
        model,
        [choice.target() for choice in choices] if engines else None,
        only=choices[0],
        certify=certify,
        search=search,
        progress=lambda message: click.echo(f"verify: {message}", err=True),
    )
    if as_json:
        click.echo(json.dumps([result.as_dict() for result in results], indent=2))
    else:
        print_table(model, results, read_manifest(model))
    return int(any(result.problem for result in results))


def print_table(model: Path, results: list[Result], manifest: Manifest | None = None) -> None:
    """Print one row per target, and beneath the table what the weights are and what is wrong."""
    from rich.console import Console

    from portlm.commands.tables import figures
    from portlm.compile.parity import allowed_error
    from portlm.flows.contents import described_numbers
    from portlm.quantization import EIGHT_BITS, FIFTEEN_BITS

    table = figures(
        f"{model}: distance from eager PyTorch",
        ("engine", "profile"),
        ("logit\nerror", "allowed", "logits\nup to", "before", "KL", "top-1", "greedy", "off\ndevice"),
        gap=1,
    )
    for result in results:
        row = result.row
        if row is None:
            continue
        scale = row.logit_scale or 0.0
        role = "" if row.role == "decoder" else f" {row.role}"
        table.add_row(
            f"{row.engine}:{row.device}{role}", row.profile, f"{row.max_logit_error:.1e}",
            f"{allowed_error(scale, row.precision):.1e}" if row.precision != EIGHT_BITS else "", f"{scale:.3g}",
            f"{result.recorded.max_logit_error:.1e}" if result.recorded else "written",
            f"{row.kl:.1e}", f"{row.top1:.1%}", f"{row.greedy_match}/{row.greedy_total}", str(len(row.fallback)),
        )  # fmt: skip
    console = Console()
    if table.row_count:
        console.print(table)
    for line in described_numbers(manifest) if manifest else ():
        console.print(line, highlight=False, soft_wrap=True)
    for precision, bits in ((FIFTEEN_BITS, 15), (EIGHT_BITS, 8)):
        rounding = [
            f"{r.row.engine}:{r.row.device} {r.row.profile}"
            for r in results
            if r.row and r.row.precision == precision
        ]
        if rounding:
            names = ", ".join(dict.fromkeys(rounding))
            line = f"{names}: activations have {bits} bits where they meet quantized weights"
            console.print(line, highlight=False, soft_wrap=True)
    for result in results:
        if result.problem:
            # An engine's own messages begin with its name.
            problem = result.problem.removeprefix(f"{result.target.engine}:{result.target.device}: ")
            console.print(f"{result.target}: {problem}", highlight=False, style="red", soft_wrap=True)
        if result.node:
            console.print(f"  {result.node}", highlight=False, soft_wrap=True)
