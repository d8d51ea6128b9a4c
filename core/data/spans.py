"""Span corruption: pieces of a text are taken out, and what is learned is to say them.

T5, arXiv:1910.10683, section 3.1.4. Numbers and order of all steps are those of the code released with it:
`random_spans_helper`, `random_spans_noise_mask` and the two functions that put sentinels in. In that code a text begins
with what stays and ends with a hole, always, and a short text has only one division: `shifted` turns the mask by a
random number of places, so that any token may be taken out.

n tokens of a text, of which m are noise in s spans.
"""

from typing import NamedTuple

import numpy as np

DENSITY, MEAN_LENGTH = 0.15, 3.0  # share of tokens that are taken out, and tokens of a span on average


class Lengths(NamedTuple):
    """Tokens of a text, so that the corrupted one has as many as are wanted, and tokens of its target."""

    tokens: int
    targets: int


def random_spans_helper(
    inputs: int,
    density: float = DENSITY,
    mean: float = MEAN_LENGTH,
    extra_inputs: int = 1,
    extra_targets: int = 1,
) -> Lengths:
    """Return how long a text may be, so that it and its target are as long as wanted without padding.

    Args:
        inputs: tokens of the corrupted text, a sentinel for each span and the end of text included.
        density: share of the text that is noise.
        mean: tokens of a span of noise.
        extra_inputs: sentinels for each span in the corrupted text.
        extra_targets: sentinels for each span in the target.
    """

    def lengths(tokens: int) -> tuple[int, int]:
        noise = round(tokens * density)
        spans = round(noise / mean)
        return tokens - noise + spans * extra_inputs + 1, noise + spans * extra_targets + 1

    tokens = inputs
    while lengths(tokens + 1)[0] <= inputs:
        tokens += 1
    targets = lengths(tokens)[1]
    if density == 0.5 and targets > lengths(tokens)[0]:  # both are then as long as each other
        tokens, targets = tokens - 1, targets - 1
    return Lengths(tokens, targets)


def noise_mask(
    tokens: int,
    random: np.random.Generator,
    density: float = DENSITY,
    mean: float = MEAN_LENGTH,
    *,
    shifted: bool = False,
) -> np.ndarray:
    """Return which tokens of a text are noise, (n,) bool.

    Noise and what is not noise are each cut into as many pieces at random, which take turns, one that stays first.

    Args:
        tokens: n; 2 at least.
        random: what is random.
        density: share of the text that is noise; one token at least is, and one is not.
        mean: tokens of a span of noise.
        shifted: turn the mask by a random number of places.
    """
    noise = min(max(round(tokens * density), 1), tokens - 1)
    spans = max(round(noise / mean), 1)
    pieces = [_cut(part, spans, random) for part in (noise, tokens - noise)]
    lengths = np.stack((pieces[1], pieces[0]), axis=1).ravel()  # what stays, noise, what stays, ...
    mask = np.repeat(np.arange(2 * spans) % 2 == 1, lengths)
    return np.roll(mask, int(random.integers(tokens))) if shifted else mask


def _cut(items: int, pieces: int, random: np.random.Generator) -> np.ndarray:
    """Cut a number into so many positive ones, all ways with equal probability."""
    begins = np.arange(items - 1) < pieces - 1
    random.shuffle(begins)
    found: np.ndarray = np.bincount(np.concatenate(([0], np.cumsum(begins))), minlength=pieces)
    return found


def corrupted(
    tokens: np.ndarray, noise: np.ndarray, first_sentinel: int, end: int, *, last: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Return a text with a sentinel in the place of each span of noise, and what is to be said of it.

    Sentinels count down from the first. The target is a sentinel and its span, one after the other, and as in the paper
    one more sentinel; both end with the end of text.

    Args:
        tokens: (n,) of the text.
        noise: (n,) bool.
        first_sentinel: <extra_id_0>.
        end: of a text.
        last: put the one more sentinel at the end of the target; the released code does not, and counts without it.
    """
    begins = noise & ~np.concatenate(([False], noise[:-1]))  # of each span
    sentinels = first_sentinel + 1 - np.cumsum(begins)
    text = np.where(begins, sentinels, tokens)[begins | ~noise]
    spans = np.split(tokens, np.flatnonzero(begins))[1:]  # from the beginning of one to that of the next
    lengths = np.bincount(np.cumsum(begins)[noise] - 1)
    target = [part for i, span in enumerate(spans) for part in ([first_sentinel - i], span[: lengths[i]])]
    closing = [first_sentinel - len(spans), end] if last else [end]
    return np.append(text, end), np.concatenate([*target, closing])
