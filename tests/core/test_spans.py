"""Span corruption does what the code released with T5 does, number by number."""

import numpy as np
import pytest

from portlm.data.spans import corrupted, noise_mask, random_spans_helper


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((512,), (568, 114)), ((128,), (141, 29)), ((64,), (70, 14)), ((512, 0.5), (766, 512))],
    ids=str,
)
def test_lengths_are_those_of_the_released_code(arguments, expected):
    assert tuple(random_spans_helper(*arguments)) == expected


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("tokens", "noise", "spans"), [(568, 85, 28), (100, 15, 5), (20, 3, 1), (2, 1, 1)])
def test_a_mask_has_as_many_tokens_and_spans_as_it_should(tokens, noise, spans, shifted):
    random = np.random.default_rng(0)
    for _ in range(20):
        mask = noise_mask(tokens, random, shifted=shifted)
        assert mask.sum() == noise
        begins = int((mask & ~np.roll(mask, 1)).sum())  # on a ring, where a turned mask has its spans whole
        assert begins == spans


def test_a_mask_begins_with_what_stays_and_ends_with_noise_unless_it_is_turned():
    """Known of the released code: the first token is never taken out, the last always; short texts have one mask."""
    random = np.random.default_rng(0)
    masks = np.array([noise_mask(100, random) for _ in range(200)])
    assert not masks[:, 0].any()
    assert masks[:, -1].all()
    assert len({noise_mask(25, random).tobytes() for _ in range(50)}) == 1
    turned = np.array([noise_mask(25, random, shifted=True) for _ in range(2000)])
    share = turned.mean(0)
    assert share.min() > 0.1  # 4 of 25 tokens: 0.16, and of 2000 masks less than 0.01 off
    assert share.max() < 0.22


def test_every_way_to_cut_is_equally_likely():
    """3 tokens of noise out of 20 with a mean of 1 are 3 spans; what stays is cut into 3 pieces at 2 of 16 places."""
    random = np.random.default_rng(0)
    seen: dict[bytes, int] = {}
    for _ in range(12000):
        mask = noise_mask(20, random, mean=1.0)
        seen[mask.tobytes()] = seen.get(mask.tobytes(), 0) + 1
    assert len(seen) == 16 * 15 // 2
    # 100 of each are expected, with a standard deviation of 10; the farthest of 120 is below 4.5 of them off
    assert max(abs(count - 100) for count in seen.values()) < 45


def test_a_text_and_its_target_hold_every_token_once():
    tokens = np.arange(10, 30)
    mask = np.zeros(20, bool)
    mask[[3, 4, 9, 17, 18, 19]] = True
    text, target = corrupted(tokens, mask, 99, 1)
    assert text.tolist() == [10, 11, 12, 99, 15, 16, 17, 18, 98, *range(20, 27), 97, 1]
    assert target.tolist() == [99, 13, 14, 98, 19, 97, 27, 28, 29, 96, 1]
    random = np.random.default_rng(0)
    for _ in range(50):
        length = int(random.integers(2, 200))
        tokens = random.integers(10, 60, length)
        text, target = corrupted(tokens, noise_mask(length, random, shifted=True), 99, 1)
        spans, number = {}, None
        for token in target[:-1].tolist():
            if token > 60:
                number, spans[token] = token, []
            else:
                spans[number].append(token)
        again = [t for token in text[:-1].tolist() for t in spans.get(token, [token])]
        assert again == tokens.tolist()


def test_texts_of_the_length_of_the_helper_fill_the_context():
    for wanted in (64, 128, 512):
        tokens, targets = random_spans_helper(wanted)
        given = np.arange(tokens), noise_mask(tokens, np.random.default_rng(0)), 5000, 4999
        text, target = corrupted(*given, last=False)
        assert (len(text), len(target)) == (wanted, targets)
        longer = corrupted(*given)[1]
        assert (len(longer), longer[:-2].tolist()) == (targets + 1, target[:-1].tolist())
