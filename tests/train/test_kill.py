"""A few kills of scripts/kill_test.py; releases run thousands."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

SCRIPT = Path(__file__).parents[2] / "scripts" / "kill_test.py"


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_kill_9_at_random_moments_costs_no_checkpoint_and_no_bit(objective):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills", "12", "--seed", "7", "--objective", objective, "--json"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout)
    assert counts["kills"] >= 12
    assert counts["kills_inside_a_save"] > 0
    assert counts["runs"] >= 1
    for failure in ("corrupt", "unresumable", "fallbacks", "lost", "different", "leftovers"):
        assert counts[failure] == 0, counts
