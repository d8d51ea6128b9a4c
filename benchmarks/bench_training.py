"""One training step of GPT-2 on the CPU: portlm against plain PyTorch, eager and compiled.

The setting is nanoGPT's for a laptop (4 layers, 4 heads, width 128, context 64, batch 12) over bytes. Every
contestant trains the same weights on the same batches: forward, backward, clipping to norm 1, AdamW. They first
have to agree on the loss of each of their first 50 steps. Then they take turns in one process, so that they share one
thread pool and the machine's mood: A B C C B A, the next round the other way round. The result is the median of the
per-round ratios with a bootstrapped 95 % interval; a ratio above 1 means portlm is faster, and the interval's lower
end has to be above 1 to claim it. The multiply-add peak is probed between the rounds.

    python benchmarks/bench_training.py                    # the race: do nothing else meanwhile
    python benchmarks/bench_training.py --smoke            # a minute, to see that it runs
"""

import argparse
import functools
import itertools
import json
import math
import os
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import environment
from torch import Tensor, nn

from portlm import _C, settings
from portlm.agreement import within
from portlm.data.python_topics import python_topics
from portlm.flows.measuring import STEAL_LIMIT, StealMeter, paired_ratio
from portlm.models.gpt2 import GPT2, GPT2Config
from portlm.train.config import PretrainConfig
from portlm.train.loop import accumulate_gradients
from portlm.train.setup import make_optimizer

GATE_STEPS = 50
# Rounding of float32 grows along a training run; a wrong gradient shows in the first steps, far above this.
GATE_TOLERANCE = 1e-3
BATCHES = 64

Step = Callable[[Tensor, Tensor], Tensor]


# ---- the rival: GPT-2 as one would write it in PyTorch today ---------------------------------------------------


class EagerGPT2(nn.Module):
    """GPT-2 in plain PyTorch. Parameter names are portlm's, so the weights can be copied by name."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        C = config.width
        self.wte, self.wpe = nn.Embedding(config.vocab_size, C), nn.Embedding(config.context_length, C)
        self.h = nn.ModuleList(EagerBlock(C, config.n_head) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(C)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of targets (B, T) after ids (B, T)."""
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]  # (B, T, C)
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class EagerBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm and beside the residual stream."""

    def __init__(self, C: int, n_head: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn, self.mlp = EagerAttention(C, n_head), EagerMLP(C)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class EagerAttention(nn.Module):
    """Masked self-attention through PyTorch's fused kernel."""

    def __init__(self, C: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class EagerMLP(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, C: int):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


# ---- contestants -----------------------------------------------------------------------------------------------


def portlm_step(config: GPT2Config, weights: dict[str, Tensor], options: PretrainConfig) -> Step:
    model = GPT2(config)
    model.load_state_dict(weights)
    optimizer = make_optimizer(model.train(), options.optimizer)

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        loss = accumulate_gradients(lambda batch: model(*batch), [(inputs, targets)])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def pytorch_step(
    config: GPT2Config,
    weights: dict[str, Tensor],
    options: PretrainConfig,
    mode: str | None = None,
    compiled_update: bool = False,
) -> Step:
    """Return a step of plain PyTorch.

    Args:
        config: The shape.
        weights: To begin with.
        options: Of the optimiser.
        mode: Of torch.compile for forward and backward, None for eager.
        compiled_update: Compile clipping and AdamW together instead of calling the fused kernels.
    """
    model = EagerGPT2(config)
    model.load_state_dict(weights)
    parameters = list(model.parameters())
    opt = options.optimizer
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": opt.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    which = {"foreach": True} if compiled_update else {"fused": True}
    optimizer = torch.optim.AdamW(groups, lr=opt.lr, betas=(opt.beta1, opt.beta2), eps=opt.eps, **which)
    forward: Any = model if mode is None else torch.compile(model, mode=mode)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, opt.clip, foreach=True)
        optimizer.step()

    apply = torch.compile(update) if compiled_update else update

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        loss = forward(inputs, targets)
        loss.backward()
        apply()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


CONTESTANTS: dict[str, Callable[[GPT2Config, dict[str, Tensor], PretrainConfig], Step]] = {
    "portlm": portlm_step,
    "eager": pytorch_step,
    "compile": functools.partial(pytorch_step, mode="default"),
    "compile+update": functools.partial(pytorch_step, mode="default", compiled_update=True),
    "compile-tuned": functools.partial(pytorch_step, mode="max-autotune-no-cudagraphs"),
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
    """Return batches of real text as bytes, the same for everybody."""
    text = torch.frombuffer(bytearray(python_topics().encode()), dtype=torch.uint8).long()
    T = config.context_length
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(text) - T - 1, (count, batch), generator=generator)
    return [
        (torch.stack([text[s : s + T] for s in row]), torch.stack([text[s + 1 : s + T + 1] for s in row]))
        for row in starts.tolist()
    ]


def loss_curve(step: Step, data: list[tuple[Tensor, Tensor]]) -> list[float]:
    """Return the losses of a contestant's first steps. Whatever it compiles, it compiles here."""
    return [step(*pair).item() for pair in itertools.islice(itertools.cycle(data), GATE_STEPS)]


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
    peak: float


def race(
    steps: dict[str, Step], data: list[tuple[Tensor, Tensor]], rounds: int, seconds: float, patience: int
) -> tuple[list[Round], int]:
    """Return the rounds, and how many were thrown away because the machine was busy."""
    source = itertools.cycle(data)
    counts = {name: max(2, math.ceil(seconds / 2 / sample(step, source, 5))) for name, step in steps.items()}
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
        noise, peak = meter.stop(), _C.probe_flops(20_000_000)
        order = order[1:] + order[:1]
        if noise.too_much(torch.get_num_threads()) and thrown < patience:
            thrown += 1
            say(f"round thrown away: steal {noise.steal:.1%}, load {noise.load:.1f}")
            continue
        kept.append(Round({name: sum(pair) / 2 for name, pair in times.items()}, noise, peak))
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
    names: list[str], config: GPT2Config, options: PretrainConfig, data: list[tuple[Tensor, Tensor]]
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
            curves[name] = loss_curve(step, data)
            steps[name] = step
        except (
            Exception
        ) as error:  # a rival that cannot run here is a line in the table, not the end of the race
            if name in ("portlm", "eager"):
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


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the race that the command line asks for."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    config = GPT2Config(
        vocab_size=256, context_length=arguments.context, n_layer=arguments.layers, n_head=arguments.heads,
        width=arguments.width,
    )  # fmt: skip
    options = settings.load(PretrainConfig, overrides=[("data.batch_size", arguments.batch)])
    rivals = [name for name in arguments.only or CONTESTANTS if name not in ("portlm", "eager")]
    data = batches(config, BATCHES, arguments.batch)
    steps, strays, absent = prepare(["portlm", "eager", *rivals], config, options, data)
    for name, stray in strays.items():
        if not within(stray, GATE_TOLERANCE):
            raise SystemExit(f"{name} does not train the same model: its loss strays by {stray:.2e}")
    rounds, thrown = race(steps, data, arguments.rounds, arguments.seconds, arguments.patience)
    flops, peak = step_flops(config, arguments.batch), max(r.peak for r in rounds)
    tokens = arguments.batch * config.context_length
    rows = []
    for name in steps:
        seconds = [r.seconds[name] for r in rounds]
        ratio, (low, high) = paired_ratio(seconds, [r.seconds["portlm"] for r in rounds])
        typical = statistics.median(seconds)
        rows.append({
            "name": name, "ms": 1e3 * typical, "tokens_per_second": tokens / typical, "of_peak": flops / typical / peak,
            "portlm_is_faster_by": ratio, "low": low, "high": high, "loss_stray": strays[name],
        })  # fmt: skip
    return {
        "setting": asdict(config) | {"batch": arguments.batch, "gflop_per_step": flops / 1e9},
        "rows": rows,
        "absent": absent,
        "peak_gflop_s": peak / 1e9,
        "rounds": [asdict(r) for r in rounds],
        "thrown_away": thrown,
        "environment": environment() | {"threads": torch.get_num_threads(), "cpu_flags": cpu_flags()},
    }


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    machine = result["environment"]
    print(f"{machine['cpu']}, {machine['threads']} threads, torch {machine['versions'].get('torch')}")
    print(
        f"{'':>15} {'ms/step':>9} {'tokens/s':>10} {'of peak':>8}   {'portlm is faster by':<22} {'loss strays':>11}"
    )
    for row in result["rows"]:
        ratio = (
            ""
            if row["name"] == "portlm"
            else f"{row['portlm_is_faster_by']:.2f}x [{row['low']:.2f}, {row['high']:.2f}]"
        )
        print(
            f"{row['name']:>15} {row['ms']:9.2f} {row['tokens_per_second']:10,.0f} {row['of_peak']:8.1%}   "
            f"{ratio:<22} {row['loss_stray']:11.1e}"
        )
    for name, reason in result["absent"].items():
        print(f"{name:>15} not available: {reason}")
    print(
        f"peak {result['peak_gflop_s']:.0f} GFLOP/s, "
        f"{result['setting']['gflop_per_step']:.2f} GFLOP per step, {len(result['rounds'])} rounds kept, "
        f"{result['thrown_away']} thrown away"
    )


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
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, help="rivals to run (default: all)")
    parser.add_argument(
        "--smoke", action="store_true", help="two short rounds against eager, whatever the noise"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.rounds, arguments.seconds, arguments.patience = 2, 0.3, 0
        arguments.only = arguments.only or ["eager"]
    result = measure(arguments)
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        show(result)


if __name__ == "__main__":
    main()
