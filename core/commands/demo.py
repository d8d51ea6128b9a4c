"""``portlm demo``: the whole path on one machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


@click.command("demo")
@click.option(
    "--out",
    "-o",
    default="demo",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder for the model and the report; an earlier demonstration there is replaced.",
)
@click.option("--steps", type=click.IntRange(1), help="Training steps (default: enough for readable text).")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON instead of a table.")
def command(out: Path, steps: int | None, as_json: bool) -> None:
    """Train a small GPT on Python's own documentation and run it on every engine here.

    Trains a tokenizer and a model, exports it to ONNX, compiles it, proves that every engine gives the answer of
    eager PyTorch, measures them, and writes OUT/report.json and OUT/report.html. Takes a few minutes on two cores.
    """
    from portlm.flows.demo import run

    report = run(out, steps=steps, progress=lambda message: click.echo(f"demo: {message}", err=True))
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    _print(report, out)


def _print(report: dict[str, Any], out: Path) -> None:
    from rich.console import Console

    from portlm.commands.tables import figures

    console = Console()
    train = report["train"]
    console.print(
        f"trained {train['parameters']:,} parameters on {train['tokens']:,} tokens in {train['seconds']:.0f} s: "
        f"held-out bits per byte {train['val_bits_per_byte_start']:.2f} -> {train['val_bits_per_byte_end']:.2f}, "
        f"{train['reference_bits_per_byte']:.2f} of the language reference alone",
        highlight=False,
    )
    table = figures(
        "the same model on every engine",
        ("engine", "profile"),
        (
            "max logit\nerror", "greedy", "off\ndevice", "prefill\ntok/s", "decode\ntok/s", "load\ns",
        ),
    )  # fmt: skip
    for row in report["engines"]:
        table.add_row(
            f"{row['engine']}:{row['device']}", row["profile"], f"{row['max_logit_error']:.1e}",
            f"{row['greedy_match']}/{row['greedy_total']}", str(row["fallback_nodes"]),
            f"{row['prefill_tok_s']:,.0f}", f"{row['decode_tok_s']:,.0f}", f"{row['load_s']:.2f}",
        )  # fmt: skip
    console.print(table)
    for line in report["missing"]:
        console.print(f"not on this machine: {line}", highlight=False)
    console.rule("sample")
    console.print(report["sample"], markup=False, highlight=False)
    console.rule()
    console.print(f"report: {out / 'report.html'} and {out / 'report.json'}", highlight=False)
