"""One training step of GPT-2 on the CPU: portlm against plain PyTorch, eager and compiled.

The setting is nanoGPT's for a laptop (4 layers, 4 heads, width 128, context 64, batch 12) over bytes. Every
contestant trains the same weights on the same batches: forward, backward, clipping to norm 1, AdamW. They first
have to agree on the loss of each of their first steps, those in bf16 with eager fp32 up to their rounding. Then
they take turns in one process, so that they share one thread pool and the machine's mood: A B C C B A, the next round
the other way round. The result is the median of the per-round ratios with a bootstrapped 95 % interval; a ratio above 1
means that portlm in fp32, or in bf16, is faster, and the interval's lower end has to be above 1 to claim it. The peaks
of multiply-adds in fp32 and bf16 are probed between the rounds.

    python benchmarks/bench_training.py                    # the race: do nothing else meanwhile
    python benchmarks/bench_training.py --smoke            # a minute, to see that it runs
    python benchmarks/bench_training.py --preset 10m       # 10 million parameters, see PRESETS
    python benchmarks/bench_training.py --preset 10m-50304 --only compile-bf16
    python benchmarks/bench_training.py --preset 10m-memory --memory        # peak memory instead of speed
"""

import argparse
import itertools
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import environment
from torch import Tensor
from training_rivals import CONTESTANTS, Step

from portlm import _C, settings
from portlm.agreement import within
from portlm.data.python_topics import python_topics
from portlm.flows.measuring import STEAL_LIMIT, StealMeter, paired_ratio
from portlm.models.gpt2 import GPT2, GPT2Config
from portlm.train.allocator import keep_freed_memory
from portlm.train.config import PretrainConfig

# Rounding of float32 grows along a training run; a wrong gradient shows in the first steps, far above this. Products of
# numbers rounded to bfloat16 are off by 2^-9 each, and the loss of a step by less.
GATE_TOLERANCE = {False: 1e-3, True: 1e-2}  # by: in bf16
BATCHES = 16
OURS = ("portlm", "portlm-bf16")
_10M = {"layers": 6, "heads": 6, "width": 384, "context": 256, "batch": 16, "gate": 5}
PRESETS = {
    "10m": _10M,
    "10m-50304": _10M | {"vocabulary": 50304, "batch": 8},
    "10m-memory": _10M | {"vocabulary": 50304, "batch": 8, "context": 1024},
}

# ---- measuring -------------------------------------------------------------------------------------------------


@dataclass
class Noise:
    """What else happened on the machine during a round."""

    steal: float  # share of the machine's time taken by the hypervisor
    load: float
    preemptions: int

    def too_much(self, threads: int) -> bool:
        """Say whether the round cannot be trusted."""
        return self.steal > STEAL_LIMIT or self.load > threads + 1


class NoiseMeter:
    """Compares the kernel's counters at two moments."""

    def __init__(self) -> None:
        self._steal, self._switches = StealMeter(), self._preemptions()

    def stop(self) -> Noise:
        """Return what happened since this was made."""
        return Noise(self._steal.share(), os.getloadavg()[0], self._preemptions() - self._switches)

    @staticmethod
    def _preemptions() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def step_flops(config: GPT2Config, batch: int) -> float:
    """Return the FLOPs of one step: 6 per matrix weight and token, and attention with its causal half skipped."""
    C, T, L = config.width, config.context_length, config.n_layer
    weights = 12 * L * C * C + config.vocab_size * C
    return batch * T * (6.0 * weights + 6.0 * L * C * T)


def batches(config: GPT2Config, count: int, batch: int) -> list[tuple[Tensor, Tensor]]:
    """Return batches of real text as bytes, the same for everybody; pairs of them where the vocabulary has room."""
    text = torch.frombuffer(bytearray(python_topics().encode()), dtype=torch.uint8).long()
    if config.vocab_size > 1 << 15:
        text = (text[:-1] % 128) * 256 + text[1:]
    T = config.context_length
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(text) - T - 1, (count, batch), generator=generator)
    return [
        (torch.stack([text[s : s + T] for s in row]), torch.stack([text[s + 1 : s + T + 1] for s in row]))
        for row in starts.tolist()
    ]


def loss_curve(step: Step, data: list[tuple[Tensor, Tensor]], count: int) -> list[float]:
    """Return the losses of a contestant's first steps. Whatever it compiles, it compiles here."""
    return [step(*pair).item() for pair in itertools.islice(itertools.cycle(data), count)]


def sample(step: Step, data: Iterator[tuple[Tensor, Tensor]], count: int) -> float:
    """Return the mean time of ``count`` steps in seconds."""
    pairs = list(itertools.islice(data, count))
    begin = time.perf_counter()
    for inputs, targets in pairs:
        step(inputs, targets)
    return (time.perf_counter() - begin) / count


@dataclass
class Round:
    """Seconds per step of every contestant in one round."""

    seconds: dict[str, float]
    noise: Noise
    peaks: dict[str, float]


def probe() -> dict[str, float]:
    """Return the floating-point operations per second that multiply-adds in registers reach, by precision."""
    return {"fp32": _C.probe_flops(20_000_000), "bf16": _C.probe_bf16(20_000_000)}


def race(
    steps: dict[str, Step], data: list[tuple[Tensor, Tensor]], rounds: int, seconds: float, patience: int
) -> tuple[list[Round], int]:
    """Return the rounds, and how many were thrown away because the machine was busy."""
    source = itertools.cycle(data)
    counts = {name: max(1, math.ceil(seconds / 2 / sample(step, source, 2))) for name, step in steps.items()}
    order = list(steps)
    random.Random(time.time_ns()).shuffle(order)
    kept: list[Round] = []
    thrown = 0
    while len(kept) < rounds:
        meter = NoiseMeter()
        # Up and down the list: a machine that slows down evenly slows everybody down alike.
        times: dict[str, list[float]] = {name: [] for name in steps}
        for name in order + order[::-1]:
            times[name].append(sample(steps[name], source, counts[name]))
        noise, peaks = meter.stop(), probe()
        order = order[1:] + order[:1]
        if noise.too_much(torch.get_num_threads()) and thrown < patience:
            thrown += 1
            say(f"round thrown away: steal {noise.steal:.1%}, load {noise.load:.1f}")
            continue
        kept.append(Round({name: sum(pair) / 2 for name, pair in times.items()}, noise, peaks))
        say(
            f"round {len(kept)}/{rounds}: "
            + ", ".join(f"{name} {1e3 * t:.2f} ms" for name, t in kept[-1].seconds.items())
        )
    return kept, thrown


def cpu_flags() -> list[str]:
    """Return which of the instruction sets that matter here the CPU has."""
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    return sorted(set(flags.split()) & {"avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile"})


# ---- command line ----------------------------------------------------------------------------------------------


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def prepare(
    names: list[str],
    config: GPT2Config,
    options: PretrainConfig,
    data: list[tuple[Tensor, Tensor]],
    gate: int,
) -> tuple[dict[str, Step], dict[str, float], dict[str, str]]:
    """Build the contestants and let each train its first steps.

    Returns:
        Those that work; how far the loss of each strays from eager PyTorch's, as the largest relative difference;
        and why the others do not work.
    """
    torch.manual_seed(1337)
    weights = {name: tensor.clone() for name, tensor in GPT2(config).state_dict().items()}
    steps: dict[str, Step] = {}
    curves: dict[str, list[float]] = {}
    absent: dict[str, str] = {}
    for name in names:
        begin = time.perf_counter()
        try:
            step = CONTESTANTS[name](config, weights, options)
            curves[name] = loss_curve(step, data, gate)
            steps[name] = step
        except (
            Exception
        ) as error:  # a rival that cannot run here is a line in the table, not the end of the race
            if name in OURS or name == "eager":
                raise
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        say(
            f"{name} {'cannot run' if name in absent else 'is ready'} after {time.perf_counter() - begin:.1f} s"
        )
    strays = {
        name: float(np.abs(np.divide(curve, curves["eager"]) - 1).max())  # NaN if one of them is
        for name, curve in curves.items()
    }
    return steps, strays, absent


def shape(arguments: argparse.Namespace) -> GPT2Config:
    """Return the model that the command line asks for."""
    return GPT2Config(
        vocab_size=arguments.vocabulary, context_length=arguments.context, n_layer=arguments.layers,
        n_head=arguments.heads, width=arguments.width,
    )  # fmt: skip


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the race that the command line asks for."""
    config = shape(arguments)
    options = settings.load(PretrainConfig, overrides=[("data.batch_size", arguments.batch)])
    rivals = [name for name in arguments.only or CONTESTANTS if name not in (*OURS, "eager")]
    data = batches(config, BATCHES, arguments.batch)
    steps, strays, absent = prepare([*OURS, "eager", *rivals], config, options, data, arguments.gate)
    for name, stray in strays.items():
        if not within(stray, GATE_TOLERANCE["bf16" in name]):
            raise SystemExit(f"{name} does not train the same model: its loss strays by {stray:.2e}")
    rounds, thrown = race(steps, data, arguments.rounds, arguments.seconds, arguments.patience)
    flops, peaks = (
        step_flops(config, arguments.batch),
        {k: max(r.peaks[k] for r in rounds) for k in ("fp32", "bf16")},
    )
    tokens = arguments.batch * config.context_length
    rows = []
    for name in steps:
        seconds = [r.seconds[name] for r in rounds]
        typical = statistics.median(seconds)
        row = {
            "name": name, "ms": 1e3 * typical, "tokens_per_second": tokens / typical,
            "of_peak": flops / typical / peaks["bf16" if "bf16" in name else "fp32"], "loss_stray": strays[name],
        }  # fmt: skip
        for ours in OURS:
            ratio, (low, high) = paired_ratio(seconds, [r.seconds[ours] for r in rounds])
            row[f"{ours} is faster by"] = {"ratio": ratio, "low": low, "high": high}
        rows.append(row)
    return {
        "setting": asdict(config) | {"batch": arguments.batch, "gflop_per_step": flops / 1e9},
        "rows": rows,
        "absent": absent,
        "peaks_gflop_s": {k: peak / 1e9 for k, peak in peaks.items()},
        "rounds": [asdict(r) for r in rounds],
        "thrown_away": thrown,
        "environment": environment() | {"threads": torch.get_num_threads(), "cpu_flags": cpu_flags()},
    }


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    machine = result["environment"]
    print(f"{machine['cpu']}, {machine['threads']} threads, torch {machine['versions'].get('torch')}")
    columns = "".join(f"   {f'{name} is faster by':<26}" for name in OURS)
    print(f"{'':>18} {'ms/step':>9} {'tokens/s':>10} {'of peak':>8}{columns} {'loss strays':>11}")
    for row in result["rows"]:
        ratios = ""
        for ours in OURS:
            r = row[f"{ours} is faster by"]
            text = "" if row["name"] == ours else f"{r['ratio']:.2f}x [{r['low']:.2f}, {r['high']:.2f}]"
            ratios += f"   {text:<26}"
        print(
            f"{row['name']:>18} {row['ms']:9.2f} {row['tokens_per_second']:10,.0f} {row['of_peak']:8.1%}{ratios} "
            f"{row['loss_stray']:11.1e}"
        )
    for name, reason in result["absent"].items():
        print(f"{name:>18} not available: {reason}")
    print(
        f"peak {result['peaks_gflop_s']['fp32']:.0f} GFLOP/s in fp32, {result['peaks_gflop_s']['bf16']:.0f} in bf16, "
        f"{result['setting']['gflop_per_step']:.2f} GFLOP per step, {len(result['rounds'])} rounds kept, "
        f"{result['thrown_away']} thrown away"
    )


def peak_memory(name: str, arguments: argparse.Namespace) -> int:
    """Return the most bytes that were resident during one step of one contestant, after one to warm up.

    Weights, optimiser, activations and libraries together, as Linux counts them; not what compiling took before.
    """
    config = shape(arguments)
    options = settings.load(PretrainConfig, overrides=[("data.batch_size", arguments.batch)])
    if name in OURS:
        keep_freed_memory()  # as `portlm pretrain` does
    torch.manual_seed(1337)
    data = batches(config, 2, arguments.batch)
    step = CONTESTANTS[name](config, GPT2(config).state_dict(), options)
    step(*data[0])
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    step(*data[1])
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])


def show_memory(arguments: argparse.Namespace) -> None:
    """Print the peak memory of every contestant, each in a process of its own."""
    rows = {}
    for name in arguments.only or ["portlm", "portlm-bf16", "eager", "eager-bf16", "compile", "compile-bf16"]:
        done = subprocess.run(
            [sys.executable, *sys.argv, "--peak-of", name], capture_output=True, text=True, check=False
        )
        rows[name] = int(done.stdout) if done.returncode == 0 else None
        say(f"{name}: {done.stdout.strip() or done.stderr.strip().splitlines()[-1]}")
    for name, size in rows.items():
        shares = "".join(
            f", {size / rows[rival]:.2f} of {rival}'s"
            for rival in ("eager", "eager-bf16")
            if size and rows.get(rival)
        )
        print(f"{name:>18} {'failed' if size is None else f'{size / 1e9:.2f} GB'}{shares}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="rounds to keep (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="per contestant and round (default: %(default)s)"
    )
    parser.add_argument(
        "--patience", type=int, default=20, help="noisy rounds to repeat (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--batch", type=int, default=12, help="sequences per step (default: %(default)s)")
    parser.add_argument("--context", type=int, default=64, help="tokens per sequence (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--heads", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--width", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--preset", choices=PRESETS, help="other defaults for the model")
    parser.add_argument("--vocabulary", type=int, default=256, help="tokens there are (default: %(default)s)")
    parser.add_argument("--gate", type=int, default=50, help="steps to agree on (default: %(default)s)")
    parser.add_argument("--memory", action="store_true", help="peak memory of a step instead of speed")
    parser.add_argument("--peak-of", choices=CONTESTANTS, help="of one contestant, in bytes")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, help="rivals to run (default: all)")
    parser.add_argument(
        "--smoke", action="store_true", help="two short rounds against eager, whatever the noise"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(**PRESETS.get(parser.parse_known_args()[0].preset, {}))
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.rounds, arguments.seconds, arguments.patience = 2, 0.3, 0
        arguments.only = arguments.only or ["eager"]
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.peak_of:
        print(peak_memory(arguments.peak_of, arguments))
        return
    if arguments.memory:
        show_memory(arguments)
        return
    keep_freed_memory()
    result = measure(arguments)
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        show(result)


if __name__ == "__main__":
    main()
