"""When guesses are read: by the times of passes, on a clock that only the engine moves."""

import numpy as np
import pytest

from portlm.runtimes import guessing
from portlm.runtimes.base import ArrayEngine
from portlm.runtimes.drafting import Draft, Lookup
from portlm.runtimes.null import DECODER
from portlm.runtimes.pace import FAIR, FIRST_PLAIN, LONGEST_PLAIN, MARGIN, OVERHEAD, Pace
from portlm.runtimes.session import Session
from portlm.runtimes.speculation import Speculation
from portlm.tokenizer import byte_tokenizer

V = 257
BYTES = byte_tokenizer()


class Reciting(ArrayEngine):
    """Says a text whatever it reads, and takes cost(tokens) seconds for each pass."""

    name, device, profile, precision = "reciting", "cpu", "native", "fp32"

    def __init__(self, text, cost):
        super().__init__({"decoder": DECODER}, V, len(text) + 100)
        self.text, self.cost, self.now = text, cost, 0.0

    def clock(self):
        return self.now

    def _call(self, role, inputs, tensors):
        ids, kept = inputs["input_ids"], inputs["logits_to_keep"]
        self.now += self.cost(ids.shape[1])
        logits = np.zeros((len(ids), len(kept), V), np.float32)
        for b, places in enumerate(inputs["position_ids"][:, kept]):
            for i, place in enumerate(places):
                logits[b, i, self.text[min(place + 1, len(self.text) - 1)]] = 1
        return {"logits": logits}, {"past_ids": np.concatenate([tensors["past_ids"], ids], axis=1)}


class Looping(Reciting):
    """The same, with a loop of its own, in which a token takes `token` seconds and coming back OVERHEAD."""

    def __init__(self, text, cost, token):
        super().__init__(text, cost)
        self.token = token

    def advance(self, state, asked):
        made = max(1, min(asked.count, int(asked.seconds / self.token) + 1))
        self.now += made * self.token + OVERHEAD
        place = int(asked.lengths[0]) + 1
        said = [self.text[min(place + i, len(self.text) - 1)] for i in range(made)]
        read = np.array([[*asked.tokens, *said[:-1]]], np.int64)
        kept = {"past_ids": np.concatenate([state.take()["past_ids"], read], axis=1)}
        return np.array(said)[:, None], self._state("decoder", 1, state.past + made, kept)


COSTS = {
    "memory bound": lambda tokens: 1.0 + 0.05 * (tokens - 1),
    "compute bound": lambda tokens: 0.1 + 0.9 * tokens,
    "in steps of four": lambda tokens: float(-(-tokens // 4)),
}
NOISE = np.random.default_rng(1).integers(0, 256, 700).tolist()
TEXTS = {"nothing comes twice": NOISE, "all comes twice": NOISE[:350] * 2, "one word": list(b"abcdefg" * 100)}


@pytest.fixture
def recite(monkeypatch):
    """Function (text, cost, batch, options): the mean seconds of a token after the first."""

    def recite(text, cost, rows=1, **options):
        engine = Reciting(text, cost)
        monkeypatch.setattr(
            guessing, "Speculation", lambda *given, **more: Speculation(*given, **more, clock=engine.clock)
        )
        count = len(text) - 20
        results = Session(engine, BYTES).generate([text[:10]] * rows, max_new_tokens=count, **options)
        assert all(r.token_ids == tuple(text[10 : 10 + count]) for r in results)
        return (engine.now - cost(10)) / (count - 1), results[0].stats

    return recite


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("text", TEXTS)
def test_reading_guesses_never_costs_more_than_a_little(text, cost, recite):
    seconds, _ = recite(TEXTS[text], COSTS[cost], lookup=True)
    assert seconds <= 1.02 * COSTS[cost](1)


@pytest.mark.parametrize(
    ("text", "cost", "least"),
    [
        ("all comes twice", "memory bound", 1.7),  # 2 at most: half of it is new
        ("one word", "memory bound", 7.0),  # 17 tokens in the time of 1.8 at most
        ("all comes twice", "in steps of four", 1.4),
        ("one word", "in steps of four", 3.0),
    ],
)
def test_a_text_that_repeats_itself_is_written_faster_where_a_pass_is_cheap(text, cost, least, recite):
    seconds, stats = recite(TEXTS[text], COSTS[cost], lookup=True)
    assert least * seconds <= COSTS[cost](1)
    assert stats.accepted > 0.6 * stats.drafted
    assert stats.passes + stats.accepted == stats.new_tokens - 1


def test_guesses_are_as_long_as_a_pass_is_cheap(recite):
    """Four tokens cost as much as one, and the fifth as much as four."""
    _, stats = recite(TEXTS["one word"], lambda tokens: 1.0 if tokens <= 4 else 4.0, lookup=True)
    assert 3.5 < stats.tokens_per_pass <= 4.0


def test_the_caller_bounds_the_length_of_a_guess(recite):
    _, stats = recite(TEXTS["one word"], COSTS["memory bound"], lookup=3)
    assert 3.5 < stats.tokens_per_pass <= 4.0


def test_rows_share_a_pass_and_each_has_a_guess_of_its_own(recite):
    seconds, stats = recite(TEXTS["all comes twice"], COSTS["memory bound"], rows=3, lookup=True)
    assert seconds * 1.6 < 1
    assert stats.tokens_per_pass > 3 * 1.6


class Wrong:
    """Guesses what does not come."""

    def propose(self, new, count):
        return Draft([(new[-1] + 128) % 256] * count)


def test_a_drafter_that_is_always_wrong_is_left_alone(recite):
    seconds, stats = recite(TEXTS["one word"], COSTS["memory bound"], draft=lambda row: Wrong())
    assert stats.accepted == 0
    assert 0 < stats.drafted < 40
    assert seconds < 1.02


def test_a_drafter_that_becomes_right_is_noticed(recite):
    """700 tokens that nothing foretells, then a word 100 times: guesses are judged all the while."""
    seconds, stats = recite([*NOISE, *TEXTS["one word"]], COSTS["memory bound"], lookup=True)
    assert seconds < 0.6
    assert stats.accepted > 500


class Slow:
    """Makes another drafter's guesses in so many seconds each, the first one in so many times as long."""

    def __init__(self, drafter, engine, seconds, first):
        self.drafter, self.engine, self.seconds, self.times = drafter, engine, seconds, first

    def propose(self, new, count):
        self.engine.now += self.seconds * self.times
        self.times = 1
        return self.drafter.propose(new, count)


@pytest.fixture
def recite_in_a_loop(monkeypatch):
    """Function (text, tokens, drafter, seconds, first): the time of guesses over that of plain decoding, and counts.

    A token takes 0.1 ms in the loop. A pass from Python takes 0.2 ms, and 0.01 ms more for each further token.
    """

    def recite(text, count, drafter, seconds, first=1):
        engine = Looping(text, lambda tokens: 200e-6 + 10e-6 * (tokens - 1), 100e-6)
        monkeypatch.setattr(
            guessing, "Speculation", lambda *given, **more: Speculation(*given, **more, clock=engine.clock)
        )
        draft = lambda row: Slow(drafter(), engine, seconds, first)  # noqa: E731
        took = []
        for options in ({}, {"draft": draft}):
            engine.now = 0.0
            result = Session(engine, BYTES).generate(text[:10], max_new_tokens=count, **options)
            assert result.token_ids == tuple(text[10 : 10 + count])
            took.append(engine.now)
        return took[1] / took[0], result.stats

    return recite


# What a lookup takes, and a model that draws from Python; the first time, the prompt is read.
DRAFTERS = {
    "lookup": (Lookup, 30e-6, 3),
    "wrong": (Wrong, 30e-6, 3),
    "model": (Lookup, 500e-6, 3),
    "wrong model": (Wrong, 500e-6, 3),
}


@pytest.mark.parametrize("count", [64, 300, 4000])
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("text", ["nothing comes twice", "all comes twice"])
def test_a_model_whose_tokens_need_no_python_loses_nothing_to_guesses(text, drafter, count, recite_in_a_loop):
    """A thirtieth is left to finding out whether they pay."""
    long = np.random.default_rng(2).integers(0, 256, 4100).tolist()
    said = {"nothing comes twice": long, "all comes twice": (long[:30] + long[40:70] + long[:30]) * 50}[text]
    times, _ = recite_in_a_loop(said, count, *DRAFTERS[drafter])
    assert times <= 1 / 0.97


def test_guesses_of_such_a_model_are_found_out_where_they_pay(recite_in_a_loop):
    times, stats = recite_in_a_loop(TEXTS["one word"] * 6, 4000, *DRAFTERS["lookup"])
    assert times < 0.6
    assert stats.accepted > 2000


def test_a_short_text_of_such_a_model_never_leaves_its_loop(recite_in_a_loop):
    times, stats = recite_in_a_loop(TEXTS["one word"], 64, *DRAFTERS["lookup"])
    assert times == 1
    assert stats.drafted == 0


def test_what_a_guess_costs_decides_how_often_one_is_made():
    pace, looping = Pace(), Pace(loop=True)
    assert pace.plain(1) == FIRST_PLAIN  # nothing is known yet
    for each in (pace, looping):
        each.took(1, 1, 1e-3)
        each.guessed(1e-6)
    assert pace.plain(1) == 1
    assert looping.plain(1) > 1  # to come back costs something, too
    for _ in range(50):
        pace.guessed(1e-4)
    assert pace.plain(1) == 10
    for _ in range(50):
        pace.guessed(1.0)
    assert pace.plain(1) == LONGEST_PLAIN


def test_the_first_guess_waits_until_what_it_takes_is_little():
    pace = Pace()
    pace.took(1, 1, 1e-2)
    assert pace.first(1, 1e-4) == FIRST_PLAIN
    assert pace.first(1, 4e-3) == 40


def test_one_interrupted_pass_changes_little():
    pace = Pace()
    for _ in range(10):
        pace.took(1, 1, 1.0)
        pace.took(1, 3, 1.1)
        pace.judge(0, [5, 6], [5, 6])
    before = pace.length(1, [(0, 2)])
    pace.took(1, 3, 1000.0)
    assert before == pace.length(1, [(0, 2)]) == 2


def test_kinds_of_guesses_are_judged_apart():
    pace = Pace()
    pace.took(1, 1, 1.0)
    pace.took(1, 5, 1.2)
    for _ in range(30):
        pace.judge(1, [5, 6], [7, 6])
        pace.judge(8, [5, 6, 7, 8], [5, 6, 7, 8])
    assert pace.length(1, [(1, 4)]) == 0
    assert pace.length(1, [(8, 4)]) == 4
    assert pace.length(2, [(8, 4)]) == 0  # of two rows no pass was timed


def test_a_guess_that_is_cut_says_nothing_of_what_did_not_come():
    pace = Pace()
    pace.took(1, 1, 1.0)
    for _ in range(100):
        pace.judge(0, [5, 6, 7], [5])
    assert pace.length(1, [(0, 3)]) > 0
    assert pace._right == {(0, 0): pytest.approx(1.0, abs=1e-5)}
    assert FAIR < 1 / MARGIN
