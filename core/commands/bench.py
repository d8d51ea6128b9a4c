"""``portlm bench``: every engine on one model, beside the machine's limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from portlm.commands.engines import engine_options


@click.command("bench")
@click.argument("model", type=click.Path(path_type=Path))
@engine_options("Measure", "everything available here")
@click.option("--prompt", default=128, show_default=True, help="Prompt length in tokens.")
@click.option("--tokens", "-n", default=64, show_default=True, help="Decoded tokens per sample.")
@click.option(
    "--rounds", "-r", default=5, show_default=True, help="Samples per engine, after one to warm up."
)
@click.option("--threads", type=int, help="Threads per engine (default: the engine's own choice).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(
    model: Path, engines: tuple[str, ...], device: str | None, profile: str | None, prompt: int, tokens: int,
    rounds: int, threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure prefill, decode, load time and memory of the artifact MODEL on every engine.

    Engines run interleaved, each in its own process. "of limit" is the share of what this machine's memory
    bandwidth (decode) or multiply-add rate (prefill) allows, probed in the same run.
    """
    from portlm.flows.bench import measure
    from portlm.flows.targets import default_targets, read_targets

    targets = read_targets(engines, device, profile, [] if engines else default_targets(model))
    result = measure(
        model, targets, prompt=prompt, tokens=tokens, rounds=rounds, threads=threads,
        progress=lambda message: click.echo(f"bench: {message}", err=True),
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    print_table(result)


def print_table(result: dict[str, Any]) -> None:
    """Print the rows as a table, and beneath it the limits and what failed."""
    from rich.console import Console

    from portlm.commands.tables import figures

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.0%}"

    def spread(row: dict[str, Any], name: str) -> str:
        return share(row[f"{name}_spread"] / row[f"{name}_tok_s"])

    settings = result["settings"]
    table = figures(
        f"{result['model']}: prompt {settings['prompt']}, {settings['tokens']} tokens decoded",
        ("engine", "profile"),
        (
            "prefill\ntok/s", "±", "of\nlimit", "decode\ntok/s", "±", "of\nlimit", "load\ns", "model\nMiB",
            "peak\nMiB",
        ),
        gap=1,
    )  # fmt: skip
    for row in result["rows"]:
        table.add_row(
            f"{row['engine']}:{row['device']}", row["profile"],
            f"{row['prefill_tok_s']:,.0f}", spread(row, "prefill"), share(row["prefill_of_limit"]),
            f"{row['decode_tok_s']:,.0f}", spread(row, "decode"), share(row["decode_of_limit"]),
            f"{row['load_s']:.2f}", f"{row['model_mib']:.0f}", f"{row['peak_rss_mib']:.0f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    limits = result["limits"]
    console.print(
        f"limit in this run: {limits['read_bandwidth_gb_s']:.1f} GB/s read, "
        f"{limits['fp32_gflop_s']:.0f} GFLOP/s fp32; ± is the interquartile range, as a share of the median",
        soft_wrap=True,
    )
    for failure in result["failed"]:
        console.print(f"not measured: {failure['reason']}", highlight=False, soft_wrap=True)
