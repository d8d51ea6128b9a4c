"""The n-gram model that networks are measured against: that of ``portlm ngram``, of a text in memory.

Experiments use few tokens, all of them often, of which a length may have no runs that are there once or twice. Then the
discounts of that length cannot be estimated; here each that can is, and of the others next to nothing is taken.
"""

from __future__ import annotations

import math

import numpy as np

from portlm.models.ngram import NGram
from portlm.train.kneser_ney import Discounts, estimate, formula, make_model
from portlm.train.ngram import scores
from portlm.train.ngram_counts import count

_LEAST = 1e-9  # so that whatever was never seen is improbable, and not impossible


def counted(tokens: np.ndarray, order: int, vocab: int) -> NGram:
    """Return the modified Kneser-Ney model of a text.

    Args:
        tokens: (N,) ids below V.
        order: n, at least 1.
        vocab: V, the number of ids.

    Raises:
        UsageError: The text is shorter than n.
    """
    levels = list(count(tokens, vocab, order))
    return make_model(levels, estimate(levels, taken=[_discounts(level.counts) for level in levels]))


def bits_of(model: NGram, tokens: np.ndarray) -> np.ndarray:
    """Return what each token of a text costs behind all before it, (N,) float64."""
    return -scores(model, tokens) / math.log(2)


def _discounts(counts: np.ndarray) -> Discounts:
    _, found = formula(counts)
    d1, d2, d3 = (min(max(d, _LEAST), float(r)) for r, d in enumerate(found, 1))
    return Discounts((d1, d2, d3), True)
