"""Short parallel loops: what the packed engine's own threads bring on an idle machine, and beside busy programs.

Random GPT-2 models write from a prompt of 16 tokens. Every variant has a process of its own, parked while another one
is measured; they take turns, in the opposite order in the next round, first on the machine as it is, then beside one
busy loop, then beside one for each core. Printed are the median and the best tokens per second of each, the seconds
of all cores that a second of writing took, and the ratio to the first variant of the paired rounds, with a
bootstrapped 95 % interval. Variants are the default, one thread, and whatever `--variant` adds: a name and the
environment that makes it, another build of portlm, say.

    python benchmarks/bench_threads.py              # three minutes or so: do nothing else meanwhile
    python benchmarks/bench_threads.py --variant before:PYTHONPATH=/other/tree/build/types
    python benchmarks/bench_threads.py --model 0.6M --variant 'spin:PYTHONPATH=/other,GOMP_SPINCOUNT=300000'
    python benchmarks/bench_threads.py --smoke      # to see that it runs
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from portlm.flows.measuring import busy_loops, environment, paired_ratio
from portlm.threads import cores

# Name: vocabulary, layers, heads, width, tokens of a round.
MODELS = {"0.6M": (512, 4, 4, 104, 1000), "30M int4": (16384, 8, 8, 512, 100)}
PROMPT = list(range(3, 19))
CONTEXT = 1100


class Variant:
    """A process with a session, which writes when it is told to."""

    def __init__(self, artifact: Path, threads: int | None, changes: dict[str, str]):
        """Start it, and let it write once."""
        command = [sys.executable, "-P", __file__, "--worker", str(artifact), str(threads or 0)]
        self._process = subprocess.Popen(
            command, env=os.environ | changes, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.write(64)

    def write(self, tokens: int) -> tuple[float, float]:
        """Write so many tokens; return the seconds, and those of all cores."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin
        assert stdout
        stdin.write(f"{tokens}\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise SystemExit("a process ended: see above")
        seconds, of_all_cores = map(float, line.split())
        return seconds, of_all_cores

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def work(artifact: str, threads: int) -> None:
    """Be such a process."""
    import portlm

    with portlm.load(artifact, "packed", "cpu", "fused", threads=threads or None) as session:
        for line in sys.stdin:
            before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
            session.generate(PROMPT, max_new_tokens=int(line))
            seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            print(seconds, cpu, flush=True)


def make_model(folder: Path, sizes: tuple[int, int, int, int], quantize: str | None) -> Path:
    """Export and compile a random model, perhaps quantized; return the artifact."""
    from random_model import export_random  # here, as a worker has no path to it

    from portlm.compile.build import build

    artifact = export_random(folder, *sizes, context=CONTEXT, quantize=quantize)
    build(artifact, [("packed", "cpu", "fused")])
    return artifact


def race(variants: dict[str, Variant], tokens: int, rounds: int) -> dict[str, Any]:
    """Let the variants take turns."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for i in range(rounds):
        for name in list(variants)[:: -1 if i % 2 else 1]:
            found[name].append(variants[name].write(tokens))
    rates = {name: [tokens / seconds for seconds, _ in rows] for name, rows in found.items()}
    first = next(iter(rates))
    return {
        name: {
            "median": statistics.median(rates[name]),
            "best": max(rates[name]),
            "cores": sum(cpu for _, cpu in rows) / sum(seconds for seconds, _ in rows),
            "ratio": paired_ratio(rates[name], rates[first]),
        }
        for name, rows in found.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--variant", action="append", default=[], metavar="NAME:VARIABLE=VALUE,...")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    kinds: dict[str, tuple[int | None, dict[str, str]]] = {"default": (None, {}), "one thread": (1, {})}
    for variant in arguments.variant:
        name, _, changes = variant.partition(":")
        kinds[name] = (None, dict(change.split("=", 1) for change in changes.split(",")))
    results: dict[str, Any] = {"environment": environment()}
    for model in arguments.model or ["0.6M"] if arguments.smoke else arguments.model or MODELS:
        *sizes, tokens = MODELS[model]
        with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
            artifact = make_model(Path(scratch), tuple(sizes), "int4" if "int4" in model else None)
            variants = {name: Variant(artifact, *kind) for name, kind in kinds.items()}
            for process in variants.values():
                stack.callback(process.close)
            for loops in (0, 1, cores()):
                with busy_loops(loops):
                    found = race(
                        variants,
                        64 if arguments.smoke else tokens,
                        1 if arguments.smoke else arguments.rounds,
                    )
                results[f"{model}, {loops} busy loops"] = found
                if not arguments.json:
                    show(f"{model} beside {loops} busy loops", found)
    if arguments.json:
        print(json.dumps(results, indent=1))


def show(title: str, found: dict[str, Any]) -> None:
    """Print what was measured beside so many loops."""
    print(title)
    for name, of in found.items():
        ratio, (low, high) = of["ratio"]
        print(
            f"  {name:<12} {of['median']:8.0f} tokens/s, best {of['best']:8.0f}, {of['cores']:.2f} cores,"
            f" {ratio:.2f} ({low:.2f} to {high:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], int(sys.argv[3]))
    else:
        main()
