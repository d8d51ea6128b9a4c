"""The noises of BART and the fragment of MASS, each as its paper describes it."""

import numpy as np
import pytest

from portlm.data.noising import (
    NOISES,
    Noise,
    delete,
    fragment,
    infill,
    mask,
    noised,
    permute,
    rotate,
    sentence_ends,
    sentences,
)
from portlm.tokenizer import byte_tokenizer, train_bpe

MASK, STOP = 99, 9
ENDS = np.zeros(100, bool)
ENDS[STOP] = True
TEXT = np.arange(100) % 8 + 10  # without a mask or the end of a sentence
seeds = pytest.mark.parametrize("seed", range(5))


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def of(share: float = 0.3, span: float = 3.0) -> Noise:
    return Noise(MASK, ENDS, share, span)


@seeds
def test_masking_hides_exactly_its_share_and_leaves_all_else(seed):
    found = mask(TEXT, generator(seed), of(0.3))
    hidden = found == MASK
    assert (len(found), hidden.sum()) == (100, 30)
    assert (found[~hidden] == TEXT[~hidden]).all()


@seeds
def test_deletion_takes_out_exactly_its_share_and_keeps_the_order(seed):
    text = np.arange(100)
    found = delete(text, generator(seed), of(0.3))
    assert len(found) == 70
    assert (np.diff(found) > 0).all()


def unfilled(found: np.ndarray, text: np.ndarray) -> list[int]:
    """Return how many tokens each mask stands for; the text has every token once."""
    lengths, at, pending = [], 0, False
    for token in [*found.tolist(), -1]:
        if token == MASK:
            assert not pending, "two masks side by side"
            pending = True
            continue
        place = len(text) if token == -1 else int(np.flatnonzero(text == token)[0])
        if pending:
            lengths.append(place - at)
        else:
            assert place == at
        pending, at = False, place + 1
    return lengths


@seeds
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_infilling_has_one_mask_for_each_span_and_hides_exactly_its_share(seed, share):
    text = np.arange(1000, 1200)
    lengths = unfilled(infill(text, generator(seed), of(share)), text)
    assert sum(lengths) == round(200 * share)


def test_lengths_of_spans_follow_poissons_distribution():
    """Over 2000 spans each share is within 3 standard deviations, 3 sqrt(p (1 - p) / n), of Poisson(3)."""
    text, lengths = np.arange(1000, 1300), list[int]()
    for seed in range(80):
        lengths += unfilled(infill(text, generator(seed), of(0.3)), text)
    count, p = len(lengths), np.exp(-3.0)
    for length in range(7):
        found = lengths.count(length) / count
        # The last span of each text is cut to fit, which moves up to one in 30 by a little.
        assert abs(found - p) < 3 * np.sqrt(p * (1 - p) / count) + 1 / 60, length
        p *= 3.0 / (length + 1)
    assert lengths.count(0) > 0  # which insert a mask where nothing was


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.95])
def test_short_texts_are_infilled_too(tokens, share):
    text = np.arange(1000, 1000 + tokens)
    for seed in range(20):
        for span in (0.1, 3.0):
            assert sum(unfilled(infill(text, generator(seed), of(share, span)), text)) == round(
                tokens * share
            )


@seeds
def test_permutation_moves_whole_sentences(seed):
    text = np.array([10, 11, STOP, 12, STOP, 13, 14, 15, STOP, 16])
    found = permute(text, generator(seed), of())
    parts = [[10, 11, STOP], [12, STOP], [13, 14, 15, STOP], [16]]
    assert sorted(found.tolist()) == sorted(text.tolist())
    order = sorted(parts, key=lambda part: found.tolist().index(part[0]))
    assert found.tolist() == [token for part in order for token in part]


def test_every_order_of_sentences_comes_up():
    text = np.array([10, STOP, 11, STOP, 12, STOP])
    assert len({tuple(permute(text, generator(seed), of())) for seed in range(60)}) == 6


def test_rotation_begins_with_each_token_alike():
    text = np.arange(5)
    found = [rotate(text, generator(seed), of()).tolist() for seed in range(200)]
    assert {row[0] for row in found} == set(range(5))
    for row in found:
        assert row == [(row[0] + i) % 5 for i in range(5)]


def test_noises_are_combined_and_come_from_the_generator_alone():
    text = np.tile(np.array([10, 11, 12, 13, STOP, 14, 15, STOP]), 4)
    for kinds in (("infilling", "permutation"), tuple(NOISES), ("masking",), ()):
        one, other = (noised(text, kinds, generator(3), of()) for _ in range(2))
        assert one.tolist() == other.tolist()
    both = noised(text, ("infilling", "permutation"), generator(3), of())
    random = generator(3)
    assert both.tolist() == infill(permute(text, random, of()), random, of()).tolist()
    assert noised(text, (), generator(), of()).tolist() == text.tolist()


def test_sentences_end_with_a_stop_or_a_line_in_any_tokenizer():
    text = "One two. Three! Four?\nFive"
    byte = byte_tokenizer()
    parts = sentences(np.array(byte.encode(text)), sentence_ends(byte))
    assert [byte.decode(part.tolist()) for part in parts] == ["One two.", " Three!", " Four?", "\n", "Five"]
    trained = train_bpe([text * 9], 270)
    parts = sentences(np.array(trained.encode(text)), sentence_ends(trained))
    assert "".join(trained.decode(part.tolist()) for part in parts) == text
    assert trained.decode(parts[0].tolist()).endswith(".")


# ---- MASS --------------------------------------------------------------------------------------------------------


def hidden(tokens: np.ndarray, length: int, seed: int = 0, **more: float):
    return fragment(tokens, length, generator(seed), mask=MASK, start=98, vocab_size=90, **more)


@seeds
def test_a_fragment_is_said_at_its_places_and_read_one_token_late(seed):
    found = hidden(TEXT, 50, seed)
    (places,) = np.nonzero(found.targets != -100)
    begin = int(places[0])
    assert places.tolist() == list(range(begin, begin + 50))
    assert (found.targets[places] == TEXT[places]).all()
    assert (found.read[places[1:]] == TEXT[places[:-1]]).all()
    outside = np.setdiff1d(np.arange(100), places)
    assert (found.read[outside] == MASK).all()
    assert (found.source[outside] == TEXT[outside]).all()
    assert found.read[begin] == (98 if begin == 0 else MASK)


def test_of_a_fragment_80_percent_are_masks_10_random_and_10_as_they_were():
    """Of 20000 tokens the standard deviation of each share is below 0.3 %."""
    text = np.full(20000, 5)
    found = hidden(text, 20000).source
    assert abs((found == MASK).mean() - 0.8) < 0.01
    assert abs((found == 5).mean() - 0.1 - 0.1 / 90) < 0.01


def test_a_fragment_of_one_token_is_berts_task():
    """The decoder reads nothing but masks, so all it knows is what the encoder reads."""
    found = hidden(TEXT, 1, 3, masked=1.0, swapped=0.0)
    (place,) = np.flatnonzero(found.targets != -100)
    assert place > 0
    assert (found.read == MASK).all()
    assert np.flatnonzero(found.source != TEXT).tolist() == [place]


def test_a_fragment_of_all_tokens_is_a_language_models_task():
    """The encoder reads nothing but masks, and the decoder all tokens before each."""
    found = hidden(TEXT, 100, masked=1.0, swapped=0.0)
    assert (found.source == MASK).all()
    assert found.read.tolist() == [98, *TEXT[:-1].tolist()]
    assert (found.targets == TEXT).all()
