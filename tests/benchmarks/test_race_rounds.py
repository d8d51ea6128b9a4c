"""The order of a race, which rounds count, and who leaves it: without an engine."""

from collections import Counter
from pathlib import Path

import pytest

from portlm.errors import PortlmError
from portlm.flows.measuring import OthersMeter, Ticks, busy_loops
from portlm.flows.race.rounds import Pass, order, run_rounds

PASSES = (Pass(1, 1, 4), Pass(8, 16, 4))
MEASURES = {"decode@1", "prefill@8", "decode@16"}


class FakeLane:
    """A contender that takes as many seconds as it is told, and may die at a visit."""

    def __init__(self, name, seconds=1.0, dies_at=None, log=None):
        self.name, self.pid, self.seconds, self.dies_at = name, 0, seconds, dies_at
        self.visits, self.log = 0, log if log is not None else []

    def call(self, command, patience=None, **arguments):
        assert command == "visit"
        self.visits += 1
        self.log.append((self.name, arguments["seed"]))
        if self.visits == self.dies_at:
            raise PortlmError(f"{self.name}: the engine's process died (exit code -11)")
        return {"prefill": self.seconds, "decode": 2 * self.seconds}


def meters(*disturbed):
    """A meter for each visit in turn, which says what share others had; nothing after the last."""
    left = list(disturbed)

    class Fake:
        def __init__(self, pids):
            share = left.pop(0) if left else 0.0
            self._ticks = Ticks(1000, int(1000 * share))

        def ticks(self):
            return self._ticks

    return Fake


def run(lanes, rounds=3, meter=None, repeats=5, passes=PASSES):
    return run_rounds(
        lanes, passes, rounds, probe=lambda: {"read": 1.0}, allowed=0.02, repeats=repeats, settle=0,
        meter=meter or meters(),
    )  # fmt: skip


@pytest.mark.parametrize("count", [2, 3, 5])
def test_everybody_comes_everywhere_equally_often_and_neighbours_change_sides(count):
    names = [f"n{i}" for i in range(count)]
    rounds = [order(names, i) for i in range(2 * count)]
    for place in range(count):
        assert set(Counter(visit[place] for visit in rounds).values()) == {2}
    for i in range(0, 2 * count, 2):
        assert rounds[i + 1] == rounds[i][::-1]


def test_the_first_round_is_not_counted_and_figures_are_seconds_per_token():
    lane = FakeLane("a", seconds=8.0)
    outcome = run([lane])
    assert lane.visits == len(PASSES) * 4
    assert [set(r.seconds["a"]) for r in outcome.rounds] == [MEASURES] * 3
    assert outcome.samples("a", "prefill@8") == [1.0] * 3
    assert outcome.samples("a", "decode@16") == [4.0] * 3


def test_everybody_gets_the_same_tokens_in_a_round_and_others_in_the_next():
    log = []
    run([FakeLane("a", log=log), FakeLane("b", log=log)], rounds=2)
    seeds = {name: [seed for who, seed in log if who == name] for name in "ab"}
    assert seeds["a"] == seeds["b"]
    assert seeds["a"][-1] != seeds["a"][2 * len(PASSES) - 1]


def test_a_disturbed_round_is_repeated():
    """One visit of the warm-up, then a round in which others had half of the machine."""
    outcome = run([FakeLane("a")], meter=meters(0, 0.5, 0, 0.01, 0))
    assert outcome.repeated == 1
    assert [(r.noisy, r.disturbed) for r in outcome.rounds] == [(False, 0.0), (False, 0.01), (False, 0.0)]


def test_a_disturbance_of_one_contender_repeats_the_round_of_all():
    lanes = [FakeLane("a"), FakeLane("b")]
    outcome = run(lanes, rounds=1, meter=meters(0, 0, 0, 0.5))
    assert outcome.repeated == 1
    assert [lane.visits for lane in lanes] == [3 * len(PASSES)] * 2


def test_when_patience_ends_disturbed_rounds_are_kept_and_say_so():
    outcome = run([FakeLane("a")], meter=meters(*[0.5] * 9), repeats=2)
    assert outcome.repeated == 2
    assert [r.noisy for r in outcome.rounds] == [True, True, True]


@pytest.mark.parametrize("dies_at", [1, 2, 5])
def test_who_crashes_leaves_and_the_others_go_on(dies_at):
    outcome = run([FakeLane("a"), FakeLane("b", dies_at=dies_at), FakeLane("c")])
    assert outcome.failed == {"b": "the engine's process died (exit code -11)"}
    assert [set(r.seconds) for r in outcome.rounds] == [{"a", "c"}] * 3


def test_if_everybody_crashes_the_race_ends():
    outcome = run([FakeLane("a", dies_at=1)])
    assert outcome.rounds == []
    assert "a" in outcome.failed


def test_a_program_that_is_not_named_counts_as_a_disturbance():
    """Of two meters at the same time, the one that does not know the busy loop has its time as others'."""
    if not Path("/proc/stat").exists():
        pytest.skip("this system has no /proc/stat")
    with busy_loops(1) as pids:
        knowing, ignorant = OthersMeter(pids), OthersMeter([])
        own = 0
        while own < 10:  # ticks
            own = ignorant.ticks().others - knowing.ticks().others
        assert ignorant.ticks().disturbed > 0
