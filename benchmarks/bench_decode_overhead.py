"""What a token costs beside its kernels: the packed engine against TVM's fused profile, which call the same ones.

Random GPT-2 models of three sizes write from a prompt of 16 tokens. The two engines take turns in one process, in the
opposite order in the next round; the ratio is the median over the rounds of the packed engine's tokens per second and
TVM's, with a bootstrapped 95 % interval. The smallest model has kernels that do next to nothing: what is left is the
cost of everything around them. Then each engine loads the model and writes one token in fresh processes that take
turns, which report the seconds since their first line, the memory that they had at most, and how much of what they have
at the end is no file's.

    python benchmarks/bench_decode_overhead.py            # two minutes or so: do nothing else meanwhile
    python benchmarks/bench_decode_overhead.py --threads 1 --rounds 15
    python benchmarks/bench_decode_overhead.py --smoke    # to see that it runs
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from random_model import export_random

from portlm.flows.measuring import environment, paired_ratio

ENGINES = ("packed", "tvm")
# Name: vocabulary, layers, heads, width. 0.02, 0.6 and 30 million parameters, the last with weights of 4 bits, too.
MODELS = {
    "steps": (256, 4, 2, 16), "0.6M": (512, 4, 4, 104), "30M": (16384, 8, 8, 512), "30M int4": (16384, 8, 8, 512)
}  # fmt: skip
PROMPT = list(range(3, 19))
CONTEXT = 512
FIRST_TOKEN = """
import sys, time
began = time.perf_counter()
import portlm
with portlm.load(sys.argv[1], engine=sys.argv[2], profile="fused") as session:
    session.generate([1, 2, 3], max_new_tokens=1)
    seconds = time.perf_counter() - began
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(seconds, *(int(status[key].split()[0]) / 1024 for key in ("VmHWM", "RssAnon")))
"""


def make_model(folder: Path, sizes: tuple[int, int, int, int], quantize: str | None = None) -> Path:
    """Export and compile a random model for both engines, perhaps quantized; return the artifact."""
    from portlm.compile.build import build

    artifact = export_random(folder, *sizes, context=CONTEXT, quantize=quantize)
    build(artifact, [(engine, "cpu", "fused") for engine in ENGINES])
    return artifact


def race(artifact: Path, tokens: int, rounds: int, threads: int | None) -> dict[str, Any]:
    """Tokens per second of each engine, and their ratio."""
    import portlm

    sessions = {e: portlm.load(artifact, e, "cpu", "fused", threads=threads) for e in ENGINES}
    answers = {e: s.generate(PROMPT, max_new_tokens=8).token_ids for e, s in sessions.items()}
    assert len(set(answers.values())) == 1, f"the engines write different tokens: {answers}"
    rates: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    for i in range(rounds):
        for engine in ENGINES if i % 2 else ENGINES[::-1]:
            result = sessions[engine].generate(PROMPT, max_new_tokens=tokens)
            rates[engine].append(result.stats.tokens_per_second)
    for session in sessions.values():
        session.close()
    ratio = paired_ratio(rates["packed"], rates["tvm"])
    return {**{e: statistics.median(r) for e, r in rates.items()}, "ratio": ratio}


def first_tokens(artifact: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds to the first token, the largest resident memory and what of the last is not a file's, in MiB."""
    found: dict[str, list[list[float]]] = {engine: [] for engine in ENGINES}
    for i in range(rounds):
        for engine in ENGINES if i % 2 else ENGINES[::-1]:
            command = [sys.executable, "-c", FIRST_TOKEN, str(artifact), engine]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[engine].append([float(word) for word in done.stdout.split()])
    names = ("seconds", "resident", "own")
    return {
        engine: {
            name: statistics.median(column)
            for name, column in zip(names, zip(*rows, strict=True), strict=True)
        }
        for engine, rows in found.items()
    }


def main() -> None:
    """Measure, and print a line for each model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, help="of both engines; the default leaves it to them")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    rounds = 2 if arguments.smoke else arguments.rounds
    models = {"steps": MODELS["steps"]} if arguments.smoke else MODELS
    results: dict[str, Any] = {"environment": environment(), "threads": arguments.threads}
    with tempfile.TemporaryDirectory() as scratch:
        for name, sizes in models.items():
            artifact = make_model(Path(scratch) / name, sizes, "int4" if "int4" in name else None)
            tokens = 16 if arguments.smoke else 64 if "30M" in name else 384
            results[name] = {
                **race(artifact, tokens, rounds, arguments.threads),
                "first token": first_tokens(artifact, 1 if arguments.smoke else 5),
            }
            if not arguments.json:
                show(name, results[name])
    if arguments.json:
        print(json.dumps(results, indent=1))


def show(name: str, found: dict[str, Any]) -> None:
    """Print what was measured of one model."""
    ratio, (low, high) = found["ratio"]
    rates = ", ".join(f"{e} {found[e]:.0f} tokens/s ({1e6 / found[e]:.0f} us each)" for e in ENGINES)
    print(f"{name}: {rates}, packed / tvm {ratio:.2f} ({low:.2f} to {high:.2f})")
    for engine, first in found["first token"].items():
        said = f"first token after {first['seconds']:.2f} s, {first['resident']:.0f} MiB resident"
        print(f"  {engine}: {said}, {first['own']:.0f} of them its own")


if __name__ == "__main__":
    main()
