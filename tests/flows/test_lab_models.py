"""The lab's own baselines and data are what they claim to be."""

from collections import Counter
from itertools import groupby

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")

pytest.importorskip("numba", reason="numba is missing: pip install portlm[train]")

import torch

from portlm.flows.lab import (
    brackets,
    cove,
    hybrid,
    objectives,
    pictures,
    pretraining,
    retrieval,
    span_qa,
    transfer,
    unseen_pairs,
)
from portlm.flows.lab.bracket_rows import Row
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


def test_both_languages_of_the_hybrid_are_told_apart_by_their_ids():
    generator = np.random.default_rng(0)
    for make, low, high in (
        (hybrid.rows_of_brackets, 0, brackets.VOCAB),
        (hybrid.rows_of_repeats, brackets.VOCAB, brackets.VOCAB + retrieval.VOCAB),
    ):
        inputs, targets = make(generator, 20)
        assert inputs.shape == targets.shape == (20, retrieval.LENGTH)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert low <= int(inputs.min()) <= int(inputs.max()) < high


def test_a_hybrid_is_a_llama_that_also_reads_a_state():
    """An LSTM with weights of 0 gives 0, and what is left is the LLaMA; with others a token changes what follows it."""
    torch.manual_seed(0)
    config = hybrid._llama(1, 16, 24)
    model, plain = hybrid.Hybrid(config), hybrid.Llama(config)
    missing = plain.load_state_dict(
        {name: value for name, value in model.state_dict().items() if not name.startswith("before.")}
    )
    assert not missing.missing_keys
    ids = torch.randint(0, config.vocab_size, (2, 9))
    before = model(ids)
    changed = ids.clone()
    changed[:, 4] += 1
    moved = (model(changed) - before).abs().amax(dim=(0, 2)) > 0
    assert moved.tolist() == [False] * 4 + [True] * 5
    assert not torch.allclose(before, plain(ids))
    with torch.no_grad():
        for p in model.before.parameters():
            p.zero_()
    assert torch.equal(model(ids), plain(ids))


def test_a_translation_says_in_reverse_what_each_word_means_under_its_topic():
    text, topics, places = cove.sentences(np.random.default_rng(0), 300)
    said = cove.translated(text, topics)
    assert cove.SOURCE <= said.min() <= said.max() < cove.START
    meanings = {}
    for row, topic, place, words in zip(
        text.tolist(), topics.tolist(), places.tolist(), said.tolist(), strict=True
    ):
        for here, (word, target) in enumerate(zip(row, reversed(words), strict=True)):
            assert (word >= cove.SOURCE - 8) == (here == place)
            meanings.setdefault((word, topic if here == place else None), set()).add(target)
    assert all(len(each) == 1 for each in meanings.values())
    assert len({next(iter(each)) for each in meanings.values()}) == len(meanings)


def test_a_text_of_a_task_has_the_label_of_the_topic_whose_map_it_follows():
    world = transfer.World(0)
    for kind, least in (("general", 0.9), ("task", 0.7)):
        texts, labels = world.texts(np.random.default_rng(1), 200, kind)
        follows = np.stack([(step[texts[:, :-1]] == texts[:, 1:].numpy()).mean(1) for step in world._next])
        assert follows.max(0).mean() > least
        assert ((follows.argmax(0) < 3) == labels.numpy().astype(bool)).mean() > 0.99


def test_the_classifier_pools_the_last_the_largest_and_the_mean_state_and_its_head_is_the_topmost_layer():
    from portlm.train.layers import layer_groups

    torch.manual_seed(0)
    model = transfer.Classifier(transfer._CONFIG).eval()
    ids = torch.randint(0, 32, (3, 20))
    y, _ = model._read(ids, None, None)
    rows = [torch.cat((row[-1], row.max(0).values, row.sum(0) / 20)) for row in y]
    torch.testing.assert_close(model.answer(ids), model.heads(torch.stack(rows)))
    below, *layers, top = layer_groups(model)
    assert {id(p) for p in top} == {id(p) for p in model.heads.parameters()}
    assert {id(p) for p in below} == {id(model.embed.weight), id(model.head_bias)}
    assert [len(group) for group in layers] == [4, 4]


def test_the_decoder_of_mass_keeps_places_and_reads_nothing_that_the_encoder_reads():
    text = Row(before=[0, 17, 1, 2], run=[10, 9, 8], after=[3, 11])
    source, read, said = objectives.mass(text)
    M, N = objectives.MASK, objectives.IGNORE
    assert source == [objectives.CLS, 0, 17, 1, 2, M, M, M, 3, 11, objectives.SEP]
    assert said == [N, N, N, N, 10, 9, 8, N, N]
    assert read == [M, M, M, M, M, 10, 9, M, M]


def test_a_label_needs_both_the_topic_and_the_first_symbol():
    world = pretraining.World(np.random.default_rng(0))
    texts, labels = (found.numpy() for found in world.texts(np.random.default_rng(1), 4000))
    # The step that most of a text's symbols take is that of its topic: another is one of 64, by chance.
    taken = (texts[:, 1:] - texts[:, :-1]) % pretraining.SYMBOLS
    follows = np.stack([(taken == step).sum(1) for step in world.steps])
    topics, even = follows.argmax(0), texts[:, 0] % 2 == 0
    assert follows.max(0).mean() / (pretraining.LENGTH - 1) == pytest.approx(0.95 + 0.05 / 64, abs=0.01)
    assert (labels == ((topics < 3) ^ even)).all()
    for known in (topics < 3, even):
        # Alone each is right half of the time, give or take three standard errors.
        assert (labels == known).mean() == pytest.approx(0.5, abs=0.025)


def test_a_question_is_answered_by_the_one_fact_with_its_relation():
    asked = span_qa.questions(np.random.default_rng(0), 50)
    for ids, mask, (first, last) in zip(
        asked.ids.numpy(), asked.mask.numpy(), asked.ends.tolist(), strict=True
    ):
        row = ids[mask == 1].tolist()
        assert (row[0], row[3], row[-1]) == (span_qa._CLS, span_qa._SEP, span_qa._SEP)
        text = row[4:-1]
        facts = [list(part) for dot, part in groupby(text, lambda token: token == span_qa._DOT) if not dot]
        relations = [relation - span_qa._RELATION for _, relation, *_ in facts]
        assert sorted(relations) == list(range(12))
        for relation, (_, _, *values) in zip(relations, facts, strict=True):
            assert 1 <= len(values) <= 3
            assert {(value - span_qa._VALUE) // span_qa._VALUES for value in values} == {relation}
        (fact,) = [fact for fact in facts if fact[:2] == row[1:3]]
        assert row[first : last + 1] == fact[2:]
        assert row[last + 1] == span_qa._DOT


def test_a_text_without_questions_says_each_of_its_facts_three_times():
    for row in span_qa.texts(np.random.default_rng(0), 50).tolist():
        assert row[0] == span_qa._CLS
        text = row[1 : row.index(span_qa._SEP)]
        said = Counter(
            tuple(part) for dot, part in groupby(text, lambda token: token == span_qa._DOT) if not dot
        )
        assert [*said.values()] == [3] * 4
        assert {relation for _, relation, *_ in said} < set(range(span_qa._RELATION, span_qa._VALUE))


def test_no_question_is_longer_than_the_context():
    assert span_qa._LENGTH == 5 + 12 * (2 + 3 + 1)  # [CLS] question [SEP] facts [SEP]


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
