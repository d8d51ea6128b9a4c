"""Decoding beside other busy programs: every engine with its default threads, against one thread.

A GPT-2 of 14 million random weights writes one token after the other, first on the machine as it is, then beside as
many busy loops as there are cores, each in a session of its own, as programs of other users and terminals are. Each
engine has three processes, which take turns, in the opposite order in the next round: the default, one thread, and,
where portlm chooses the threads of a step, as many as there are cores in every step. The last shows on an idle machine
what the choice costs, and beside busy programs what it is for. The ratio is the median over the rounds of the default's
rate and that of one thread, with a bootstrapped 95 % interval; the first round is in it, and stands beside it, since a
short program has no other.

    python benchmarks/bench_busy.py                 # three minutes or so: do nothing else meanwhile
    python benchmarks/bench_busy.py -e tvm:cpu:fused --rounds 9
    python benchmarks/bench_busy.py --smoke         # to see that it runs
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from random_model import export_random

from portlm.errors import PortlmError
from portlm.flows.bench import Process, Target
from portlm.flows.measuring import busy_loops, environment, paired_ratio
from portlm.threads import cores

TARGETS = (
    "torch:cpu:native", "torch:cpu:fused", "torch:cpu:portable", "tvm:cpu:fused", "tvm:cpu:portable",
    "ort:cpu:fused", "ort:cpu:portable",
)  # fmt: skip
CHOSEN = (
    "torch:cpu:native",
    "torch:cpu:fused",
    "torch:cpu:portable",
    "tvm:cpu:fused",
)  # by portlm, step by step
PROMPT = 16


def make_model(folder: Path) -> Path:
    """Export and compile the model for what is installed; return the artifact."""
    from portlm.compile.build import COMPILERS, build

    artifact = export_random(folder, 8192, 6, 6, 384, context=512)
    for key in COMPILERS:
        if key[1] == "cpu":
            with contextlib.suppress(PortlmError):  # the engine says what is missing
                build(artifact, [key])
    return artifact


def rates(processes: dict[str, Process], rounds: int, tokens: int) -> dict[str, list[float]]:
    """Tokens per second of each process, one for each round."""
    found: dict[str, list[float]] = {name: [] for name in processes}
    for round_ in range(rounds):
        for name in list(processes)[:: -1 if round_ % 2 else 1]:
            seconds = processes[name].call("decode", prompt=PROMPT, tokens=tokens, seed=round_)["seconds"]
            found[name].append(tokens / seconds)
    return found


def measure(artifact: Path, target: Target, rounds: int, tokens: int) -> dict[str, Any]:
    """Measure one target, idle and busy."""
    threads: dict[str, int | None] = {"default": None, "one": 1}
    if str(target) in CHOSEN:
        threads["all"] = cores()
    processes = {name: Process(target) for name in threads}
    try:
        for name, process in processes.items():
            process.call(
                "load", path=str(artifact), engine=target.engine, device=target.device, profile=target.profile,
                threads=threads[name],
            )  # fmt: skip
        rates(processes, 1, tokens)
        idle = rates(processes, rounds, tokens)
        with busy_loops(cores()):
            all_threads = {name: processes.pop(name) for name in ("all",) if name in processes}
            busy = rates(processes, rounds, tokens)
            busy |= rates(all_threads, 2, max(1, tokens // 8))  # these may take a second for a token
            processes |= all_threads
    finally:
        for process in processes.values():
            process.close()
    return {"target": str(target), "idle": idle, "busy": busy}


def line(result: dict[str, Any]) -> str:
    """One row of the table."""
    idle, busy = result["idle"], result["busy"]

    def rate(of: dict[str, list[float]], name: str) -> str:
        return f"{statistics.median(of[name]):7.1f}" if name in of else "      -"

    ratio, (low, high) = paired_ratio(busy["default"], busy["one"])
    cost = f"{paired_ratio(idle['default'], idle['all'])[0]:6.2f}" if "all" in idle else "     -"
    return (
        f"{result['target']:<19} {rate(idle, 'default')} {rate(idle, 'one')} {rate(idle, 'all')} {cost}  |"
        f" {rate(busy, 'default')} {rate(busy, 'one')} {rate(busy, 'all')}   {ratio:5.2f} ({low:.2f} to {high:.2f})"
        f" {busy['default'][0] / busy['one'][0]:6.2f}" + ("  below half" if ratio < 0.5 else "")
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="decoding beside busy programs")
    parser.add_argument(
        "-e", "--engine", action="append", help="engine:device:profile (default: all on the CPU)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="for each target (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=100, help="that a round writes (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write every rate to this file")
    parser.add_argument("--smoke", action="store_true", help="one round of few tokens")
    options = parser.parse_args()
    rounds, tokens = (1, 8) if options.smoke else (options.rounds, options.tokens)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["PORTLM_HOME"] = str(Path(scratch) / "home")
        artifact = make_model(Path(scratch))
        print(
            f"tokens/s on {cores()} cores, load {os.getloadavg()[0]:.2f}; beside {cores()} busy loops on the right"
        )
        print(f"{'':19} default     one     all  d/all  | default     one     all   default/one        first")
        for name in options.engine or TARGETS:
            try:
                results.append(measure(artifact, Target.parse(name), rounds, tokens))
            except PortlmError as error:
                print(f"{name:<19} {error}")
                continue
            print(line(results[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"environment": environment(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
