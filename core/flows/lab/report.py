"""The lab's results for people: a table of figures beside their bars, and a picture for each experiment."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from portlm.files import write_atomic
from portlm.flows.lab.experiment import Bar
from portlm.flows.lab.runner import Outcome


def write_report(out: Path, outcomes: Sequence[Outcome]) -> Path:
    """Write OUT/report.md, and OUT/NAME/NAME.png where matplotlib is installed; the page says so where it is not.

    Returns:
        The page.

    Raises:
        StorageError: A file cannot be written.
    """
    pictures = find_spec("matplotlib") is not None
    parts = ["# The lab", "", *table(outcomes), ""]
    if not pictures:
        parts += ["There are no pictures: matplotlib is missing, pip install 'portlm[report]'.", ""]
    for outcome in outcomes:
        it = outcome.experiment
        parts += [f"## {it.name}", "", it.shows, "", it.source, ""]
        parts += [f"Seed {seed} failed: {error}\n" for seed, error in outcome.failed.items()]
        if pictures and outcome.measured:
            path = out / it.name / f"{it.name}.png"
            it.draw(outcome.measured, path)
            parts += [f"![{it.name}]({it.name}/{it.name}.png)", ""]
    page = out / "report.md"
    write_atomic(page, "\n".join(parts))
    return page


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the lines of a Markdown table: one row for each bar, with the figure of every seed."""
    lines = ["| experiment | bar | measured | met | seconds |", "|---|---|---|---|---|"]
    for outcome in outcomes:
        name, seconds = outcome.experiment.name, f"{sum(result.seconds for result in outcome.results):.0f}"
        for bar in outcome.experiment.bars:
            lines.append(
                f"| {name} | `{bar}` | {measured(outcome, bar)} | {verdict(outcome, bar)} | {seconds} |"
            )
            name = seconds = ""
    return lines


def measured(outcome: Outcome, bar: Bar) -> str:
    """Return the figure of each seed, in their order, a failed one as a dash."""
    found = outcome.measured
    return ", ".join(
        f"{found[result.seed][bar.figure]:.4g}" if result.seed in found else "–" for result in outcome.results
    )


def verdict(outcome: Outcome, bar: Bar) -> str:
    """Return "met", "missed", or "failed" where a seed has no figure."""
    if outcome.failed:
        return "failed"
    return "met" if outcome.met(bar) else "missed"
