"""The lab's own baselines and data are what they claim to be."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

pytest.importorskip("numba", reason="numba is missing: pip install portlm[train]")

import torch

from portlm.flows.lab import brackets, retrieval, unseen_pairs
from portlm.flows.lab.counted import bits_of, counted


def reference(tokens, n, vocab):
    """Modified Kneser-Ney by its definition, with dictionaries: a function (history, word) -> probability."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    counts = {n: {gram: grams.count(gram) for gram in grams}}
    for order in range(n - 1, 0, -1):
        begin = tuple(tokens[:order])  # the beginning of the text is one more word before
        counts[order] = {begin: 1}
        for gram in {tuple(tokens[i : i + order + 1]) for i in range(len(tokens) - order)}:
            counts[order][gram[1:]] = counts[order].get(gram[1:], 0) + 1

    def discounts(order):
        of = [sum(c == k for c in counts[order].values()) for k in range(1, 5)]
        y = of[0] / (of[0] + 2 * of[1]) if of[0] else 0
        raw = [k - (k + 1) * y * of[k] / of[k - 1] if of[k - 1] else 0 for k in (1, 2, 3)]
        return [min(max(d, 0), k) for k, d in enumerate(raw, 1)]

    def probability(history, word):
        order = len(history) + 1
        lower = probability(history[1:], word) if history else 1 / vocab
        following = {gram[-1]: c for gram, c in counts[order].items() if gram[:-1] == history}
        if not following:
            return lower
        D, total = discounts(order), sum(following.values())
        kept = {w: c - D[min(c, 3) - 1] for w, c in following.items()}
        return kept.get(word, 0) / total + (1 - sum(kept.values()) / total) * lower

    return probability


@pytest.mark.parametrize(
    ("order", "often"), [(1, False), (2, False), (3, False), (4, False), (1, True), (3, True)]
)
def test_the_n_gram_baseline_is_its_definition_and_sums_to_one(order, often):
    """Float32 logarithms, of which n are added, and a billionth where nothing is taken."""
    generator = np.random.default_rng(order)
    tokens = np.minimum(generator.geometric(0.4, 300) - 1, 6)  # some words often, some hardly ever
    if often:
        tokens = np.tile(tokens[:30], 10)  # no run is there once, so no discount can be estimated
    model, expected = counted(tokens, order, 8), reference(tokens.tolist(), order, 8)
    text = np.concatenate((generator.integers(0, 8, 12), tokens[:8]))  # words and histories seen and unseen
    found = model(torch.from_numpy(text)[None])[0].exp().detach().numpy()
    for place in range(order, len(text)):
        last = tuple(text[place - order + 2 : place + 1].tolist())
        np.testing.assert_allclose(found[place], [expected(last, word) for word in range(8)], atol=5e-6)
    np.testing.assert_allclose(found.sum(1), 1, atol=5e-6)
    costs = bits_of(model, text)[1:]
    np.testing.assert_allclose(costs, -np.log2(found[np.arange(len(text) - 1), text[1:]]), atol=1e-4)


def test_brackets_match_and_have_the_entropy_that_is_said():
    tokens, bits = brackets.brackets(np.random.default_rng(0), 20_000)
    stack, deepest = [], 0
    for token in tokens.tolist():
        if token < brackets.KINDS:
            stack.append(token)
        elif token < 2 * brackets.KINDS:
            assert stack.pop() == token - brackets.KINDS
        deepest = max(deepest, len(stack))
    assert deepest == brackets.DEPTH
    # 1 + log2(8) / 2 + 2.25 / 2 in the long run; 20 000 tokens have a standard error of about 0.01.
    assert bits.mean() == pytest.approx(3.625, abs=0.03)
    assert set(np.round(bits, 6)) == {1.0, 2.0, 4.0, 5.0}


def test_rows_repeat_with_a_period_of_their_own():
    tokens, turns = retrieval.repeats(np.random.default_rng(0), 50)
    periods = (turns == 0).sum(1).tolist()
    assert len(set(periods)) > 10
    for row, period in zip(tokens, periods, strict=True):
        assert (row[period:] == row[:-period]).all()


def test_pairs_that_are_asked_never_met_and_follow_from_the_class():
    generator = np.random.default_rng(0)
    facts = unseen_pairs.Facts(generator)
    text = facts.text(generator, 5000).reshape(-1, 4)
    asked, _ = facts.questions()
    seen = {(a, r) for a, r, *_ in text.tolist()}
    assert not seen & {(a, r) for _, a, r in asked.tolist()}
    assert len(seen) == unseen_pairs.NAMES * (unseen_pairs.RELATIONS - 1)
    relation = text[:, 1] - unseen_pairs.NAMES
    expected = facts.leads[relation, text[:, 0] // unseen_pairs.MEMBERS]
    assert (text[:, 2] // unseen_pairs.MEMBERS == expected).all()
