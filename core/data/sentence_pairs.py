"""Two texts of which one follows the other, or does not: what BERT's next-sentence prediction is asked about.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2018
(arXiv:1810.04805), section 3.1: half of the time the second text is the one that follows the first in the corpus, half
of the time one from a random place.

B rows, n tokens of both texts together.
"""

from typing import NamedTuple

import numpy as np


class SentencePair(NamedTuple):
    """Two texts of n tokens together.

    Attributes:
        first: (a,) int64.
        second: (n - a,) int64.
        random: Whether the second comes from elsewhere; as a label, 1 for that and 0 for the text that follows.
    """

    first: np.ndarray
    second: np.ndarray
    random: bool


def sentence_cut(window: np.ndarray, ends: np.ndarray, random: np.random.Generator) -> int:
    """Return how many tokens of a window (n,) the first of two texts has: up to one of its sentences, or half."""
    cuts = np.flatnonzero(ends[window[:-1]]) + 1
    return int(random.choice(cuts)) if len(cuts) else len(window) // 2


def sentence_pair(
    window: np.ndarray, elsewhere: np.ndarray, ends: np.ndarray, random: np.random.Generator
) -> SentencePair:
    """Cut a window of a text in two behind a sentence, and replace the second part with probability 1/2.

    What replaces the second part begins with a sentence of the
    other window where enough is left behind that.

    Args:
        window: (n,) int64, n at least 2.
        elsewhere: (n,) int64, from a random place of the same corpus.
        ends: (V,) bool, which tokens end a sentence.
        random: what is random.
    """
    cut = sentence_cut(window, ends, random)
    if random.random() < 0.5:
        return SentencePair(window[:cut], window[cut:], random=False)
    wanted = len(window) - cut
    begins = np.flatnonzero(ends[elsewhere]) + 1
    begins = begins[begins <= len(elsewhere) - wanted]
    begin = int(random.choice(begins)) if len(begins) else 0
    return SentencePair(window[:cut], elsewhere[begin : begin + wanted], random=True)
