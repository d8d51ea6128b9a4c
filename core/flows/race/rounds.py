"""The order of a race: who is measured when, and which rounds count.

A round visits every contender. The next one goes the opposite way, and every second one starts with another, so that
neither a slow minute nor a neighbour's warm cache favours anyone. A round in which other programs used the machine is
repeated. Who crashes leaves the race, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from portlm.errors import PortlmError
from portlm.flows.measuring import OthersMeter, Ticks

LEAST = 0.25  # seconds that a visit spends on each pass, or more
PATIENCE = 900.0  # seconds for one visit; an engine that spins on a busy machine can take minutes


class Lane(Protocol):
    """A contender's process, as a round sees it; WorkerProcess is one."""

    name: str
    pid: int

    def call(self, command: str, patience: float | None = None, **arguments: Any) -> dict[str, Any]:
        """Send a command and return its answer."""
        ...


class Meter(Protocol):
    """What tells how much of a visit others had; OthersMeter is one."""

    def ticks(self) -> Ticks:
        """What passed since it was made."""
        ...


@dataclass(frozen=True)
class Pass:
    """What one visit measures: reading a prompt, and decoding behind a context.

    Attributes:
        prompt: tokens read in one call, timed.
        context: tokens in the cache when decoding begins; those beyond the prompt are read untimed.
        tokens: decoded, timed.
    """

    prompt: int
    context: int
    tokens: int

    @property
    def names(self) -> dict[str, tuple[str, int]]:
        """Measure -> (which time of a visit, tokens it took); a prompt of one token is no prefill."""
        found = {f"decode@{self.context}": ("decode", self.tokens)}
        return found | ({f"prefill@{self.prompt}": ("prefill", self.prompt)} if self.prompt > 1 else {})


@dataclass
class Round:
    """One round that counts.

    Attributes:
        seconds: contender -> measure -> seconds per token.
        limits: what the probe saw.
        disturbed: share of the machine that others had while somebody was measured.
        noisy: more than allowed; kept because patience had ended.
    """

    seconds: dict[str, dict[str, float]]
    limits: dict[str, float]
    disturbed: float
    noisy: bool


@dataclass
class Outcome:
    """A race that was run.

    Attributes:
        rounds: those that count.
        repeated: how many were thrown away.
        failed: contender -> why it left.
    """

    rounds: list[Round] = field(default_factory=list)
    repeated: int = 0
    failed: dict[str, str] = field(default_factory=dict)

    def samples(self, name: str, measure: str) -> list[float]:
        """Seconds per token of a contender, round by round."""
        return [r.seconds[name][measure] for r in self.rounds]


def order(names: Sequence[str], index: int) -> list[str]:
    """Who comes when in a round: the start moves on every second round, and every other round is backwards."""
    shift = index // 2 % len(names)
    turned = [*names[shift:], *names[:shift]]
    return turned[::-1] if index % 2 else turned


def run_rounds(
    lanes: Iterable[Lane],
    passes: Sequence[Pass],
    rounds: int,
    *,
    probe: Callable[[], Mapping[str, float]],
    allowed: float,
    repeats: int,
    pids: Iterable[int] = (),
    settle: float = 0.1,
    meter: Callable[[Iterable[int]], Meter] = OthersMeter,
    progress: Callable[[str], None] = lambda message: None,
) -> Outcome:
    """Measure contenders in rounds, after one that is not counted.

    Args:
        lanes: their processes, loaded.
        passes: what a visit measures.
        rounds: that have to count.
        probe: what the machine allows just now; called once in every round.
        allowed: share of the machine that others may have in a round that counts.
        repeats: rounds that may be thrown away, all together.
        pids: processes beside the visited one that work on purpose.
        settle: seconds between visits, in which a process that spins after its answer goes to sleep.
        meter: made with the processes that may work, before each visit.
        progress: called with a line after each round.
    """
    running = {lane.name: lane for lane in lanes}
    outcome = Outcome()
    index = -1  # the first round warms up
    while running and len(outcome.rounds) < rounds:
        limits, ticks = dict(probe()), Ticks()
        seconds: dict[str, dict[str, float]] = {}
        for name in order(list(running), max(index, 0)):
            time.sleep(settle)
            measuring = meter([running[name].pid, *pids])
            try:
                seconds[name] = _visit(running[name], passes, seed=max(index, 0) + 1)
            except PortlmError as error:
                outcome.failed[name] = str(error).removeprefix(f"{name}: ")
                del running[name]
                progress(f"{name} has left the race: {outcome.failed[name]}")
            ticks += measuring.ticks()
        if index < 0:
            index = 0
            continue
        noisy = ticks.disturbed > allowed
        if noisy and outcome.repeated < repeats:
            outcome.repeated += 1
            progress(f"round thrown away: others had {ticks.disturbed:.1%} of the machine")
            continue
        outcome.rounds.append(Round(seconds, limits, ticks.disturbed, noisy))
        index += 1
        progress(f"round {index} of {rounds}: others had {ticks.disturbed:.1%} of the machine")
    for round_ in outcome.rounds:  # of one that left in the middle, nothing is kept
        round_.seconds = {name: found for name, found in round_.seconds.items() if name in running}
    return outcome


def _visit(lane: Lane, passes: Sequence[Pass], seed: int) -> dict[str, float]:
    found = {}
    for turn in passes:
        took = lane.call(
            "visit", PATIENCE, prompt=turn.prompt, context=turn.context, tokens=turn.tokens, seed=seed, least=LEAST,
        )  # fmt: skip
        for measure, (time_of, tokens) in turn.names.items():
            found[measure] = took[time_of] / tokens
    return found
