"""The figures of a race as Markdown: one table per question, the machine's name over each, losses and absences in."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]


def markdown(result: dict[str, Any], title: str) -> str:
    """The whole report of one model."""
    machine = _machine(result)
    parts = [f"## {title}\n", _said(result)]
    for heading, columns, cells in (
        ("Decoding", _decode_columns(result), _decode_cells),
        ("Reading a prompt", _prefill_columns(result), _prefill_cells),
        ("Loading, memory and correctness", _LOADING, _loading_cells),
    ):
        parts.append(
            _table(f"{heading} ({machine})", columns, [cells(result, row) for row in result["rows"]])
        )
    if "busy" in result["rounds"]:
        columns, rows = _busy(result)
        parts.append(_table(f"Beside one busy thread ({machine})", columns, rows))
    if result["absent"]:
        absent = [[name, reason] for name, reason in result["absent"].items()]
        parts.append(_table(f"Absent ({machine})", ("contender", "why"), absent))
    return "\n".join(parts)


def _machine(result: dict[str, Any]) -> str:
    environment, rules = result["environment"], result["rules"]
    threads = rules["threads"] or environment["cores"]
    return f"{environment['cpu']}, {environment['isa']}, {environment['cores']} cores, {threads} threads"


def _said(result: dict[str, Any]) -> str:
    """What a reader must know before the first table."""
    limits, environment, rules = result["limits"], result["environment"], result["rules"]
    date = time.strftime("%Y-%m-%d", time.gmtime(environment["unix_time"]))
    lines = [
        f"{date}, {environment['system']}, {', '.join(f'{k} {v}' for k, v in environment['versions'].items())}. "
        f"Limits in this run: {limits['read_gb_s']:.1f} GB/s read, {limits['fp32_gflop_s']:.0f} GFLOP/s fp32, "
        f"{limits['int8_gop_s']:.0f} GOP/s int8. "
        f"Logits compared with {result['reference']}."
    ]
    for kind, found in result["rounds"].items():
        count = len(found["rounds"])
        line = f"{kind.capitalize()}: {count} rounds, {found['repeated']} more thrown away"
        if found["noisy"]:
            most = max(r["disturbed"] for r in found["rounds"])
            line += (
                f". **{found['noisy']} of the {count} were not quiet** (others had up to {most:.0%} of the machine, "
                f"{rules['allowed']:.0%} is allowed): figures of these are not to be quoted"
            )
        lines.append(line + ".")
    return "\n\n".join(lines) + "\n"


def _table(caption: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = list(columns)
    lines = [f"**{caption}**", "", _line(columns), _line(["---"] * len(columns))]
    return "\n".join([*lines, *(_line(row) for row in rows)]) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _of(result: dict[str, Any], what: str, kind: str = "quiet") -> list[str]:
    """Names of the measures of a kind, by the number of tokens."""
    names = {name for row in result["rows"] for name in row["measures"] if name.startswith(f"{kind}/{what}@")}
    return sorted(names, key=lambda name: int(name.partition("@")[2]))


def _rate(row: Row, measure: str) -> str:
    found = row["measures"].get(measure)
    return "-" if found is None else f"{found['rate']:,.1f} ± {found['spread'] / found['rate']:.0%}"


def _share(row: Row, measure: str) -> str:
    share = row["measures"].get(measure, {}).get("of_limit")
    return "-" if share is None else f"{share:.0%}"


def _ratio(row: Row, measure: str, pool: str = "same") -> str:
    """The ratio with its interval and what it is of; bold where the interval lies above 1."""
    found = row["measures"].get(measure, {}).get(f"against_{pool}")
    if found is None:
        return "no rival"
    low, high = found["interval"]
    if found["rival"] == row["name"]:
        return "best rival"
    text = f"{found['ratio']:.2f} [{low:.2f}, {high:.2f}]"
    return (f"**{text}**" if low > 1 else text) + f" {found['rival']}"


def _tokens(measure: str) -> str:
    return measure.partition("@")[2]


def _decode_columns(result: dict[str, Any]) -> list[str]:
    found = ["contender", "weights", "MB per token"]
    for measure in _of(result, "decode"):
        found += [f"tok/s behind {_tokens(measure)}", "of read limit", "x best rival, same bits"]
    return [*found, "x best rival, any (last)"]


def _decode_cells(result: dict[str, Any], row: Row) -> list[str]:
    measures = _of(result, "decode")
    found = [row["name"], row["precision"], f"{row['weight_bytes'] / 1e6:.1f}"]
    for measure in measures:
        found += [_rate(row, measure), _share(row, measure), _ratio(row, measure)]
    return [*found, _ratio(row, measures[-1], "any") if measures else "-"]


def _prefill_columns(result: dict[str, Any]) -> list[str]:
    found = ["contender", "weights"]
    for measure in _of(result, "prefill"):
        found += [f"tok/s of {_tokens(measure)}", "of peak", "x best rival, same bits"]
    return found


def _prefill_cells(result: dict[str, Any], row: Row) -> list[str]:
    found = [row["name"], row["precision"]]
    for measure in _of(result, "prefill"):
        found += [_rate(row, measure), _share(row, measure), _ratio(row, measure)]
    return found


_LOADING = (
    "contender", "import s", "load s", "model MiB", "peak MiB", "cache KB per token", "largest error", "typical error",
    "top-1", "KL nats", "settings",
)  # fmt: skip


def _loading_cells(result: dict[str, Any], row: Row) -> list[str]:
    gate = row["agreement"]
    choice = ", ".join(f"{k} {v}" for k, v in (row["choice"] or {}).items())
    return [
        row["name"], f"{row['import_s']:.1f}", f"{row['load_s']:.2f}", f"{row['model_mib']:.0f}",
        f"{row['peak_mib']:.0f}",
        f"{row['cache_bytes'] / 1e3:.1f}", f"{gate['largest']:.1e}", f"{gate['typical']:.1e}", f"{gate['top1']:.0%}",
        f"{gate['kl']:.1e}", "; ".join(filter(None, (row["note"], choice))),
    ]  # fmt: skip


def _busy(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Rates beside a busy thread, and what is left of those of the quiet machine."""
    measures = [*_of(result, "decode", "busy"), *_of(result, "prefill", "busy")]
    columns, rows = ["contender", "weights"], []
    for measure in measures:
        name = measure.partition("/")[2].replace("@", " ")
        columns += [f"{name} tok/s", "of its quiet rate", "x best rival, same bits"]
    for row in result["rows"]:
        cells = [row["name"], row["precision"]]
        for measure in measures:
            quiet = row["measures"].get(measure.replace("busy/", "quiet/"))
            kept = "-" if quiet is None else f"{row['measures'][measure]['rate'] / quiet['rate']:.0%}"
            cells += [_rate(row, measure), kept, _ratio(row, measure)]
        rows.append(cells)
    return columns, rows
