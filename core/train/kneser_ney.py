"""Kneser-Ney smoothing: from counts of runs of words to the tables of an n-gram model.

    p(w | h) = max(c(h w) - D, 0) / c(h) + γ(h) p(w | h'),    γ(h) = Σ_w D / c(h)

c counts how often the longest runs stand in the text, and of shorter ones behind how many different words: a word that
follows one other alone says little of others (Kneser and Ney, "Improved Backing-Off for M-gram Language Modeling",
1995).
A single word is mixed with 1 / V. D is of each length, with n_r the number of runs whose count is r:

- Kneser-Ney: D = n_1 / (n_1 + 2 n_2) for every count
- modified Kneser-Ney (Chen and Goodman 1998): with Y that number, D_1 = 1 - 2 Y n_2 / n_1 for runs of count 1,
  D_2 = 2 - 3 Y n_3 / n_2 for those of 2, and D_3 = 3 - 4 Y n_4 / n_3 for the rest

Where a text has no such counts, as of single letters, the numbers are those that KenLM takes then, and it is said.

Everything is float64 until it is written to the tables.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from portlm.errors import UsageError
from portlm.models.ngram import NGram, NGramConfig
from portlm.train.ngram_counts import Level, lay_out

MODIFIED, PLAIN = "modified-kneser-ney", "kneser-ney"
SMOOTHINGS = (MODIFIED, PLAIN)
_WITHOUT = {MODIFIED: (0.5, 1.0, 1.5), PLAIN: (0.75, 0.75, 0.75)}


class Discounts(NamedTuple):
    """What is taken from the counts of one length.

    Attributes:
        values: Of the counts 1, 2, and 3 and more.
        estimated: Whether they are those of the text.
    """

    values: tuple[float, float, float]
    estimated: bool

    def of(self, counts: np.ndarray) -> np.ndarray:
        """Return what is taken from each count, 0 from 0."""
        taken: np.ndarray = np.array([0.0, *self.values])[np.minimum(counts, 3)]
        return taken


class Estimate(NamedTuple):
    """The numbers of a model, by the runs of each length.

    Attributes:
        probabilities: p of the last word of each run behind the others, float64.
        weights: γ of each run as a history, float64, of every length but the longest.
        discounts: Of each length.
    """

    probabilities: list[np.ndarray]
    weights: list[np.ndarray]
    discounts: list[Discounts]


def discounts(counts: np.ndarray, smoothing: str) -> Discounts:
    """Return the discounts of one length.

    Args:
        counts: Of all its runs.
        smoothing: One of SMOOTHINGS.
    """
    y, found = formula(counts)
    if smoothing == PLAIN:
        found = (y, y, y) if 0 < y < 1 else (0.0, 0.0, 0.0)
    if all(0 < d <= r for r, d in enumerate(found, 1)):
        return Discounts(found, True)
    return Discounts(_WITHOUT[smoothing], False)


def formula(counts: np.ndarray) -> tuple[float, tuple[float, float, float]]:
    """Return Y and D_1, D_2, D_3 of one length as they are written down, 0 for a count that no run has.

    Of a text that is too even or too short they may be negative.

    Args:
        counts: Of all its runs.
    """
    n = [np.count_nonzero(counts == r) for r in (1, 2, 3, 4)]
    y = n[0] / (n[0] + 2 * n[1]) if n[0] else 0.0
    d1, d2, d3 = (r - (r + 1) * y * n[r] / n[r - 1] if n[r - 1] else 0.0 for r in (1, 2, 3))
    return y, (d1, d2, d3)


def estimate(
    levels: Sequence[Level], smoothing: str = MODIFIED, *, taken: Sequence[Discounts] | None = None
) -> Estimate:
    """Return the probabilities of all runs, and the weights of the shorter ones as histories.

    Args:
        levels: Runs of 1, 2, ..., n words.
        smoothing: One of SMOOTHINGS.
        taken: The discounts of each length, for whoever has others than the smoothing's; all above 0.

    Raises:
        UsageError: There is no such smoothing.
    """
    if smoothing not in SMOOTHINGS:
        raise UsageError(f"smoothing must be {' or '.join(SMOOTHINGS)}, got {smoothing!r}")
    counts = levels[0].counts
    if taken is None:
        taken = [discounts(level.counts, smoothing) for level in levels]
    less = taken[0].of(counts)
    total = counts.sum()
    probabilities = [(counts - less) / total + less.sum() / total / len(counts)]
    weights: list[np.ndarray] = []
    for level, shorter, taking in zip(levels[1:], levels, taken[1:], strict=False):
        R, less = len(shorter.words), taking.of(level.counts)
        total = np.bincount(level.parents, level.counts, R)
        followed = total > 0  # the end of the text alone need not be
        weights.append(np.ones(R))
        np.divide(np.bincount(level.parents, less, R), total, out=weights[-1], where=followed)
        own = (level.counts - less) / total[level.parents]
        probabilities.append(own + weights[-1][level.parents] * probabilities[-1][level.suffixes])
    return Estimate(probabilities, weights, list(taken))


def make_model(
    levels: list[Level],
    found: Estimate,
    *,
    context_length: int = 32768,
    eos_token_ids: tuple[int, ...] = (),
) -> NGram:
    """Return the model of an estimate.

    Args:
        levels: Runs of 1, 2, ..., n words.
        found: Their probabilities and weights.
        context_length: Of the model.
        eos_token_ids: Of the model.

    Raises:
        UsageError: The tables would be larger than a model's may be.
    """
    V = len(levels[0].words)
    places, bases, M, N = lay_out(levels, V)
    config = NGramConfig(V, context_length, len(levels), M, N, eos_token_ids=eos_token_ids)
    base, parents = np.zeros(M, np.int32), np.full(N, -1, np.int32)
    log_probs, back_offs = np.zeros(N, np.float32), np.zeros(M, np.float32)
    for n, (level, where) in enumerate(zip(levels, places, strict=True)):
        log_probs[where] = np.log(found.probabilities[n])
        if n:
            parents[where] = places[n - 1][level.parents]
        if n < len(bases):
            base[where], back_offs[where] = bases[n], np.log(found.weights[n])
    model = NGram(config, init=False)
    with torch.no_grad():
        for tensor, array in (
            (model.base, base),
            (model.parents, parents),
            (model.log_probs, log_probs),
            (model.back_offs, back_offs),
        ):
            tensor.copy_(torch.from_numpy(array))
    return model.eval()
