"""Tell the words around a word from words drawn at random: word2vec with negative sampling.

Mikolov et al., "Distributed Representations of Words and Phrases and their Compositionality", 2013 (arXiv:1310.4546),
with what word2vec.c adds to the paper:

- each word draws how many words on either side count, from 1 to the window, so near ones count more
- a word of a share f of the text stays with probability min(1, sqrt(t / f) + t / f), before windows are looked at
- negatives are drawn by count^0.75; one that is the right word does not count
- the vectors that are guessed begin as 0

Skip-gram guesses each word of the context from the word, CBOW the word from the mean of the vectors of its context.
word2vec.c takes a step of plain gradient descent for every word. Here a step is a batch of windows and the loss a mean
over what is guessed, so an optimiser with steps of its own for each weight stands for that: adamw or adagrad.

E examples: E words are guessed. K negatives, L words at most to guess from, M width, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from portlm.data.batches import IGNORE, evaluation_batches
from portlm.errors import UsageError
from portlm.ops.embedding import embedding
from portlm.train.config import PretrainConfig
from portlm.train.corpus import Corpus
from portlm.train.objectives import Stop
from portlm.train.objectives.vectors import VectorObjective

POWER = 0.75  # of the counts that negatives are drawn by
_LAST_STEP = 2**64 - 1  # the step whose random numbers the held-out text is judged with

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Examples(NamedTuple):
    """What is guessed from what.

    Attributes:
        inputs: (E, L) int64, the words to guess from.
        weights: (E, L) float32, the share of each in their mean; 0 where there are fewer.
        outputs: (E, 1 + K) int64, the right word and then negatives.
        counts: (E, 1 + K) float32, 0 for a negative that is the right word.
    """

    inputs: Tensor
    weights: Tensor
    outputs: Tensor
    counts: Tensor


class Part(NamedTuple):
    """Some examples of a step's batch, and their share in it."""

    examples: Examples
    share: float


class Tables(nn.Module):
    """The two vectors of each word: one to guess from, which is kept, and one to be guessed."""

    def __init__(self, words: nn.Parameter):
        super().__init__()
        self.words, self.contexts = words, nn.Parameter(torch.zeros_like(words))


def negative_sampling(words: Tensor, contexts: Tensor, examples: Examples) -> Tensor:
    """Return -log sigmoid(u_right . h) - sum of log sigmoid(-u_negative . h) for each example, (E,).

    Args:
        words: (V, M), of which h is the mean over the inputs.
        contexts: (V, M), of which u is the row of an output.
        examples: What is guessed from what.
    """
    h = (embedding(examples.inputs, words) * examples.weights[..., None]).sum(1)  # (E, M)
    scores = (embedding(examples.outputs, contexts) * h[:, None]).sum(-1)  # (E, 1 + K)
    signs = torch.ones_like(scores)
    signs[:, 0] = -1
    return (F.softplus(signs * scores) * examples.counts).sum(1)


class Drawing:
    """Draws examples from windows of a text, as a function of the seed and the step alone.

    Args:
        counts: (V,), how often each word stands in the training text; tokens with 0 are no words.
        window: Words on either side, at most.
        negatives: K.
        subsample: t, above which share of the text words are left out; 0 leaves none out.
        cbow: Whether words are guessed from contexts.
        seed: 0 <= seed < 2^64.
    """

    def __init__(
        self, counts: Floats, *, window: int, negatives: int, subsample: float, cbow: bool, seed: int
    ):
        self.window, self.negatives, self.cbow, self.seed = window, negatives, cbow, seed
        self.keep = keep_probability(counts, subsample)
        shares = np.cumsum(counts**POWER)
        self.shares: Floats = shares / shares[-1]

    def examples(self, ids: Ids, step: int) -> Examples:
        """Return the examples of windows.

        Args:
            ids: (B, T) int64, each row a piece of text; -100 is no token.
            step: 0 <= step < 2^64.

        Returns:
            Examples; E may be 0.
        """
        # The batch's places come from the same key with the counter at 0 (portlm.data.batches): this is another stream.
        self._bits = np.random.Philox(key=np.array([self.seed, step], np.uint64), counter=[0, 0, 0, 2])
        tokens, rows = ids.ravel(), np.repeat(np.arange(len(ids)), ids.shape[1])
        kept = (tokens != IGNORE) & (self._uniform(tokens.size) < self.keep[tokens.clip(0)])
        tokens, rows = tokens[kept], rows[kept]
        reach = 1 + (self._uniform(len(tokens)) * self.window).astype(np.int64)  # 1 to the window
        distances = np.concatenate((np.arange(-self.window, 0), np.arange(1, self.window + 1)))
        places = np.arange(len(tokens))[:, None] + distances  # (N, 2 window)
        inside = (places >= 0) & (places < len(tokens)) & (abs(distances) <= reach[:, None])
        places = places.clip(0, max(len(tokens) - 1, 0))
        near = inside & (rows[places] == rows[:, None])
        if self.cbow:
            some = near.any(1)
            inputs, near, right = tokens[places[some]], near[some], tokens[some]
            weights = near / near.sum(1, keepdims=True)
        else:
            centre = np.nonzero(near)[0]
            inputs, right = tokens[centre][:, None], tokens[places[near]]
            weights = np.ones(inputs.shape)
        drawn = self._uniform(len(right) * self.negatives).reshape(len(right), self.negatives)
        wrong = np.searchsorted(self.shares, drawn, side="right")  # (E, K)
        counts = np.ones((len(right), 1 + self.negatives), np.float32)
        counts[:, 1:] = wrong != right[:, None]
        return Examples(
            torch.from_numpy(np.ascontiguousarray(inputs)),
            torch.from_numpy(weights.astype(np.float32)),
            torch.from_numpy(np.concatenate((right[:, None], wrong), axis=1)),
            torch.from_numpy(counts),
        )

    def _uniform(self, count: int) -> Floats:
        """Numbers in [0, 1) from bits, as Generator's own stream may change between releases of numpy."""
        return (self._bits.random_raw(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def keep_probability(counts: Floats, subsample: float) -> Floats:
    """Return with which probability a word stays in the text, (V,), as word2vec.c has it; 0 for what is no word."""
    shares = counts / counts.sum()
    with np.errstate(divide="ignore"):
        ratio = np.where(counts > 0, subsample / shares, 0.0) if subsample else (counts > 0).astype(float)
    return np.minimum(1.0, np.sqrt(ratio) + ratio)


class SkipgramObjective(VectorObjective):
    """The loss of negative sampling, a mean over the words that are guessed; judged by that on held-out text."""

    kind = "skipgram"
    model: Tables

    def __init__(self, config: PretrainConfig, corpus: Corpus, device: torch.device):
        super().__init__(config, corpus, device)
        own = config.skipgram
        self.drawing = Drawing(
            self.counts, window=own.window, negatives=own.negatives, subsample=own.subsample, cbow=own.cbow,
            seed=config.seed,
        )  # fmt: skip

    def tables(self, words: nn.Parameter) -> Tables:
        """Return both tables."""
        return Tables(words)

    def vectors(self) -> Tensor:
        """Return the vectors to guess from."""
        return self.model.words.detach()

    def batches(self) -> Sequence[Part]:
        """Return the examples of windows of the text, in equal parts."""
        step = self.sampler.step
        ids, _ = next(self.sampler)
        examples = self._moved(self.drawing.examples(ids, step))
        total = len(examples.inputs)
        if not total:
            return [Part(examples, 1.0)]
        pieces = zip(*(tensor.chunk(self.parts) for tensor in examples), strict=True)
        return [Part(Examples(*piece), len(piece[0]) / total) for piece in pieces]

    def loss(self, batch: Part) -> Tensor:
        """Return the mean over the examples of a part, weighted by how many of the batch they are; 0 of none."""
        terms = negative_sampling(self.model.words, self.model.contexts, batch.examples)
        return (terms.mean() if len(terms) else terms.sum()) * batch.share

    @torch.no_grad()
    def evaluate(self, stop: Stop) -> dict[str, float] | None:
        """Return ``loss``, the mean over the words that are guessed in the held-out text, the same each time.

        Raises:
            UsageError: No word of the vocabulary stands beside another there.
        """
        held_out = self.corpus.held_out(self.config.evaluation.max_tokens)
        total, count = 0.0, 0
        rows = evaluation_batches(held_out.tokens, self.config.data.batch_size, self.context, held_out.before)
        for number, (_, ids) in enumerate(rows):
            if stop():
                return None
            examples = self._moved(self.drawing.examples(ids, _LAST_STEP - number))
            total += float(negative_sampling(self.model.words, self.model.contexts, examples).double().sum())
            count += len(examples.inputs)
        if not count:
            raise UsageError(
                "in the held-out text no word of the vocabulary stands beside another: give more text or a larger "
                "vocabulary"
            )
        return {"loss": total / count}

    def _moved(self, examples: Examples) -> Examples:
        return Examples(*(tensor.to(self.device) for tensor in examples))
