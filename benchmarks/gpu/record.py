"""What a check found: lines of JSON that are written as they happen, and the table that is made of them at the end.

A line is either a figure (``{"section", "case", ...}``, written by the section while it runs, so that a time limit
loses nothing that was measured) or the end of a section (``{"section", "status", "reason", "seconds"}``).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RECORDS, REPORT, TABLE, LOG = "records.jsonl", "gpu-check.json", "gpu-check.md", "log.txt"
Line = dict[str, Any]


def append(path: Path, line: Line) -> None:
    """Add one line and make sure that it is on the disk, whatever happens next."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Line]:
    """Return the lines of a file; one that was cut off while it was written is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def write_report(out: Path, about: Line) -> None:
    """Write the JSON report and the Markdown table from the lines that are there."""
    lines = read(out / RECORDS)
    report = {
        **about,
        "sections": [line for line in lines if "status" in line],
        "figures": [line for line in lines if "status" not in line],
    }
    (out / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / TABLE).write_text(markdown(report), encoding="utf-8")


def markdown(report: Line) -> str:
    """Return the page section: what it was measured on, one row per section, one row per figure."""
    facts = {line["case"]: line["value"] for line in report["figures"] if "value" in line}
    device = facts.get("device", "no CUDA device")
    title = "dry run, nothing was launched or timed" if report["dry_run"] else device
    text = [f"## {report['date']}: {title}", ""]
    text += [f"- {name}: {value}" for name, value in {"portlm": report["commit"], **facts}.items()]
    text += ["", "| section | result | s | what it says |", "| --- | --- | ---: | --- |"]
    for line in report["sections"]:
        reason = _cell(line["reason"])
        text.append(f"| {line['section']} | {line['status']} | {line['seconds']:.0f} | {reason} |")
    checks = [line for line in report["figures"] if "claim" in line]
    if checks:
        text += ["", "| checked | result |", "| --- | --- |"]
        text += [f"| {_cell(line['case'])} | {_cell(line['claim'])} |" for line in checks]
    timed = [line for line in report["figures"] if "contender" in line]
    if report["dry_run"]:
        timed = [
            line for line in timed if line.get("absent")
        ]  # nothing was timed: only who cannot run is news
    if timed:
        text += [
            "",
            "| section | case | contender | time | rate | of limit | portlm is faster by |",
            "| --- | --- | --- | ---: | ---: | ---: | --- |",
            *(_figure(line) for line in timed),
        ]
    return "\n".join(text) + "\n"


def _figure(line: Line) -> str:
    cells = [line["section"], _cell(line["case"]), line["contender"]]
    if line.get("absent"):
        return "| " + " | ".join([*cells, "", "", "", f"absent: {_cell(line['absent'])}"]) + " |"
    seconds, rate, share, interval = (line.get(k) for k in ("seconds", "rate", "of_limit", "interval"))
    cells.append("" if seconds is None else f"{1e3 * seconds:,.3f} ms")
    cells.append("" if rate is None else f"{rate:,.0f} {line['unit']}")
    cells.append("" if share is None else f"{share:.0%}")
    if interval is None:
        cells.append("")
    else:
        low, high = interval
        verdict = "" if low > 1 else ", slower" if high < 1 else ", no difference shown"
        cells.append(f"{line['ratio']:.2f} [{low:.2f}, {high:.2f}]{verdict}")
    return "| " + " | ".join(cells) + " |"


def _cell(text: str) -> str:
    """Return text that breaks no table."""
    return " ".join(str(text).split()).replace("|", "\\|")
