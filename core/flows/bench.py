"""Compare engines on one model: prefill, decode, load and memory, interleaved in one run, beside the machine's limit.

Every engine lives in a process of its own, parked while another is measured. Each round visits all engines, in a
rotated order, so that a slow minute of a shared machine hits all of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from portlm.errors import PortlmError, UsageError
from portlm.extension import load_extension
from portlm.flows.measuring import bootstrap, environment, spread
from portlm.flows.targets import Target, default_targets
from portlm.flows.worker_process import WorkerProcess

__all__ = ["Row", "Target", "default_targets", "measure"]

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """What was measured for one target. Rates are medians over the rounds, spreads the interquartile range.

    ``prefill_interval`` and ``decode_interval`` are the bootstrapped 95 % intervals of those medians.
    ``decode_of_limit`` is the share of the rate at which this machine could read the weights once per token, and
    ``prefill_of_limit`` the share of its peak multiply-add rate; both limits were probed between the rounds.
    """

    engine: str
    device: str
    profile: str
    prefill_tok_s: float
    prefill_spread: float
    prefill_interval: tuple[float, float]
    decode_tok_s: float
    decode_spread: float
    decode_interval: tuple[float, float]
    load_s: float
    model_mib: float
    peak_rss_mib: float
    prefill_of_limit: float | None
    decode_of_limit: float | None


class Process(WorkerProcess):
    """The worker process of a target."""

    def __init__(self, target: Target):
        super().__init__(str(target), "portlm.flows.bench_worker")
        self.target = target


def measure(
    model: Path,
    targets: Iterable[Target],
    *,
    prompt: int = 128,
    tokens: int = 64,
    rounds: int = 5,
    threads: int | None = None,
    progress: Progress = lambda message: None,
) -> dict[str, Any]:
    """Measure every target on one artifact.

    Args:
        model: artifact folder.
        targets: what to compare; one that cannot be loaded is reported with its reason, not dropped silently.
        prompt: prompt length in tokens of the prefill, and of the cache that decoding starts behind.
        tokens: greedy single-token steps per decode sample.
        rounds: samples per target, after one that is not counted.
        threads: threads per engine; None leaves the engine's default.
        progress: called with a line before each step.

    Returns:
        ``{"model", "settings", "environment", "limits", "rows": [Row as dict], "failed": [{"target", "reason"}]}``.

    Raises:
        ExtensionError: portlm's kernels, which measure the limits, are not built.
        UsageError: a count below 1, or prompt + tokens beyond the context.
        FormatError: the folder is no artifact.
        PortlmError: not one target could be measured.
    """
    check_counts(model, prompt, tokens, rounds)
    load_extension()  # for the limits
    processes: list[Process] = []
    loaded: dict[Target, dict[str, Any]] = {}
    failed = []
    prober = Process(Target("probe", "cpu"))
    try:
        for target in targets:
            progress(f"load {target}")
            process = Process(target)
            try:
                loaded[target] = process.call(
                    "load", path=str(model), engine=target.engine, device=target.device, profile=target.profile,
                    threads=threads,
                )  # fmt: skip
                processes.append(process)
            except PortlmError as error:
                failed.append({"target": str(target), "reason": str(error)})
                process.close()
        if not loaded:
            raise PortlmError("no engine could be measured: " + "; ".join(f["reason"] for f in failed))
        prefill: dict[Target, list[float]] = {target: [] for target in loaded}
        decode: dict[Target, list[float]] = {target: [] for target in loaded}
        limits: list[dict[str, float]] = []
        for round_ in range(rounds + 1):  # round 0 warms up
            progress(f"round {round_} of {rounds}")
            limits.append(prober.call("limits"))
            shift = round_ % len(processes)
            for process in processes[shift:] + processes[:shift]:
                p = process.call("prefill", tokens=prompt, seed=round_)["seconds"]
                d = process.call("decode", prompt=prompt, tokens=tokens, seed=round_)["seconds"]
                if round_:
                    prefill[process.target].append(prompt / p)
                    decode[process.target].append(tokens / d)
        bandwidth = max(limit["bandwidth"] for limit in limits)
        flops = max(limit["flops"] for limit in limits)
        weights, multiplies = _work(model)
        p_limit = flops / (2 * multiplies)
        rows = []
        for process in processes:
            target = process.target
            on_host = target.device == "cpu"
            d_limit = bandwidth / _read(model, target.engine, loaded[target]["profile"])
            p_rate, d_rate = statistics.median(prefill[target]), statistics.median(decode[target])
            rows.append(
                Row(
                    engine=target.engine,
                    device=target.device,
                    profile=loaded[target]["profile"],
                    prefill_tok_s=p_rate,
                    prefill_spread=spread(prefill[target]),
                    prefill_interval=bootstrap(prefill[target]),
                    decode_tok_s=d_rate,
                    decode_spread=spread(decode[target]),
                    decode_interval=bootstrap(decode[target]),
                    load_s=loaded[target]["load_s"],
                    model_mib=loaded[target]["model_bytes"] / 2**20,
                    peak_rss_mib=process.call("memory")["peak_rss"] / 2**20,
                    prefill_of_limit=p_rate / p_limit if on_host else None,
                    decode_of_limit=d_rate / d_limit if on_host else None,
                )
            )
    finally:
        for process in (*processes, prober):
            process.close()
    return {
        "model": str(model),
        "settings": {"prompt": prompt, "tokens": tokens, "rounds": rounds, "threads": threads},
        "environment": environment(),
        "limits": {
            "read_bandwidth_gb_s": bandwidth / 1e9,
            "fp32_gflop_s": flops / 1e9,
            "prefill_tok_s": p_limit,
            "decode_tok_s": bandwidth / weights,
        },
        "rows": [asdict(row) for row in rows],
        "failed": failed,
    }


def check_counts(model: Path, prompt: int, tokens: int, rounds: int) -> None:
    """Raise UsageError for a count below 1, or a prompt and new tokens that are longer than the model's context."""
    from portlm.artifact import read_manifest

    if prompt < 1 or tokens < 1 or rounds < 1:
        raise UsageError(f"prompt, tokens and rounds must be at least 1, got {prompt}, {tokens} and {rounds}")
    context = read_manifest(model).model.context_length
    if prompt + tokens > context:
        raise UsageError(
            f"a prompt of {prompt} and {tokens} new tokens need {prompt + tokens} positions, but the model has "
            f"{context}: choose smaller numbers, such as prompt = {context // 2} and tokens = {context // 4}"
        )


def _work(model: Path) -> tuple[int, int]:
    """Return (bytes of weights read, multiply-adds made) per decoded token."""
    from portlm.artifact import read_manifest
    from portlm.compile.work import token_work

    return token_work(model, read_manifest(model))


def _read(model: Path, engine: str, profile: str) -> int:
    """Return how many bytes of weights an engine reads for a decoded token."""
    from portlm.artifact import read_manifest
    from portlm.compile.work import token_work, widens

    return token_work(model, read_manifest(model), widened=widens(engine, profile))[0]
