"""Modified Kneser-Ney smoothing on arrays: the n-gram model that neural ones were measured against.

Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling", 1998. Interpolated, with three
discounts for each order; lower orders count what a word follows and not how often; the lowest is mixed with 1/V.

An n-gram is one whole number, its tokens the digits in base V, so that counting is sorting and a lookup is a search.
"""

from __future__ import annotations

import numpy as np

from portlm.errors import UsageError


class _Order:
    """Counts of one order, ready for the interpolation.

    Args:
        grams: (G,) different n-grams in ascending order.
        counts: (G,) how often each is counted.
        vocab: V.
    """

    def __init__(self, grams: np.ndarray, counts: np.ndarray, vocab: int):
        self.grams, self.vocab = grams, vocab
        n = [int((counts == k).sum()) for k in range(1, 5)]
        y = n[0] / (n[0] + 2 * n[1]) if n[0] else 0.0
        # A count that nothing has gives no discount; the estimate would divide by zero.
        discounts = [k + 1 - (k + 2) * y * n[k + 1] / n[k] if n[k] else 0.0 for k in range(3)]
        kind = np.minimum(counts, 3) - 1
        self.kept = counts - np.clip(discounts, 0.0, (1.0, 2.0, 3.0))[kind]
        self.histories, place = np.unique(grams // vocab, return_inverse=True)
        self.totals = np.bincount(place, counts)
        self.freed = self.totals - np.bincount(place, self.kept)

    def probabilities(self, grams: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """Return the probability (N,) of the last token of each n-gram, given that of the next lower order."""
        at, seen = _find(self.histories, grams // self.vocab)
        place, counted = _find(self.grams, grams)
        kept = np.where(counted, self.kept[place], 0.0)
        return np.where(seen, (kept + self.freed[at] * lower) / self.totals[at], lower)


def _find(ordered: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each number is in an ascending array, and whether it is there at all."""
    place = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    return place, ordered[place] == wanted


class KneserNey:
    """An n-gram model of a text.

    Args:
        tokens: (N,) ids below V.
        order: n, at least 1.
        vocab: V, the number of ids.

    Raises:
        UsageError: The text is shorter than n, or V^n has no room in 63 bits.
    """

    def __init__(self, tokens: np.ndarray, order: int, vocab: int):
        if order < 1 or len(tokens) < order or vocab**order >= 2**63:
            raise UsageError(f"no {order}-gram model of {len(tokens)} tokens and {vocab} ids can be counted")
        self.order, self.vocab = order, vocab
        grams, counts = np.unique(self._grams(tokens, order), return_counts=True)
        self._orders = [_Order(grams, counts, vocab)]
        for n in range(order - 1, 0, -1):
            grams, counts = np.unique(grams % vocab**n, return_counts=True)
            self._orders.insert(0, _Order(grams, counts, vocab))

    def _grams(self, tokens: np.ndarray, n: int) -> np.ndarray:
        """Every n-gram of a text (N,), as a number, (N - n + 1,)."""
        count = len(tokens) - n + 1
        grams = np.zeros(count, dtype=np.int64)
        for k in range(n):
            grams = grams * self.vocab + tokens[k : k + count]
        return grams

    def probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """Return the probability of each token of a text (N,) behind the first n - 1, (N - n + 1,)."""
        found = np.full(len(tokens) - self.order + 1, 1.0 / self.vocab)
        whole = self._grams(tokens, self.order)
        for n, counts in enumerate(self._orders, start=1):
            found = counts.probabilities(whole % self.vocab**n, found)
        return found

    def next_probabilities(self, history: np.ndarray) -> np.ndarray:
        """Return the distribution (V,) behind the last n - 1 tokens of a history, which must have so many."""
        last = history[len(history) - self.order + 1 :]
        return np.array([self.probabilities(np.append(last, token))[0] for token in range(self.vocab)])
