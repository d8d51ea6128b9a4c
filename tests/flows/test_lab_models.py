"""The lab's own baselines and data are what they claim to be."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

import torch

from portlm.errors import UsageError
from portlm.flows.lab import brackets, pictures, retrieval, unseen_pairs
from portlm.flows.lab.kneser_ney import KneserNey


def reference(tokens, n, vocab):
    """Modified Kneser-Ney by its definition, with dictionaries: a function (history, word) -> probability."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    counts = {n: {gram: grams.count(gram) for gram in grams}}
    for order in range(n - 1, 0, -1):
        counts[order] = {}
        for gram in counts[order + 1]:
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


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_kneser_ney_is_its_definition_and_sums_to_one(order):
    generator = np.random.default_rng(order)
    tokens = np.minimum(generator.geometric(0.4, 300) - 1, 6)  # some words often, some hardly ever
    model, expected = KneserNey(tokens, order, 8), reference(tokens.tolist(), order, 8)
    for _ in range(10):
        history = generator.integers(0, 8, order + 1)  # with words and histories that were never seen
        found = model.next_probabilities(history)
        assert found.sum() == pytest.approx(1, abs=1e-12)
        last = tuple(history[len(history) - order + 1 :].tolist())
        assert found == pytest.approx([expected(last, word) for word in range(8)], abs=1e-12)
    text = generator.integers(0, 8, 20)
    for place, value in enumerate(model.probabilities(text)):
        assert value == pytest.approx(
            model.next_probabilities(text[: place + order - 1])[text[place + order - 1]]
        )


@pytest.mark.parametrize(("order", "vocab", "count"), [(0, 8, 10), (3, 8, 2), (8, 256, 100)])
def test_kneser_ney_refuses_what_it_cannot_count(order, vocab, count):
    with pytest.raises(UsageError, match=f"no {order}-gram model of {count} tokens"):
        KneserNey(np.zeros(count, np.int64), order, vocab)


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


# ---- pictures ----------------------------------------------------------------------------------------------------


def test_a_picture_shows_what_its_caption_says():
    """Both colours are there, and the first thing is above the second or left of it."""
    generator = np.random.default_rng(0)
    colours = {pictures.WORDS.index(name): np.array(rgb) for name, rgb in pictures.COLOURS.items()}
    for scene in pictures.scenes()[::7]:
        drawn, said = pictures.draw(scene, generator), pictures.caption(scene)
        first, second = ((drawn == colours[said[i]]).all(-1).nonzero() for i in (1, 5))
        assert min(len(first[0]), len(second[0])) > 20
        if said[1] != said[5]:
            axis = 0 if said[3] == pictures.WORDS.index("above") else 1
            assert first[axis].mean() < second[axis].mean() - 8


def test_a_shuffled_batch_has_the_same_captions_beside_the_pictures_of_others():
    known = pictures.scenes()[:40]
    (a, b), (c, d) = (
        next(pictures.batches(np.random.default_rng(0), known, shuffled))[1:] for shuffled in (False, True)
    )
    assert torch.equal(a, c)
    assert torch.equal(b.roll(1, 0), d)
