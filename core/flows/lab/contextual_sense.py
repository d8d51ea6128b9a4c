"""A word with two meanings has one vector in a table, and two kinds of vectors in its context.

Sentences are about one of two topics; a sixth of their words are function words of both. One word belongs to either
topic: nothing in it says which, and everything around it does. A bidirectional language model learns the sentences
without being told of topics. Then a linear probe is asked for the topic, by the vector that the model's table has for
the ambiguous word, and by what the model says of it in its sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from portlm.flows.lab.experiment import Bar
from portlm.flows.lab.fitting import fit, fresh, seeded
from portlm.models.elmo_config import ElmoConfig

_TOPICS, _WORDS, _FUNCTION = 2, 30, 10
_SENSE = (
    _TOPICS * _WORDS + _FUNCTION
)  # the id of the ambiguous word, behind those of topics and function words
_LENGTH, _SHARE = 14, 1 / 6  # words of a sentence; of them function words
_STEPS, _ROWS = 200, 32
_SENTENCES = 600  # that the probe learns from, and as many that it is judged by


class ContextualSense:
    """Vectors of an ambiguous word from the table of a small ELMo and from its layers, and a linear probe on each."""

    name: ClassVar[str] = "contextual-sense"
    shows: ClassVar[str] = (
        "The vector of an ambiguous word tells its sense in a sentence, and its vector in a table does not."
    )
    source: ClassVar[str] = "Peters et al., Deep contextualized word representations, 2018"
    seeds: ClassVar[tuple[int, ...]] = (0, 1, 2)
    bars: ClassVar[tuple[Bar, ...]] = (Bar("static", "<=", 0.60), Bar("contextual", ">=", 0.95))

    def run(self, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
        """Train a model on sentences, and measure how often each probe names the topic of one that it has not seen."""
        config = ElmoConfig(vocab_size=_SENSE + 1, context_length=_LENGTH, cells=64, width=32, dropout=0.0)
        model: Any = fresh(config, seed)
        losses = fit(
            model, _batches(seeded(seed)), _STEPS, lr=1e-2, loss=lambda ids: model(ids, ids), tell=tell
        )
        sentences, topics, places = _sentences(seeded(seed, 1), 2 * _SENTENCES)
        with torch.no_grad():
            contextual = model.encode(sentences)[torch.arange(len(places)), places].numpy()
            table = model.tokens.weight.numpy()
        static = table[sentences[torch.arange(len(places)), places]]
        labels = topics.numpy()
        return {
            "static": _probe(static, labels),
            "contextual": _probe(contextual, labels),
            "loss_first": losses[0],
            "loss_last": losses[-1],
            "words": _plane(table).tolist(),
            "occurrences": _plane(contextual[:_SENTENCES]).tolist(),
            "topics": labels[:_SENTENCES].tolist(),
        }

    def draw(self, results: Mapping[int, dict[str, Any]], path: Path) -> None:
        """Draw the table's vectors of all words, and the ambiguous word's in its sentences, in two dimensions each."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4 * len(results)), layout="constrained")
        panels = figure.subplots(len(results), 2, squeeze=False)
        for (left, right), (seed, result) in zip(panels, results.items(), strict=True):
            words = np.array(result["words"])
            for topic in range(_TOPICS):
                of_topic = words[topic * _WORDS : (topic + 1) * _WORDS]
                left.scatter(*of_topic.T, s=12, color=f"C{topic}", label=f"words of topic {topic + 1}")
                seen = np.array(result["occurrences"])[np.array(result["topics"]) == topic]
                right.scatter(*seen.T, s=6, color=f"C{topic}", label=f"in a sentence of topic {topic + 1}")
            left.scatter(*words[_TOPICS * _WORDS : _SENSE].T, s=12, color="0.7", label="function words")
            left.scatter(*words[_SENSE], s=120, marker="*", color="k", label="the ambiguous word")
            left.set_title(f"table: probe {result['static']:.3f} (seed {seed})")
            right.set_title(f"in context: probe {result['contextual']:.3f}")
            left.legend(fontsize=7)
            right.legend(fontsize=7)
        figure.savefig(path, dpi=120)


def _sentences(generator: np.random.Generator, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return sentences (N, T), their topics (N,), and where the ambiguous word is in each (N,), all int64."""
    topics = generator.integers(0, _TOPICS, count)
    words = topics[:, None] * _WORDS + generator.integers(0, _WORDS, (count, _LENGTH))
    functions = _TOPICS * _WORDS + generator.integers(0, _FUNCTION, (count, _LENGTH))
    sentences = np.where(generator.random((count, _LENGTH)) < _SHARE, functions, words)
    places = generator.integers(0, _LENGTH, count)
    sentences[np.arange(count), places] = _SENSE
    return torch.from_numpy(sentences), torch.from_numpy(topics), torch.from_numpy(places)


def _batches(generator: np.random.Generator) -> Iterator[Tensor]:
    while True:
        yield _sentences(generator, _ROWS)[0]


def _probe(vectors: np.ndarray, labels: np.ndarray) -> float:
    """Return how often a linear map, fitted by least squares to the first half, names the label of the second."""
    inputs = np.concatenate((vectors, np.ones((len(vectors), 1))), axis=1).astype(np.float64)  # (N, C + 1)
    half = len(labels) // 2
    solved, *_ = np.linalg.lstsq(inputs[:half], 2.0 * labels[:half] - 1, rcond=None)
    return float(np.mean((inputs[half:] @ solved > 0) == (labels[half:] == 1)))


def _plane(vectors: np.ndarray) -> np.ndarray:
    """Return vectors (N, C) along their two directions of largest variance, (N, 2)."""
    centred = vectors - vectors.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    plane: np.ndarray = (centred @ axes[:2].T).round(4)
    return plane
