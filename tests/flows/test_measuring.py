"""The statistics that every figure of portlm goes through."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from portlm.flows.measuring import Limits, StealMeter, bootstrap, environment, paired_ratio, spread


def test_a_ratio_is_of_the_same_round():
    """Round by round they need 2, 1 and 4 times our time; the ratio of the medians, 3 and 2, would be 1.5."""
    ratio, (low, high) = paired_ratio([2.0, 3.0, 8.0], [1.0, 3.0, 2.0])
    assert (ratio, low, high) == (2.0, 1.0, 4.0)
    with pytest.raises(ValueError, match="shorter"):
        paired_ratio([1.0, 2.0], [1.0])


def test_the_interval_holds_the_true_median_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = bootstrap(rng.lognormal(0.0, 0.1, 15).tolist())
        hits += low <= 1.0 <= high
    # 190 expected; the median of 15 is bootstrapped a little too narrowly, and 200 trials scatter by 3.
    assert 176 <= hits <= 200


def test_the_same_figures_give_the_same_interval():
    values = [1.0, 1.1, 0.9, 1.3, 1.2]
    assert bootstrap(values) == bootstrap(values)


def test_spread_is_the_interquartile_range():
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == 2.0
    assert spread([7.0]) == 0.0


def test_limits_keep_the_best_and_a_meter_starts_at_nothing():
    limits = Limits(read=1e30)
    limits.probe(1 << 20, 10_000)
    assert limits.read == 1e30
    assert limits.triad > 0
    assert limits.flops > 0
    assert limits.int8 == 0
    limits.probe(1 << 20, 10_000, int8=True)
    assert limits.int8 > 0
    assert 0 <= StealMeter().share() <= 1


def test_the_surroundings_name_machine_and_versions():
    found = environment()
    assert found["cores"] >= 1
    assert "numpy" in found["versions"]


def test_busy_loops_end_when_who_began_them_is_killed():
    program = (
        "import time\nfrom portlm.flows.measuring import busy_loops\n"
        "with busy_loops(1) as pids:\n    print(*pids, flush=True)\n    time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as began:
        loop = int(began.stdout.readline())
        os.kill(loop, 0)  # it runs
        began.send_signal(signal.SIGKILL)
    until = time.monotonic() + 60
    while _runs(loop) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _runs(loop)


def _runs(pid: int) -> bool:
    """Whether a process is there and has not ended; one that nobody waits for may stay as an entry of the table."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
