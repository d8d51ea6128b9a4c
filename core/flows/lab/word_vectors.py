"""Word vectors learn classes that no word names: who stands in like company gets a like vector.

A text of a hidden Markov chain: the next class follows from the class, and the word from the class alone, so two words
of a class differ in how frequent they are and in nothing else. Which words belong together is in the text, and not in
the words: one-hot vectors, all at right angles, know nothing of it, and counting contexts (PPMI, then SVD) finds it,
too. Judged is how often the nearest word by cosine is of the same class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from portlm.flows.lab.experiment import Bar
from portlm.flows.lab.fitting import fit, fresh, seeded
from portlm.models.word_vectors import WordVectorsConfig
from portlm.train.objectives.glove import cooccurrences
from portlm.train.objectives.skipgram import Drawing, Examples, Tables, negative_sampling
from portlm.train.objectives.vectors import word_counts

CLASSES, WORDS, TOKENS = 8, 15, 60_000  # words of a class
_WIDTH, _WINDOW, _NEGATIVES = 16, 2, 5
_ROWS, _LENGTH, _STEPS = 8, 32, 1500
_LEAST = 5  # times that a word must stand in the text to be judged, as word2vec.c has it

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


class WordVectors:
    """Skip-gram vectors beside one-hot ones and beside counted contexts, on a text of hidden classes."""

    name: ClassVar[str] = "word-vectors"
    shows: ClassVar[str] = (
        "Skip-gram vectors of words of one hidden class lie together; one-hot vectors do not."
    )
    source: ClassVar[str] = "Mikolov et al., 2013; Levy and Goldberg, 2014"
    seeds: ClassVar[tuple[int, ...]] = (0, 1, 2)
    bars: ClassVar[tuple[Bar, ...]] = (
        Bar("skipgram_same_class", ">=", 0.80),
        Bar("ppmi_svd_same_class", ">=", 0.70),
        Bar("one_hot_error", "<=", 0.02),
    )

    def run(self, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
        """Measure how often the nearest word is of the same class, with each kind of vectors."""
        generator = seeded(seed)
        tokens = text(generator)
        counts = word_counts(tokens, CLASSES * WORDS, ())
        judged = np.flatnonzero(counts >= _LEAST)
        words, contexts = skipgram(tokens, counts, seed, tell)
        learned = words[judged]
        information = mutual_information(tokens)
        counted = ppmi_svd(information)[judged]
        classes = judged // WORDS
        one_hot = same_class(np.eye(len(judged)), classes)
        chance = float(np.mean([(classes == c).sum() - 1 for c in classes]) / (len(judged) - 1))
        places = plane(learned)
        return {
            "skipgram_same_class": same_class(learned, classes),
            "ppmi_svd_same_class": same_class(counted, classes),
            "one_hot_same_class": one_hot,
            "one_hot_error": abs(one_hot - chance),
            "score_information_correlation": correlation(words @ contexts.T, information),
            "chance": chance,
            "words": len(judged),
            "classes": classes.tolist(),
            "counts": counts[judged].tolist(),
            "places": places.tolist(),
        }

    def draw(self, results: Mapping[int, dict[str, Any]], path: Path) -> None:
        """Draw a map of the words for each seed: their vectors in the plane of the two widest directions."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.5 * len(results), 4.5), layout="constrained")
        rows = figure.subplots(1, len(results), squeeze=False)
        for axes, (seed, result) in zip(rows[0], results.items(), strict=True):
            places, classes = np.array(result["places"]), np.array(result["classes"])
            sizes = 12 * np.log(result["counts"])
            axes.scatter(*places.T, c=classes, s=sizes, cmap="tab10", vmin=0, vmax=9)
            axes.set_title(f"seed {seed}: nearest of the same class {result['skipgram_same_class']:.2f}")
            axes.set_xticks([])
            axes.set_yticks([])
        figure.savefig(path, dpi=120)


def text(generator: np.random.Generator) -> Ids:
    """Return the words of a text, (TOKENS,): word w of class c is c * WORDS + w."""
    scores = np.exp(1.5 * generator.standard_normal((CLASSES, CLASSES)))
    steps = np.cumsum(scores / scores.sum(1, keepdims=True), axis=1)
    drawn, classes = generator.random(TOKENS), np.zeros(TOKENS, np.int64)
    for place in range(1, TOKENS):
        row = steps[classes[place - 1]]
        classes[place] = min(int(np.searchsorted(row, drawn[place], side="right")), CLASSES - 1)
    shares = 1 / np.arange(1, WORDS + 1)  # Zipf
    return classes * WORDS + generator.choice(WORDS, TOKENS, p=shares / shares.sum())


def skipgram(tokens: Ids, counts: Floats, seed: int, tell: Callable[[str], None]) -> tuple[Floats, Floats]:
    """Learn the vectors of words and of contexts, (V, M) each, by skip-gram with negative sampling."""
    drawing = Drawing(counts, window=_WINDOW, negatives=_NEGATIVES, subsample=0.0, cbow=False, seed=seed)
    model: Any = fresh(WordVectorsConfig(vocab_size=len(counts), width=_WIDTH), seed)
    tables = Tables(model.vectors.weight)

    def batches() -> Iterator[Examples]:
        rows = tokens[: len(tokens) // _LENGTH * _LENGTH].reshape(-1, _LENGTH)
        generator = np.random.default_rng((seed, 1))
        for step in range(_STEPS):
            yield drawing.examples(rows[generator.integers(0, len(rows), _ROWS)], step)

    def loss(examples: Examples) -> torch.Tensor:
        return negative_sampling(tables.words, tables.contexts, examples).mean()

    fit(tables, batches(), _STEPS, lr=1e-2, weight_decay=0.0, loss=loss, tell=tell)
    return tables.words.detach().double().numpy(), tables.contexts.detach().double().numpy()


def mutual_information(tokens: Ids) -> Floats:
    """Return the pointwise mutual information (V, V) of words and their contexts, -inf where a pair is never seen.

    Contexts are smoothed: their shares are by count^0.75 (Levy, Goldberg and Dagan, 2015).
    """
    V = CLASSES * WORDS
    cells = cooccurrences(tokens, np.ones(V, bool), _WINDOW)
    counts = np.zeros((V, V))
    counts[cells.words, cells.contexts] = cells.counts
    seen = np.maximum(counts.sum(0) ** 0.75, 1e-12)
    expected = np.outer(counts.sum(1) / counts.sum(), seen / seen.sum())
    with np.errstate(divide="ignore"):
        information: Floats = np.log(counts / counts.sum() / np.maximum(expected, 1e-300))
    return information


def ppmi_svd(information: Floats) -> Floats:
    """Return U S^1/2 (V, M) of the mutual information where it is above 0, and 0 elsewhere."""
    u, s, _ = np.linalg.svd(np.maximum(information, 0))
    vectors: Floats = u[:, :_WIDTH] * np.sqrt(s[:_WIDTH])
    return vectors


def correlation(scores: Floats, information: Floats) -> float:
    """Return Pearson's correlation of scores with what they approach: mutual information less log of the negatives.

    Over pairs that are seen: Levy and Goldberg, "Neural Word Embedding as Implicit Matrix Factorization", 2014.
    """
    seen = np.isfinite(information)
    return float(np.corrcoef(scores[seen], information[seen])[0, 1])


def same_class(vectors: Floats, classes: Ids) -> float:
    """Return how often the nearest other word by cosine is of the same class; equally near ones count their share."""
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -np.inf)
    nearest = cosines >= cosines.max(1, keepdims=True) - 1e-12
    alike = nearest & (classes[:, None] == classes)
    return float((alike.sum(1) / nearest.sum(1)).mean())


def plane(vectors: Floats) -> Floats:
    """Return the two coordinates (N, 2) of vectors along the directions in which they vary most."""
    centred = vectors - vectors.mean(0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    found: Floats = centred @ directions[:2].T
    return found
