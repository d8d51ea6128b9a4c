"""How every op benchmark here measures: contenders take turns in one process, beside the machine's limit.

The protocol:

- **Correct first.** All contenders of a case have to agree before one of them is timed.
- **Taking turns.** A round visits every contender, the next round in the opposite order, so that a slow minute of a
  shared machine hits all of them. A visit repeats the call for a set time, at least once. They share one thread pool.
- **Ratios, not times.** The headline is the median over the rounds of rival's time / our time, with a bootstrapped 95 %
  interval. A win is claimed only if the interval lies above 1, a loss only if it lies below.
- **The limit in the same run.** Memory bandwidth and multiply-add peak are probed between the rounds; bytes or
  operations that the task needs, divided by the time, are printed as a share of them.
- **Noise is thrown away.** A round in which the hypervisor stole more than 1 % of the time is repeated.
- **Same memory.** malloc keeps what is freed, as in `portlm pretrain`, for all contenders: else the page faults of
  fresh 64 MiB results would drown every kernel. `--fresh-memory` shows what that is like.
- **Losses stay in the table**, and so does a contender that cannot run, with the reason.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from portlm.agreement import within
from portlm.flows import measuring
from portlm.flows.measuring import STEAL_LIMIT, Limits, StealMeter, paired_ratio
from portlm.train.allocator import keep_freed_memory

Call = Callable[[], Any]

_MOST_REPEATS = 3  # of a round that was disturbed


@dataclass(frozen=True)
class Case:
    """One task at one size, and who competes at it.

    Attributes:
        name: what and how large, e.g. "forward (8192, 768)".
        contenders: name to call; the first is ours. All return the same tensors (or None to skip the comparison).
        moved: bytes that any implementation must move through memory, 0 if memory does not bound it; or by contender.
        flops: operations that any implementation must make, 0 if arithmetic does not bound it.
        int8: the same, of bytes, by contender: those that multiply bytes.
        calls: by contender, how often one call does the task, where it is not once.
        tolerance: largest difference between contenders' results, relative to the largest value.
    """

    name: str
    contenders: dict[str, Call]
    moved: int | dict[str, int] = 0
    flops: int = 0
    int8: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    tolerance: float = 1e-4


@dataclass
class Result:
    """What one contender of one case took."""

    case: str
    contender: str
    threads: int
    seconds: float | None = None
    ratio: float | None = None
    interval: tuple[float, float] | None = None
    rate: float | None = None
    unit: str = ""
    of_limit: float | None = None
    failed: str = ""
    samples: list[float] = field(default_factory=list)


def compiled(function: Callable[..., Any], fullgraph: bool = True) -> Callable[..., Any]:
    """Return torch.compile's version of a function, for fixed shapes; what was compiled before is forgotten."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, fullgraph=fullgraph)


def with_gradients(function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> Call:
    """Return a call that runs a function forwards and backwards and returns its outputs and gradients.

    Args:
        function: maps the inputs to one tensor or several.
        inputs: floating tensors are differentiated.
    """
    leaves = [t.detach().clone().requires_grad_() if t.is_floating_point() else t for t in inputs]
    wanted = [t for t in leaves if t.requires_grad]
    outputs = function(*leaves)
    generator = torch.Generator().manual_seed(0)  # the same upstream gradients for every contender
    upstream = [
        torch.randn(y.shape, generator=generator)
        for y in (outputs if isinstance(outputs, tuple) else (outputs,))
    ]

    def call() -> list[Tensor]:
        y = function(*leaves)
        y = y if isinstance(y, tuple) else (y,)
        return [*y, *torch.autograd.grad(y, wanted, upstream)]

    return call


def without_gradients(function: Callable[..., Any], *inputs: Tensor) -> Call:
    """Return a call that runs a function forwards only."""

    @torch.no_grad()
    def call() -> Any:
        return function(*inputs)

    return call


def fresh_pages(size: int, *, large: bool = True) -> Tensor:
    """Return so many bytes, in large pages, as the weights of a whole model can have them, or in small ones."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
    pages = mmap.mmap(
        -1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )  # shared, the default, gets no large ones
    pages.madvise(mmap.MADV_HUGEPAGE if large else mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def race(
    case: Case, limits: Limits, *, rounds: int, seconds: float, threads: int, probe_bytes: int
) -> list[Result]:
    """Measure one case. See the module's description for the protocol."""
    results = {name: Result(case.name, name, threads) for name in case.contenders}
    runnable = _agreeing(case, results)
    calls = {name: case.contenders[name] for name in runnable}
    repeats = {name: _repeats(call, seconds) for name, call in calls.items()}
    order = list(calls)
    for round_ in range(rounds):
        limits.probe(probe_bytes, int8=bool(case.int8))
        for _ in range(_MOST_REPEATS):
            meter = StealMeter()
            times = {name: _sample(calls[name], repeats[name]) for name in order}
            if meter.share() <= STEAL_LIMIT:
                break
        for name, value in times.items():
            results[name].samples.append(value / case.calls.get(name, 1))
        order.reverse()
        if sys.stderr.isatty():
            end = "" if round_ + 1 < rounds else "\r" + " " * 79 + "\r"
            print(f"\r  {case.name}: round {round_ + 1} of {rounds}", end=end, file=sys.stderr, flush=True)
    ours = results[next(iter(case.contenders))]
    for name in runnable:
        result = results[name]
        result.seconds = statistics.median(result.samples)
        moved = case.moved.get(name, 0) if isinstance(case.moved, dict) else case.moved
        if name in case.int8:
            result.rate, result.unit = case.int8[name] / result.seconds / 1e9, "GOP/s of bytes"
            result.of_limit = result.rate / (limits.int8 / 1e9)
        elif case.flops:
            result.rate, result.unit = case.flops / result.seconds / 1e9, "GFLOP/s"
            result.of_limit = result.rate / (limits.flops / 1e9)
        elif moved:
            result.rate, result.unit = moved / result.seconds / 1e9, "GB/s"
            result.of_limit = result.rate / (max(limits.read, limits.triad) / 1e9)
        if result is not ours and ours.samples:
            result.ratio, result.interval = paired_ratio(result.samples, ours.samples)
    return list(results.values())


def _agreeing(case: Case, results: dict[str, Result]) -> list[str]:
    """Run every contender once; return the names of those that ran. One that disagrees with the first is an error."""
    runnable, first = [], None
    for name, call in case.contenders.items():
        try:
            value = call()
        except Exception as error:
            results[name].failed = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        runnable.append(name)
        first = first if first is not None else value
        for a, b in zip(_tensors(first), _tensors(value), strict=True):
            difference = float((a - b).abs().max()) if a.numel() else 0.0
            allowed = case.tolerance * max(float(a.abs().max()) if a.numel() else 0.0, 1e-30)
            if not within(difference, allowed):
                raise SystemExit(
                    f"{case.name}: {name} differs from the first contender by {difference:.3g}, "
                    f"more than {allowed:.3g}: nothing was timed"
                )
    return runnable


def _tensors(value: Any) -> list[Tensor]:
    if value is None:
        return []
    values = value if isinstance(value, list | tuple) else [value]
    return [torch.as_tensor(v).detach().double() for v in values]


def _repeats(call: Call, seconds: float) -> int:
    """Return how many calls fill the time of one sample."""
    call()
    once = min(_sample(call, 1) for _ in range(3))
    return max(1, round(seconds / max(once, 1e-9)))


def _sample(call: Call, repeats: int) -> float:
    """Return seconds per call."""
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def environment() -> dict[str, Any]:
    """Describe the machine, the versions and the load that a figure depends on."""
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return {
        **measuring.environment(),
        "compiler": torch.__config__.show().splitlines()[1].strip(" -"),
        "huge_pages": huge.read_text().strip() if huge.exists() else "unknown",
        "governor": governor.read_text().strip() if governor.exists() else "unknown",
        "load_average": os.getloadavg(),
        "date": time.strftime("%Y-%m-%d"),
    }


def main(title: str, cases: Callable[[bool], Iterable[Case]]) -> None:
    """Run a benchmark file from the command line.

    Args:
        title: first line of the output.
        cases: called with True for a smoke test (tiny sizes), once per number of threads; yields the cases.
    """
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--rounds", type=int, default=9, help="rounds per case (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="time of one sample (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, nargs="+", default=None, help="thread counts (default: 1 and all)"
    )
    parser.add_argument(
        "--fresh-memory", action="store_true", help="let malloc return large blocks to the system"
    )
    parser.add_argument("--only", default="", help="run the cases whose name contains this text")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, two short rounds: does it run?")
    parser.add_argument("--json", type=Path, default=None, help="also write everything measured to this file")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.seconds = 2, 0.002
    thread_counts = options.threads or sorted({1, torch.get_num_threads()})
    kept = not options.fresh_memory and keep_freed_memory()
    described, limits, results = {**environment(), "memory": "kept" if kept else "fresh"}, {}, []
    print(title)
    print(", ".join(f"{k} {v}" for k, v in described.items() if k not in ("versions", "compiler")))
    print(", ".join(f"{k} {v}" for k, v in described["versions"].items()))
    for threads in thread_counts:
        torch.set_num_threads(threads)
        limit = limits[threads] = Limits()
        for case in cases(options.smoke):
            if options.only not in case.name:
                continue
            torch.manual_seed(0)
            rows = race(
                case, limit, rounds=options.rounds, seconds=options.seconds, threads=threads,
                probe_bytes=1 << (20 if options.smoke else 28),
            )  # fmt: skip
            results += rows
            _print(rows)
        print(
            f"limits, {threads} threads: read {limit.read / 1e9:.1f} GB/s, triad {limit.triad / 1e9:.1f} GB/s, "
            f"{limit.flops / 1e9:.0f} GFLOP/s"
            + (f", {limit.int8 / 1e9:.0f} GOP/s of bytes" if limit.int8 else "")
        )
    if options.json:
        report = {
            "title": title,
            "environment": described,
            "settings": {"rounds": options.rounds, "seconds": options.seconds, "smoke": options.smoke},
            "limits": {str(threads): asdict(limit) for threads, limit in limits.items()},
            "results": [asdict(result) for result in results],
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def _print(rows: list[Result]) -> None:
    print(f"{rows[0].case}, {rows[0].threads} threads")
    for row in rows:
        if row.failed:
            print(f"  {row.contender:>10}  absent: {row.failed}")
            continue
        assert row.seconds is not None
        line = f"  {row.contender:>10} {row.seconds * 1e6:12.1f} us"
        if row.rate is not None and row.of_limit is not None:
            line += f" {row.rate:8.1f} {row.unit} {row.of_limit:4.0%} of the limit"
        if row.ratio is not None and row.interval is not None:
            low, high = row.interval
            verdict = "we are faster" if low > 1 else "we are slower" if high < 1 else "no difference shown"
            line += f"   x{row.ratio:.2f} [{low:.2f}, {high:.2f}] {verdict}"
        print(line, flush=True)
