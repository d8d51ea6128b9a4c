"""The figures of a race as pictures: decoding under the roof that memory sets, and reading a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, THEIRS = "tab:blue", "tab:gray"


def draw(result: dict[str, Any], title: str, folder: Path) -> list[Path]:
    """Write roofline.png, and a picture of bars for every measure; return the files."""
    machine = f"{title}, {result['environment']['cpu']}"
    files = [_roofline(result, machine, folder / "roofline.png")]
    measures = {name: None for row in result["rows"] for name in row["measures"]}
    for measure in measures:
        name = measure.replace("/", "-").replace("@", "-")
        files.append(_bars(result, measure, machine, folder / f"{name}.png"))
    return files


def _roofline(result: dict[str, Any], title: str, path: Path) -> Path:
    """Tokens per second over bytes read per token, with the line that the read limit of the same run draws."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    limit = result["limits"]["read_gb_s"] * 1e9
    xs = []
    for row in result["rows"]:
        for measure, found in row["measures"].items():
            if not measure.startswith("quiet/decode@"):
                continue
            moved = row["weight_bytes"] + int(measure.partition("@")[2]) * row["cache_bytes"]
            xs.append(moved)
            axes.plot(moved / 1e6, found["rate"], "o", color=OURS if row["ours"] else THEIRS)
            label = f"{row['name']} @{measure.partition('@')[2]}"
            axes.annotate(label, (moved / 1e6, found["rate"]), (4, 2), textcoords="offset points", fontsize=6)
    if xs:
        ends = [min(xs) / 1.5, max(xs) * 1.5]
        axes.plot(
            [x / 1e6 for x in ends],
            [limit / x for x in ends],
            "k--",
            label=f"read limit, {limit / 1e9:.1f} GB/s",
        )
        axes.legend()
    axes.set(
        xscale="log", yscale="log", xlabel="MB read per token, cache included", ylabel="tokens/s", title=title
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _bars(result: dict[str, Any], measure: str, title: str, path: Path) -> Path:
    """Median rate with its 95 % interval, and the mark that the limit of the same run sets for each."""
    rows = [row for row in result["rows"] if measure in row["measures"]]
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(rows) + 1.5), layout="constrained")
    for place, row in enumerate(reversed(rows)):
        found = row["measures"][measure]
        low, high = found["interval"]
        rate = found["rate"]
        axes.barh(place, rate, color=OURS if row["ours"] else THEIRS)
        axes.errorbar(
            rate, place, xerr=[[max(0, rate - low)], [max(0, high - rate)]], color="black", capsize=3
        )
        if found.get("of_limit"):
            axes.plot([rate / found["of_limit"]] * 2, [place - 0.4, place + 0.4], "r-")
    axes.set(yticks=range(len(rows)), yticklabels=[row["name"] for row in reversed(rows)], xlabel="tokens/s")
    axes.set_title(f"{measure}: {title}\nred: what the limit of this run allows", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
