"""Contenders take turns on one device, beside the limits of the same minutes.

The protocol of the CPU benchmarks, on a GPU: all contenders agree before one is timed; a round visits all of them,
the next round in the opposite order; a visit repeats the call between two CUDA events, for a set time and at least a
set number of calls; the result is the median over rounds of rival's time / our time, with a bootstrapped 95 %
interval. Copy bandwidth and the rate of large matrix products are probed between the rounds. Nothing is done to the
device's clocks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from context import Context
from torch import Tensor

from portlm.agreement import within
from portlm.flows.measuring import paired_ratio

Call = Callable[[], Any]

ROUNDS = 9
SECONDS = 0.02  # of one visit
CALLS = 10  # of one visit, at least


@dataclass(frozen=True)
class Case:
    """One task at one size, and who competes at it.

    Attributes:
        name: what and how large.
        contenders: name to call; the first is ours. All return the same tensors (or None to skip the comparison).
        moved: bytes that any implementation must move through the device's memory; 0 if memory is not the limit.
        flops: operations that any implementation must make; 0 if arithmetic is not the limit.
        dtype: of the matrix products that ``flops`` counts.
        tokens: that one call reads or learns from; the rate is then in tokens per second.
        tolerance: largest difference between contenders' results, relative to the largest value.
    """

    name: str
    contenders: dict[str, Call]
    moved: int = 0
    flops: float = 0
    dtype: torch.dtype = torch.float32
    tokens: int = 0
    tolerance: float = 1e-4


@dataclass
class Limits:
    """The best that the probes saw: bytes/s copied (read and written), FLOP/s of square matrix products by dtype."""

    dry: bool
    copy: float = 0.0
    products: dict[torch.dtype, float] = field(default_factory=dict)
    _buffers: dict[Any, tuple[Tensor, ...]] = field(default_factory=dict)

    def probe_copy(self) -> None:
        """Copy far more than the caches hold, ten times."""
        count = 1 << (10 if self.dry else 28)  # 1 GiB of float32
        if "copy" not in self._buffers:
            self._buffers["copy"] = torch.randn(2, count, device=_device(self.dry)).unbind()
        source, target = self._buffers["copy"]
        self.copy = max(self.copy, 8 * count / sample(lambda: target.copy_(source), 10, self.dry))

    def probe_product(self, dtype: torch.dtype) -> None:
        """Multiply large square matrices of random numbers (zeros would run faster)."""
        n = 16 if self.dry else 8192
        if dtype not in self._buffers:
            self._buffers[dtype] = torch.randn(2, n, n, device=_device(self.dry)).to(dtype).unbind()
        a, b = self._buffers[dtype]
        rate = 2 * n**3 / sample(lambda: a @ b, 3, self.dry)
        self.products[dtype] = max(self.products.get(dtype, 0.0), rate)


def _device(dry: bool) -> str:
    return "cpu" if dry else "cuda"


def sample(call: Call, repeats: int, dry: bool) -> float:
    """Return seconds per call."""
    if dry:
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        return max(time.perf_counter() - begin, 1e-9) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def compiled(function: Callable[..., Any], dry: bool, fullgraph: bool = True) -> Callable[..., Any]:
    """Return torch.compile's version of a function for fixed shapes; a dry run traces it and generates no code."""
    torch._dynamo.reset()
    backend = "eager" if dry else "inductor"
    return torch.compile(function, dynamic=False, fullgraph=fullgraph, backend=backend)


def with_gradients(function: Callable[..., Any], *inputs: Tensor) -> Call:
    """Return a call that runs a function forwards and backwards and returns its outputs and gradients.

    Args:
        function: maps the inputs to one tensor or several.
        inputs: floating tensors are differentiated.
    """
    leaves = [t.detach().clone().requires_grad_() if t.is_floating_point() else t for t in inputs]
    wanted = [t for t in leaves if t.requires_grad]
    upstream: list[Tensor] = []

    def call() -> list[Tensor]:
        y = function(*leaves)
        y = y if isinstance(y, tuple) else (y,)
        if not upstream:
            generator = torch.Generator(y[0].device).manual_seed(0)  # the same for every contender
            upstream.extend(torch.randn(t.shape, device=t.device, generator=generator).to(t.dtype) for t in y)
        return [*(t.detach() for t in y), *torch.autograd.grad(y, wanted, upstream)]

    return call


def without_gradients(function: Callable[..., Any], *inputs: Tensor) -> Call:
    """Return a call that runs a function forwards only."""

    @torch.no_grad()
    def call() -> Any:
        return function(*inputs)

    return call


def race(context: Context, case: Case, limits: Limits) -> None:
    """Measure one case and keep one figure for each contender. A dry run calls each once and keeps no time."""
    calls, absent = _agreeing(case)
    for name, why in absent.items():
        context.figure(case=case.name, contender=name, absent=why)
    if context.dry:
        _probe(case, limits)
        for name in calls:
            context.figure(case=case.name, contender=name, seconds=None)
        return
    repeats = {name: _repeats(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(ROUNDS):
        _probe(case, limits)
        for name in order:
            samples[name].append(sample(calls[name], repeats[name], context.dry))
        order.reverse()
    ours = next(iter(case.contenders))
    for name, times in samples.items():
        typical = statistics.median(times)
        line: dict[str, Any] = {"case": case.name, "contender": name, "seconds": typical, "samples": times}
        line |= _rate(case, typical, limits)
        if name != ours and ours in samples:
            line["ratio"], line["interval"] = paired_ratio(times, samples[ours])
        context.figure(**line)


def _probe(case: Case, limits: Limits) -> None:
    if case.moved:
        limits.probe_copy()
    if case.flops:
        limits.probe_product(case.dtype)


def _rate(case: Case, seconds: float, limits: Limits) -> dict[str, Any]:
    """Return the rate and which share of the limit it is; the limit itself too, because it varies."""
    if case.flops:
        limit, reached = limits.products[case.dtype], case.flops / seconds
        found = {
            "rate": reached / 1e12,
            "unit": "TFLOP/s",
            "of_limit": reached / limit,
            "limit": limit / 1e12,
        }
    elif case.moved:
        reached = case.moved / seconds
        found = {
            "rate": reached / 1e9,
            "unit": "GB/s",
            "of_limit": reached / limits.copy,
            "limit": limits.copy / 1e9,
        }
    else:
        return {}
    return found | ({"rate": case.tokens / seconds, "unit": "tok/s"} if case.tokens else {})


def _agreeing(case: Case) -> tuple[dict[str, Call], dict[str, str]]:
    """Call everybody once; return who can run, and why the others cannot.

    Raises:
        RuntimeError: ours cannot run, or somebody's result is not ours: nothing is timed then.
    """
    runnable: dict[str, Call] = {}
    absent: dict[str, str] = {}
    first: list[Tensor] | None = None
    for name, call in case.contenders.items():
        try:
            value = _tensors(call())
        except Exception as error:
            if first is None:
                raise
            absent[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        runnable[name] = call
        first = value if first is None else first
        for a, b in zip(first, value, strict=True):
            difference = float((a - b).abs().max()) if a.numel() else 0.0
            allowed = case.tolerance * max(float(a.abs().max()) if a.numel() else 0.0, 1e-30)
            if not within(difference, allowed):
                raise RuntimeError(
                    f"{case.name}: {name} differs from the first contender by {difference:.3g}, more than "
                    f"{allowed:.3g}: nothing was timed"
                )
    return runnable, absent


def _tensors(value: Any) -> list[Tensor]:
    if value is None:
        return []
    values: Iterable[Any] = value if isinstance(value, list | tuple) else [value]
    return [torch.as_tensor(v).detach().double() for v in values]


def _repeats(call: Call) -> int:
    """Return how many calls fill one visit."""
    call()
    once = min(sample(call, 3, False) for _ in range(3))
    return max(CALLS, round(SECONDS / max(once, 1e-9)))
