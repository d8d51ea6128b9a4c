"""``portlm lab``: what papers claim, repeated small, each figure beside its bar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from portlm.flows.lab.runner import Outcome


@click.command("lab")
@click.argument("name", metavar="NAME|all|list")
@click.option(
    "--out", "-o", default="lab", show_default=True, type=click.Path(path_type=Path),
    help="Folder of the results and the report; results that are there are kept.",
)  # fmt: skip
@click.option(
    "--data", type=click.Path(path_type=Path),
    help="Folder of the data that an experiment needs; without it, `all` leaves out those that need some.",
)  # fmt: skip
@click.option("--seeds", type=click.IntRange(1), help="Only the first so many seeds (default: all).")
@click.option(
    "--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads to compute on."
)
@click.option(
    "--jobs", "-j", type=click.IntRange(1), default=1, show_default=True,
    help="Seeds that run at a time, each in a process of its own with as many threads.",
)  # fmt: skip
@click.option("--anew", is_flag=True, help="Run again what OUT already has.")
@click.option("--check", is_flag=True, help="Exit with code 1 if a bar is missed.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(
    name: str, out: Path, data: Path | None, seeds: int | None, threads: int, jobs: int, anew: bool,
    check: bool, as_json: bool,
) -> int:  # fmt: skip
    """Run the experiment NAME, or all, and set each figure beside what it must reach.

    Writes OUT/NAME/SEED.json for each seed and OUT/report.md with a picture of each experiment. A second call goes on
    where the first stopped. If a seed fails the exit code is 1.
    """
    from portlm.flows.lab import EXPERIMENTS, find
    from portlm.flows.lab.experiment import DataExperiment

    names = list(EXPERIMENTS) if name in ("all", "list") else [name]
    experiments = [find(each) for each in names]
    if name == "list":
        _list(experiments, as_json)
        return 0
    if name == "all" and data is None:
        for it in experiments:
            if isinstance(it, DataExperiment):
                click.echo(f"lab: {it.name} is left out: it needs --data, a folder with {it.needs}", err=True)
        experiments = [it for it in experiments if not isinstance(it, DataExperiment)]
    from portlm.commands.progress import lines_or_bar
    from portlm.flows.lab.report import write_report
    from portlm.flows.lab.runner import run_lab
    from portlm.train.allocator import keep_freed_memory

    keep_freed_memory()  # as `portlm pretrain` does
    with lines_or_bar("lab") as progress:
        outcomes = run_lab(
            experiments, out,
            seeds=seeds, threads=threads, jobs=jobs, anew=anew, data=data, progress=progress,
        )  # fmt: skip
    page = write_report(out, outcomes)
    if as_json:
        click.echo(json.dumps([outcome.as_dict() for outcome in outcomes], indent=2))
    else:
        _print(outcomes, page)
    missed = check and not all(outcome.met(bar) for outcome in outcomes for bar in outcome.experiment.bars)
    return int(missed or any(outcome.failed for outcome in outcomes))


def _list(experiments: list[Any], as_json: bool) -> None:
    from portlm.flows.lab.experiment import DataExperiment

    if as_json:
        rows = [
            {"name": it.name, "shows": it.shows, "source": it.source, "seeds": it.seeds,
             "bars": [str(bar) for bar in it.bars],
             "data": it.needs if isinstance(it, DataExperiment) else None}
            for it in experiments
        ]  # fmt: skip
        click.echo(json.dumps(rows, indent=2))
        return
    for it in experiments:
        click.echo(f"{it.name}: {it.shows}")
        click.echo(f"    {it.source}")
        click.echo(f"    {', '.join(map(str, it.bars))}")
        if isinstance(it, DataExperiment):
            click.echo(f"    needs --data, a folder with {it.needs}")


def _print(outcomes: list[Outcome], page: Path) -> None:
    from rich.console import Console

    from portlm.commands.tables import figures
    from portlm.flows.lab.report import measured, verdict

    table = figures("the lab", ("experiment", "bar"), ("measured", "met"))
    for outcome in outcomes:
        name = outcome.experiment.name
        for bar in outcome.experiment.bars:
            table.add_row(name, str(bar), measured(outcome, bar), verdict(outcome, bar))
            name = ""
    console = Console()
    console.print(table)
    for outcome in outcomes:
        for seed, error in outcome.failed.items():
            text = f"{outcome.experiment.name}, seed {seed}: {error}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
