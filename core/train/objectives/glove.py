"""Fit vectors to how often words stand near each other: weighted least squares on the logarithms of counts.

Pennington, Socher and Manning, "GloVe: Global Vectors for Word Representation", 2014:

    J = sum over pairs of f(X) (w . w~ + b + b~ - log X)^2,  f(X) = min(1, (X / x_max)^power)

where X counts a pair on either side of each other, 1 / d for each time at a distance of d words. What is saved is
w + w~. The text is counted once; a step is a batch of pairs, each pair once in every pass over all of them. The paper's
optimiser is AdaGrad at 0.05 (optimizer.name = adagrad). Its code draws the biases, too; here they begin as 0.

E pairs of a batch, M width, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from portlm.data.batches import Tokens
from portlm.errors import UsageError
from portlm.ops.embedding import embedding
from portlm.train.config import PretrainConfig
from portlm.train.corpus import Corpus
from portlm.train.objectives import Stop
from portlm.train.objectives.vectors import VectorObjective

_AT_ONCE = 1 << 20  # tokens that are counted, or pairs that are judged, together

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Cells(NamedTuple):
    """Pairs of words that stand near each other, in the order of their ids; (a, b) and (b, a) are two.

    Attributes:
        words: (N,) int64, the first of each pair.
        contexts: (N,) int64, the second.
        counts: (N,) float64, how often, by distance; above 0.
    """

    words: Ids
    contexts: Ids
    counts: Floats


class Part(NamedTuple):
    """Some pairs of a step's batch: ids (E,) int64, counts (E,) float32, and their share in the batch."""

    words: Tensor
    contexts: Tensor
    counts: Tensor
    share: float


class Tables(nn.Module):
    """Two vectors and two biases of each word: as the one that is looked from, and as the one that is seen."""

    def __init__(self, words: nn.Parameter):
        super().__init__()
        V, M = words.shape
        self.words, self.contexts = words, nn.Parameter(torch.empty_like(words).uniform_(-0.5 / M, 0.5 / M))
        self.word_bias, self.context_bias = (nn.Parameter(words.new_zeros(V)) for _ in range(2))


def squared_errors(tables: Tables, part: Part, x_max: float, power: float) -> Tensor:
    """Return f(X) (w . w~ + b + b~ - log X)^2 of each pair, (E,)."""
    w, seen = embedding(part.words, tables.words), embedding(part.contexts, tables.contexts)
    biases = (
        embedding(part.words, tables.word_bias[:, None])
        + embedding(part.contexts, tables.context_bias[:, None])
    ).squeeze(1)
    weight = (part.counts / x_max).pow(power).clamp(max=1.0)
    return weight * ((w * seen).sum(1) + biases - part.counts.log()).square()


def cooccurrences(tokens: Tokens, counted: npt.NDArray[np.bool_], window: int) -> Cells:
    """Count which words stand near each other.

    Args:
        tokens: A text.
        counted: (V,), which ids are words; others are taken out of the text before.
        window: Words on either side.
    """
    V = len(counted)
    codes, sums = np.empty(0, np.int64), np.empty(0, np.float64)
    before = np.empty(0, np.int64)  # the last words of the part before
    for begin in range(0, len(tokens), _AT_ONCE):
        new = tokens[begin : begin + _AT_ONCE].astype(np.int64)
        text = np.concatenate((before, new[counted[new]]))
        found, shares = [codes], [sums]
        for distance in range(1, min(window, len(text) - 1) + 1):
            first = max(len(before) - distance, 0)  # pairs whose second word is new
            left, right = text[first:-distance], text[first + distance :]
            found.append(left * V + right)
            shares.append(np.full(len(left), 1 / distance))
        codes, sums = _summed(np.concatenate(found), np.concatenate(shares))
        before = text[max(len(text) - window, 0) :]
    mirrored = codes % V * V + codes // V
    codes, sums = _summed(np.concatenate((codes, mirrored)), np.concatenate((sums, sums)))
    return Cells(codes // V, codes % V, sums)


def _summed(codes: Ids, values: Floats) -> tuple[Ids, Floats]:
    """Each code once, and the sum of its values."""
    once, place = np.unique(codes, return_inverse=True)
    sums: Floats = np.bincount(place, values, len(once)).astype(np.float64)
    return once, sums


class GloveObjective(VectorObjective):
    """The weighted squared error, a mean over pairs; judged on the pairs of the held-out text.

    Their counts are scaled as though that text were as long as the one that is learned from.
    """

    kind = "glove"
    model: Tables

    def __init__(self, config: PretrainConfig, corpus: Corpus, device: torch.device):
        super().__init__(config, corpus, device)
        counted, window = self.counts > 0, config.glove.window
        self.cells = cooccurrences(corpus.train, counted, window)
        judged = cooccurrences(corpus.held_out(config.evaluation.max_tokens).tokens, counted, window)
        if not len(judged.counts):
            raise UsageError(
                "in the held-out text no word of the vocabulary stands near another: give more text or a larger "
                "vocabulary"
            )
        scale = self.cells.counts.sum() / judged.counts.sum()
        self.judged = judged._replace(counts=judged.counts * scale)
        self._order: tuple[int, Ids] = (-1, np.empty(0, np.int64))  # of a pass, and which one

    def tables(self, words: nn.Parameter) -> Tables:
        """Return both tables and their biases."""
        return Tables(words)

    def vectors(self) -> Tensor:
        """Return the sum of both vectors of each word."""
        return (self.model.words + self.model.contexts).detach()

    def facts(self) -> dict[str, int]:
        """Return the sizes of vocabulary and text, and how many pairs are learned from."""
        return super().facts() | {"pairs": len(self.cells.counts)}

    def batches(self) -> Sequence[Part]:
        """Return as many pairs as the settings have tokens for a step, in equal parts."""
        size, n = self.tokens_per_step, len(self.cells.counts)
        places = np.arange(self.sampler.step * size, (self.sampler.step + 1) * size)
        self.sampler.step += 1
        chosen = np.empty(size, np.int64)
        for number in range(int(places[0]) // n, int(places[-1]) // n + 1):
            here = places // n == number
            chosen[here] = self._pass(number)[places[here] % n]
        return [self._part(self.cells, some, len(some) / size) for some in np.array_split(chosen, self.parts)]

    def loss(self, batch: Part) -> Tensor:
        """Return the mean over the pairs of a part, weighted by how many of the batch they are."""
        own = self.config.glove
        return squared_errors(self.model, batch, own.x_max, own.power).mean() * batch.share

    @torch.no_grad()
    def evaluate(self, stop: Stop) -> dict[str, float] | None:
        """Return ``loss``, the mean over the pairs of the held-out text."""
        own, total, n = self.config.glove, 0.0, len(self.judged.counts)
        for begin in range(0, n, _AT_ONCE):
            if stop():
                return None
            part = self._part(self.judged, np.arange(begin, min(begin + _AT_ONCE, n)), 1.0)
            total += float(squared_errors(self.model, part, own.x_max, own.power).double().sum())
        return {"loss": total / n}

    def _pass(self, number: int) -> Ids:
        """The order of all pairs in a pass, as a function of the seed and its number alone."""
        if self._order[0] != number:
            bits = np.random.Philox(key=np.array([self.config.seed, number], np.uint64), counter=[0, 0, 0, 3])
            self._order = number, np.argsort(bits.random_raw(len(self.cells.counts)), kind="stable")
        return self._order[1]

    def _part(self, cells: Cells, places: Ids, share: float) -> Part:
        counts = torch.from_numpy(cells.counts[places].astype(np.float32))
        words, contexts = (torch.from_numpy(ids[places]).to(self.device) for ids in cells[:2])
        return Part(words, contexts, counts.to(self.device), share)
