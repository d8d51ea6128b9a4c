"""``portlm doctor``: what this machine can run, and what would add the rest."""

from __future__ import annotations

import json
from typing import Any

import click


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(as_json: bool) -> None:
    """List every engine and device: available, or why not and the command that adds it.

    Each is tried in a process of its own, so a broken driver is reported and not met.
    """
    report = examine()
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    print_report(report)


def examine() -> dict[str, Any]:
    """Return what --json prints: engines, versions, machine and warnings."""
    from portlm.extension import problem
    from portlm.runtimes.probe import conflicts, machine, probe, versions

    about = machine()
    warnings = conflicts()
    if missing := problem():
        warnings.append(f"training and the torch engine are slow: {missing}")
    return {"engines": probe(), "versions": versions(), "machine": about, "warnings": warnings}


def print_report(report: dict[str, Any]) -> None:
    """Print the report as tables for a person."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    engines = Table(title="engines")
    for name in ("engine", "device", "available", "what is there, or what is missing"):
        engines.add_column(name, overflow="fold")
    for row in report["engines"]:
        told = row["detail"] if row["available"] else row["reason"]
        if row["command"]:
            told += f"\n→ {row['command']}"
        mark = Text("yes", "green") if row["available"] else Text("no", "red")
        engines.add_row(row["engine"], row["device"], mark, Text(told))

    about = report["machine"]
    machine = Table(title="machine", show_header=False)
    machine.add_column(overflow="fold")
    machine.add_column(overflow="fold")
    machine.add_row("processor", f"{about['processor']}, {about['cores']} cores")
    sets = ", ".join(about["instruction_sets"])
    machine.add_row("kernels", f"{about['kernels']} (of {sets})" if about["kernels"] else "not built")
    if about["memory_bytes"]:
        total, free = about["memory_bytes"] / 2**30, (about["available_bytes"] or 0) / 2**30
        machine.add_row("memory", f"{total:.1f} GiB, {free:.1f} GiB available")
    machine.add_row("NVIDIA driver", about["nvidia_driver"] or "none")
    machine.add_row("system", f"{about['system']}, Python {about['python']}")
    machine.add_row(
        "packages", ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    )

    console = Console()
    console.print(engines)
    console.print(machine)
    for warning in report["warnings"]:
        console.print(Text(f"warning: {warning}", "yellow"))
