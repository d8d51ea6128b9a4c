"""From rounds to rows: medians, paired ratios against the best rival, and shares of what the machine allows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from portlm.artifact import read_manifest
from portlm.compile.work import token_work
from portlm.flows.measuring import bootstrap, paired_ratio, spread
from portlm.flows.race.contender import Entry, Source
from portlm.flows.race.rounds import Outcome
from portlm.models import load_config

PEAKS = {"f32": "flops", "f16": "flops", "q8": "byte_ops", "q4": "byte_ops"}
"""Which peak a prompt is limited by; half precision is held against float32's, which it may exceed."""


def summarize(
    source: Source, runners: Sequence[tuple[Entry, dict[str, Any]]], outcomes: Mapping[str, Outcome],
    failed: Mapping[str, str],
) -> dict[str, Any]:  # fmt: skip
    """The rows of a race.

    Args:
        source: the weights.
        runners: who passed the gate, with what is known of each.
        outcomes: "quiet", and perhaps "busy".
        failed: who did not, and why.

    Returns:
        ``{"rows": [...], "absent": {name: reason}, "limits": {...}, "rounds": {...}}``. A row's ``measures`` maps
        "quiet/decode@128" and the like to its rate in tokens/s with interval and spread, its share of the limit, and
        the ratio of rates against the best rival of the same precision, and of all.
    """
    config: Any = load_config(source.hf)
    cache_numbers = 2 * config.n_layer * getattr(config, "n_kv_head", config.n_head) * config.head_dim
    multiplies = token_work(source.artifact, read_manifest(source.artifact))[1]
    probed = [round_.limits for outcome in outcomes.values() for round_ in outcome.rounds]
    limits = {
        name: max((found[name] for found in probed), default=0.0) for name in ("read", "flops", "byte_ops")
    }
    absent = dict(failed)
    for outcome in outcomes.values():
        absent |= outcome.failed
    finished = [(entry, facts) for entry, facts in runners if entry.name not in absent]
    rows = []
    for entry, facts in finished:
        cache = cache_numbers * facts["cache_item"]
        measures = {}
        for kind, outcome in outcomes.items():
            for measure in _measures(outcome):
                found = _measure(outcome, entry, measure, [e for e, _ in finished])
                what, _, tokens = measure.partition("@")
                moved = facts["weight_bytes"] + int(tokens) * cache
                if what == "decode" and limits["read"]:
                    found |= {
                        "bytes_s": found["rate"] * moved,
                        "of_limit": found["rate"] * moved / limits["read"],
                    }
                elif what == "prefill" and (peak := limits[PEAKS[entry.precision]]):
                    found["of_limit"] = found["rate"] * 2 * multiplies / peak
                measures[f"{kind}/{measure}"] = found
        rows.append(
            {
                "name": entry.name, "precision": entry.precision, "ours": entry.ours, "note": entry.note,
                "cache_bytes": cache, **facts, "measures": measures,
            }
        )  # fmt: skip
    return {
        "rows": rows,
        "absent": absent,
        "limits": {
            "read_gb_s": limits["read"] / 1e9,
            "fp32_gflop_s": limits["flops"] / 1e9,
            "int8_gop_s": limits["byte_ops"] / 1e9,
        },
        "rounds": {
            kind: {
                "repeated": outcome.repeated,
                "noisy": sum(round_.noisy for round_ in outcome.rounds),
                "rounds": [asdict(round_) for round_ in outcome.rounds],
            }
            for kind, outcome in outcomes.items()
        },
    }


def _measures(outcome: Outcome) -> list[str]:
    names = {name for round_ in outcome.rounds for found in round_.seconds.values() for name in found}
    return sorted(names, key=lambda name: (name.partition("@")[0], int(name.partition("@")[2])))


def _measure(outcome: Outcome, entry: Entry, measure: str, everyone: Sequence[Entry]) -> dict[str, Any]:
    """One cell: the rate of a contender, and its ratio to the fastest of the others' engines."""
    seconds = outcome.samples(entry.name, measure)
    rates = [1 / s for s in seconds]
    found: dict[str, Any] = {
        "rate": statistics.median(rates), "interval": bootstrap(rates), "spread": spread(rates),
    }  # fmt: skip
    rivals = [rival for rival in everyone if not rival.ours]
    for name, pool in (
        ("same", [rival for rival in rivals if rival.precision == entry.precision]),
        ("any", rivals),
    ):
        if pool:
            best = min(pool, key=lambda rival: statistics.median(outcome.samples(rival.name, measure)))
            ratio, interval = paired_ratio(outcome.samples(best.name, measure), seconds)
            found[f"against_{name}"] = {"rival": best.name, "ratio": ratio, "interval": interval}
    return found
