"""How portlm measures speed, for `portlm bench` and for benchmarks/ alike: statistics, limits, noise, surroundings.

Contenders take turns, so that a slow minute of a shared machine hits all of them; what is compared are ratios of the
same round; and beside every rate stands what the machine gave in the same run.
"""

import contextlib
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

STEAL_LIMIT = 0.01  # share of the machine's time that the hypervisor may take in a round that counts

PACKAGES = (
    "portlm", "torch", "onnx", "onnxruntime", "onnxruntime-ep-webgpu", "apache-tvm", "numpy", "transformers",
    "llama-cpp-python", "onnxruntime-genai", "openvino",
)  # fmt: skip


@dataclass
class Limits:
    """The best that the probes saw: bytes/s read and of a triad, FLOP/s of multiply-adds, and of those of bytes."""

    read: float = 0.0
    triad: float = 0.0
    flops: float = 0.0
    int8: float = 0.0

    def probe(self, moved: int = 1 << 28, steps: int = 20_000_000, *, int8: bool = False) -> None:
        """Probe again, with all threads of the caller's pool, and keep the best.

        Args:
            moved: bytes of the buffer that is read, well beyond the caches.
            steps: multiply-adds of each lane.
            int8: also those of bytes.
        """
        from portlm import _C

        self.read = max(self.read, _C.probe_bandwidth(moved))
        self.triad = max(self.triad, _C.probe_triad(moved))
        self.flops = max(self.flops, _C.probe_flops(steps))
        if int8:
            self.int8 = max(self.int8, _C.probe_int8(steps))


def bootstrap(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """The interval of the median of values, by resampling them 5000 times with a fixed seed."""
    array = np.array(values)
    picks = np.random.default_rng(0).integers(0, len(array), (5000, len(array)))
    low, high = np.quantile(np.median(array[picks], axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def paired_ratio(theirs: Sequence[float], ours: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The median of their time / our time, round by round, and its interval: above 1 means that we are faster.

    Raises:
        ValueError: they took different numbers of rounds.
    """
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    return statistics.median(ratios), bootstrap(ratios)


def spread(values: Sequence[float]) -> float:
    """The interquartile range, 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def _machine_ticks() -> list[int]:
    """Time of all cores since the machine started: user, nice, system, idle, iowait, irq, softirq, steal."""
    stat = Path("/proc/stat")
    return [int(v) for v in stat.read_text().splitlines()[0].split()[1:9]] if stat.exists() else [0] * 8


class StealMeter:
    """Share of the machine's time that the hypervisor gave to others since the meter was made, 0 where unknown."""

    def __init__(self) -> None:
        self._begin = _machine_ticks()

    def share(self) -> float:
        """The share so far."""
        spent = [b - a for a, b in zip(self._begin, _machine_ticks(), strict=True)]
        return spent[7] / sum(spent) if sum(spent) else 0.0


@dataclass(frozen=True)
class Ticks:
    """Time on a machine with /proc, in its ticks over all cores; nothing elsewhere.

    Attributes:
        total: that passed.
        others: that programs took which are not the measured one.
        steal: that the hypervisor gave to others.
    """

    total: int = 0
    others: int = 0
    steal: int = 0

    def __add__(self, more: "Ticks") -> "Ticks":
        return Ticks(self.total + more.total, self.others + more.others, self.steal + more.steal)

    @property
    def disturbed(self) -> float:
        """Share of the machine that others had, by whomever it was given."""
        return (self.others + self.steal) / self.total if self.total else 0.0


class OthersMeter:
    """Time that other programs take from now on.

    Own programs count as others, unless they are named: one that spins while it should be parked is a disturbance.
    """

    def __init__(self, pids: Iterable[int]):
        """Begin, with the processes that may work."""
        self._pids = list(pids)
        self._begin = self._read()

    def _read(self) -> Ticks:
        user, nice, system, idle, iowait, irq, softirq, steal = _machine_ticks()
        busy, own = user + nice + system + irq + softirq, 0
        for pid in self._pids:
            with contextlib.suppress(OSError):  # it has ended
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                own += int(fields[11]) + int(fields[12])
        return Ticks(busy + idle + iowait + steal, busy - own, steal)

    def ticks(self) -> Ticks:
        """What passed so far."""
        now = self._read()
        others = max(0, now.others - self._begin.others)  # two files of the kernel, read one after the other
        return Ticks(now.total - self._begin.total, others, now.steal - self._begin.steal)


_BUSY = """
import os, sys
while os.getppid() == int(sys.argv[1]):
    for _ in range(1_000_000):
        pass
"""


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[list[int]]:
    """Keep cores busy inside the block, each loop in a session of its own; yield the processes.

    They end by themselves when this process was killed.
    """
    command = [sys.executable, "-P", "-c", _BUSY, str(os.getpid())]
    loops = [subprocess.Popen(command, start_new_session=True) for _ in range(count)]
    try:
        yield [loop.pid for loop in loops]
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def environment() -> dict[str, Any]:
    """Describe the machine and the versions that a figure depends on."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    cpu = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        cpu = next((v.strip() for k, v in fields.items() if k.strip() == "model name"), cpu)
    try:
        from portlm import _C

        isa = _C.isa()
    except ImportError:
        isa = "not built"
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "isa": isa,
        "load": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
    }
