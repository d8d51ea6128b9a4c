"""What a translator's encoder knows of a word in its sentence, put to another use: context vectors (CoVe).

A translator with attention learns pairs of a made-up language. Some words of the source are ambiguous: which of two
words they become is said by the topic of the sentence, that is, by the words around. Then the encoder is frozen, and a
classifier is asked which meaning the ambiguous word of a sentence has, by a few labelled ones: from the vectors of the
embedding alone, or with what the encoder says beside them, ``[w; CoVe(w)]`` as in the paper. An encoder that has
learned nothing gives features of the same size, for comparison.

B sentences, T words, E width of embeddings, C of a state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from portlm.flows.lab.alignment import Pairs
from portlm.flows.lab.experiment import Bar
from portlm.flows.lab.fitting import fit, fresh, mean_curve, named, seeded
from portlm.models.bahdanau import BahdanauConfig

_TOPICS, _WORDS, _FUNCTION, _SENSES = 2, 20, 10, 8  # of each topic; of none; that are ambiguous
_PLAIN = _TOPICS * _WORDS + _FUNCTION
SOURCE = (
    _PLAIN + _SENSES
)  # words of the source language; the target's follow, one for each but two for ambiguous ones
TARGET = _PLAIN + _TOPICS * _SENSES
START, END = SOURCE + TARGET, SOURCE + TARGET + 1
_LENGTH = 10
_SHARE = 1 / 2  # of the words that belong to no topic
_STEPS, _ROWS = 300, 32
_LABELS, _JUDGED = 100, 1000
"""Sentences that the classifier learns from, and that it is judged by."""


def sentences(generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return sentences (N, T) of the source, their topics (N,), and where each has its ambiguous word (N,)."""
    topics = generator.integers(0, _TOPICS, count)
    words = topics[:, None] * _WORDS + generator.integers(0, _WORDS, (count, _LENGTH))
    functions = _TOPICS * _WORDS + generator.integers(0, _FUNCTION, (count, _LENGTH))
    text = np.where(generator.random((count, _LENGTH)) < _SHARE, functions, words)
    places = generator.integers(0, _LENGTH, count)
    text[np.arange(count), places] = _PLAIN + generator.integers(0, _SENSES, count)
    return text, topics, places


def translated(text: np.ndarray, topics: np.ndarray) -> np.ndarray:
    """Return sentences (N, T) in the target language: word by word from the last to the first, by topic."""
    sense = _PLAIN + (text - _PLAIN) * _TOPICS + topics[:, None]
    return SOURCE + np.where(text < _PLAIN, text, sense)[:, ::-1]


def _pairs(generator: np.random.Generator) -> Iterator[Pairs]:
    while True:
        text, topics, _ = sentences(generator, _ROWS)
        said = translated(text, topics)
        ends = np.full((_ROWS, 1), START), np.full((_ROWS, 1), END)
        read, wanted = np.hstack((ends[0], said)), np.hstack((said, ends[1]))
        source, target, labels = (torch.from_numpy(part.astype(np.int64)) for part in (text, read, wanted))
        yield source, target, labels, torch.ones_like(source)


@torch.no_grad()
def cove(model: Any, text: Tensor) -> Tensor:
    """Return what a translator's encoder says of each word (B, T, 2 C), from both sides."""
    _, forwards, backwards, *_ = model.read(text, None)
    return torch.cat((forwards, backwards), dim=-1)


class Cove:
    """A translator with attention, whose encoder lends its states to a classifier with a hundred labels."""

    name: ClassVar[str] = "cove"
    shows: ClassVar[str] = (
        "The states of a translator's encoder, frozen, tell a classifier what the words' own vectors do not."
    )
    source: ClassVar[str] = "McCann et al., Learned in Translation, 2017"
    seeds: ClassVar[tuple[int, ...]] = (0, 1, 2)
    bars: ClassVar[tuple[Bar, ...]] = (
        Bar("cove_over_static", ">=", 0.3),
        Bar("cove_over_untrained", ">=", 0.1),
        Bar("static", "<=", 0.6),
    )

    def run(self, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
        """Train a translator, and measure how often a classifier says the sense of the ambiguous word."""
        config = BahdanauConfig(
            vocab_size=END + 1, context_length=_LENGTH + 1, embed_width=32, width=48, alignment=48, maxout=48,
            init="scaled", decoder_start_token_id=START, eos_token_ids=(END,),
        )  # fmt: skip
        model: Any = fresh(config, seed)
        untrained: Any = fresh(config, seed)
        losses = fit(
            model, _pairs(seeded(seed)), _STEPS, lr=5e-3, weight_decay=0.0, tell=named(tell, "translator")
        )
        text, topics, places = sentences(seeded(seed, 1), _LABELS + _JUDGED)
        words = torch.from_numpy(text)
        rows = torch.arange(len(words))
        at = torch.from_numpy(places)
        table = model.encoder.embed.weight.detach()
        static = table[words[rows, at]]  # (N, E)
        features = {
            "static": static,
            "untrained": torch.cat((static, cove(untrained, words)[rows, at]), dim=1),
            "cove": torch.cat((static, cove(model, words)[rows, at]), dim=1),
        }
        figures: dict[str, Any] = {name: _learned(given, topics) for name, given in features.items()}
        return figures | {
            "cove_over_static": figures["cove"] - figures["static"],
            "cove_over_untrained": figures["cove"] - figures["untrained"],
            "loss_first": losses[0],
            "loss_last": losses[-1],
            "curve": mean_curve(losses),
        }

    def draw(self, results: Mapping[int, dict[str, Any]], path: Path) -> None:
        """Draw the accuracy of the classifier by what it is given, and the translator's loss."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4), layout="constrained")
        shares, curves = figure.subplots(1, 2)
        names = ("static", "untrained", "cove")
        for place, (seed, result) in enumerate(results.items()):
            shares.bar(
                np.arange(3) + 0.25 * place, [result[name] for name in names], 0.25, label=f"seed {seed}"
            )
            steps = np.linspace(0, _STEPS, len(result["curve"]))
            curves.plot(steps, result["curve"], color=f"C{place}")
        shares.axhline(1 / _TOPICS, color="black", linestyle="--", label="chance")
        shares.set_xticks(
            np.arange(3) + 0.25, ["word vectors", "and an untrained\nencoder's states", "and CoVe"]
        )
        shares.set_ylabel("senses said")
        shares.legend()
        curves.set_xlabel("steps of the translator")
        curves.set_ylabel("loss (nats)")
        figure.savefig(path, dpi=120)


def _learned(features: Tensor, labels: np.ndarray) -> float:
    """Return how often a linear map, fitted to the first sentences with a penalty, says the label of the others."""
    inputs = features.double()
    mean, spread = inputs[:_LABELS].mean(0), inputs[:_LABELS].std(0) + 1e-6
    inputs = torch.cat(((inputs - mean) / spread, inputs.new_ones(len(inputs), 1)), dim=1)
    wanted = torch.from_numpy(2.0 * labels - 1)
    learned = inputs[:_LABELS]
    penalty = torch.eye(
        inputs.shape[1], dtype=torch.float64
    )  # a ridge, since features may be more than labels
    solved = torch.linalg.solve(learned.T @ learned + penalty, learned.T @ wanted[:_LABELS])
    return float(((inputs[_LABELS:] @ solved > 0) == (wanted[_LABELS:] > 0)).double().mean())
