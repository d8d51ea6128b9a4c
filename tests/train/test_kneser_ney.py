"""Kneser-Ney: the paper's formulas word for word over dictionaries, and the tables that say the same."""

import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is missing: pip install portlm[train]")
pytest.importorskip("numba", reason="numba is missing: pip install portlm[train]")

import torch

from portlm.errors import UsageError
from portlm.train import ngram_counts
from portlm.train.kneser_ney import MODIFIED, PLAIN, Discounts, discounts, estimate, make_model
from portlm.train.ngram import scores
from portlm.train.ngram_counts import count, lay_out

BEGIN = -1  # stands before the first word


def text(length, vocabulary, seed=0):
    """Words of very different frequencies, each partly decided by the one before: there are counts of all sizes."""
    rng = np.random.default_rng(seed)
    follow = rng.permuted(np.tile(np.arange(vocabulary), (vocabulary, 1)), axis=1)
    ranks = np.minimum(rng.zipf(1.4, length) - 1, vocabulary - 2)
    words = [0]
    for rank in ranks[1:]:
        words.append(int(follow[words[-1], rank]))
    return np.array(words)


class Formulas:
    """p(w | h) by the definition, recursively, from counts in dictionaries."""

    def __init__(self, words, vocabulary, order, smoothing):
        words = [int(word) for word in words]
        self.V, self.order = vocabulary, order
        self.counts = {}
        for length in range(1, order + 1):
            runs = [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]
            if length == order:
                self.counts[length] = Counter(runs)
            else:
                before = [BEGIN, *words]
                self.counts[length] = Counter(
                    run for _, run in {(before[i], run) for i, run in enumerate(runs)}
                )
        self.followers = {n: defaultdict(dict) for n in self.counts}
        for n, counts in self.counts.items():
            for run, c in counts.items():
                self.followers[n][run[:-1]][run[-1]] = c
        self.discounts = {n: self.discount(counts, smoothing) for n, counts in self.counts.items()}

    @staticmethod
    def discount(counts, smoothing):
        n = Counter(counts.values())
        without = {MODIFIED: (0.5, 1.0, 1.5), PLAIN: (0.75,) * 3}[smoothing]
        if not n[1] or not n[2] or (smoothing == MODIFIED and not n[3]):
            return without
        y = n[1] / (n[1] + 2 * n[2])
        if smoothing == PLAIN:
            return (y, y, y)
        found = (1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3])
        return found if all(0 < d <= r for r, d in enumerate(found, 1)) else without

    def p(self, word, history):
        history = tuple(history)[-(self.order - 1) :] if self.order > 1 else ()
        return self._p(word, history)

    def _p(self, word, history):
        n = len(history) + 1
        lower = self._p(word, history[1:]) if history else 1 / self.V
        followers = self.followers[n].get(history)
        if not followers:
            return lower
        d, total = self.discounts[n], sum(followers.values())
        weight = sum(d[min(c, 3) - 1] for c in followers.values()) / total
        c = followers.get(word, 0)
        own = max(c - d[min(c, 3) - 1], 0) / total if c else 0.0
        return own + weight * lower


CASES = [(1, MODIFIED), (2, MODIFIED), (3, PLAIN), (4, MODIFIED), (5, PLAIN)]
every_case = pytest.mark.parametrize(("order", "smoothing"), CASES)


@pytest.fixture(scope="module")
def made():
    """(order, smoothing) -> the formulas, the estimate with its levels, and the model, each made once."""
    found = {}

    def make(order, smoothing):
        if (order, smoothing) not in found:
            words = text(2000, 13)
            levels = list(count(words, 13, order))
            numbers = estimate(levels, smoothing)
            found[order, smoothing] = (
                Formulas(words, 13, order, smoothing),
                levels,
                numbers,
                make_model(levels, numbers),
            )
        return found[order, smoothing]

    return make


def runs_of(levels):
    """The words of every run, by length."""
    found = [[(int(word),) for word in levels[0].words]]
    for level in levels[1:]:
        found.append([found[-1][p] + (int(w),) for p, w in zip(level.parents, level.words, strict=True)])
    return found


@every_case
def test_counts_are_those_of_a_dictionary_and_runs_stand_in_order(made, order, smoothing):
    formulas, levels, _, _ = made(order, smoothing)
    for n, (level, runs) in enumerate(zip(levels, runs_of(levels), strict=True), 1):
        assert runs == sorted(set(runs))
        assert {run: c for run, c in zip(runs, level.counts, strict=True) if c} == formulas.counts[n]
    for shorter, level, runs in zip(runs_of(levels), levels[1:], runs_of(levels)[1:], strict=False):
        assert [shorter[s] for s in level.suffixes] == [run[1:] for run in runs]


@every_case
def test_probabilities_are_those_of_the_formulas(made, order, smoothing):
    """The same sums in float64, in another order."""
    formulas, levels, numbers, _ = made(order, smoothing)
    for level, (runs, found) in enumerate(zip(runs_of(levels), numbers.probabilities, strict=True)):
        expected = [formulas._p(run[-1], run[:-1]) for run in runs]
        np.testing.assert_allclose(found, expected, rtol=1e-12, err_msg=str(level + 1))
    assert [d.values for d in numbers.discounts] == [
        pytest.approx(formulas.discounts[n], rel=1e-12) for n in range(1, order + 1)
    ]


@every_case
def test_probabilities_sum_to_one_behind_any_history(made, order, smoothing):
    """Seen and unseen ones: 1e-10 of the float64 numbers, as of the formulas, and 1e-6 of the tables in float32."""
    formulas, levels, numbers, model = made(order, smoothing)
    rng = np.random.default_rng(1)
    places = {run: i for runs in runs_of(levels) for i, run in enumerate(runs)}

    def p(word, history):
        run = (*history, word)
        if run in places:
            return numbers.probabilities[len(run) - 1][places[run]]
        weight = numbers.weights[len(history) - 1][places[history]] if history in places else 1.0
        return weight * p(word, history[1:])

    histories = rng.integers(13, size=(1000, 6))
    for row in histories[:200]:
        history = tuple(map(int, row))[6 - (order - 1) :]
        values = np.array([p(word, history) for word in range(13)])
        assert abs(values.sum() - 1) <= 1e-10
        np.testing.assert_allclose(values, [formulas.p(w, history) for w in range(13)], rtol=1e-10)
    sums = model(torch.from_numpy(histories))[:, -1].double().exp().sum(-1)
    assert (sums - 1).abs().max() <= 1e-6


@every_case
def test_the_model_says_what_the_formulas_say(made, order, smoothing):
    """Logarithms rounded to float32, of which up to n are added: some 1e-6 where they reach 10."""
    formulas, _, _, model = made(order, smoothing)
    words = np.concatenate((text(60, 13, seed=3), np.random.default_rng(4).integers(13, size=60)))
    logits = model(torch.from_numpy(words)[None])[0].detach().numpy()
    expected = np.log([[formulas.p(w, words[: i + 1]) for w in range(13)] for i in range(len(words))])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=5e-6)
    np.testing.assert_allclose(
        scores(model, words, 7), expected[np.arange(6, len(words) - 1), words[7:]], rtol=0, atol=5e-6
    )


def test_loops_that_are_not_compiled_find_the_same(monkeypatch):
    words = text(400, 9, seed=5)
    fast = list(count(words, 9, 4))
    laid = lay_out(fast, 9)
    monkeypatch.setattr(ngram_counts, "compiled", lambda loop: loop)
    slow = list(count(words, 9, 4))
    for one, other in zip(fast, slow, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    again = lay_out(slow, 9)
    for one, other in zip((*laid[0], *laid[1]), (*again[0], *again[1]), strict=True):
        assert np.array_equal(one, other)
    assert laid[2:] == again[2:]


@pytest.mark.parametrize(("order", "vocabulary"), [(2, 5), (4, 40), (5, 300)])
def test_no_two_runs_have_one_place_and_none_is_outside(order, vocabulary):
    levels = list(count(text(3000, vocabulary), vocabulary, order))
    places, bases, histories, size = lay_out(levels, vocabulary)
    everything = np.concatenate(places)
    assert len(np.unique(everything)) == len(everything)
    assert everything.min() >= 1
    assert max(found.max() for found in places[:-1]) < histories
    assert all(base.min() >= 0 and base.max() <= size - vocabulary for base in bases)
    assert make_model(levels, estimate(levels)).problem() == ""


def test_words_that_were_never_seen_have_a_probability():
    words = np.array([0, 1, 0, 0])
    levels = list(count(words, 13, 1))
    p = estimate(levels).probabilities[0]
    assert np.isfinite(np.log(p)).all()
    assert p[5] == p[12] < p[1] < p[0]


def test_discounts_are_those_that_chen_and_goodman_write_down():
    """n1..n4 = 8, 4, 2, 1: Y = 8 / 16, D1 = 1 - 4/8, D2 = 2 - 1.5 * 2/4, D3 = 3 - 2 * 1/2."""
    counts = np.repeat([1, 2, 3, 4, 9], [8, 4, 2, 1, 3])
    assert discounts(counts, MODIFIED) == ((0.5, 1.25, 2.0), True)
    assert discounts(counts, PLAIN) == ((0.5, 0.5, 0.5), True)
    assert discounts(np.array([7, 9]), MODIFIED) == ((0.5, 1.0, 1.5), False)


def test_discounts_of_one_s_own_are_taken_instead():
    """Where all lengths lose 0.5 of a count, what a history frees is half of the words behind it, over its count."""
    levels = list(count(text(500, 9), 9, 3))
    half = [Discounts((0.5, 0.5, 0.5), True)] * 3
    found = estimate(levels, taken=half)
    assert found.discounts == half
    followers, counts = (np.bincount(levels[2].parents, what) for what in (None, levels[2].counts))
    np.testing.assert_allclose(found.weights[1][counts > 0], (0.5 * followers / counts)[counts > 0])


def test_text_and_orders_that_do_not_fit_are_named():
    with pytest.raises(UsageError, match="n-grams of up to 5 words need a text of 5 to"):
        list(count(np.arange(4), 9, 5))
    with pytest.raises(UsageError, match="smoothing must be modified-kneser-ney or kneser-ney, got 'katz'"):
        estimate(list(count(np.arange(4), 9, 2)), "katz")


def test_more_places_than_a_model_may_have_are_refused(monkeypatch):
    monkeypatch.setattr(ngram_counts, "MAX_PLACES", 100)
    with pytest.raises(UsageError, match="n-grams of up to 2 words take more than 100 places"):
        lay_out(list(count(text(3000, 40), 40, 3)), 40)


def test_nltk_gives_the_same_probabilities_of_bigrams():
    """KneserNeyInterpolated does not mix single words with 1 / V, and knows no beginning: both are put back."""
    lm = pytest.importorskip("nltk.lm", reason="nltk is missing: pip install nltk")
    words = [int(word) for word in text(1500, 11, seed=8)]
    levels = list(count(np.array(words), 11, 2))
    numbers = estimate(levels, PLAIN)
    d = numbers.discounts[1].values[0]
    theirs = lm.KneserNeyInterpolated(2, discount=d)
    names = [f"w{word}" for word in words]
    theirs.fit([[(name,) for name in names] + list(itertools.pairwise(names))], [f"w{i}" for i in range(11)])
    single = np.bincount([w for _, w in set(itertools.pairwise(words))], minlength=11)
    ours = {}
    for word, parent, p in zip(levels[1].words, levels[1].parents, numbers.probabilities[1], strict=True):
        weight = numbers.weights[0][parent]
        ours[int(parent), int(word)] = p + weight * (
            single[word] / single.sum() - numbers.probabilities[0][word]
        )
    for (parent, word), p in ours.items():
        assert p == pytest.approx(theirs.score(f"w{word}", [f"w{parent}"]), rel=1e-12), (parent, word)


def test_perplexity_falls_with_the_order_where_words_depend_on_two_before():
    rng = np.random.default_rng(2)
    words = [0, 1]
    for _ in range(6000):
        words.append((words[-1] * 3 + words[-2] * 5) % 7 if rng.random() < 0.8 else int(rng.integers(7)))
    words = np.array(words)
    losses = []
    for order in (1, 2, 3):
        levels = list(count(words[:5000], 7, order))
        losses.append(-scores(make_model(levels, estimate(levels)), words, 5000).mean())
    entropy = -(0.8 + 0.2 / 7) * math.log(0.8 + 0.2 / 7) - 6 * (0.2 / 7) * math.log(0.2 / 7)
    assert losses[0] > losses[1] - 0.05
    assert losses[2] < losses[1] - 0.5
    assert entropy - 0.05 < losses[2] < entropy + 0.1
