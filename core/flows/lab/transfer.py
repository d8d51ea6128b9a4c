"""ULMFiT: a language model of texts in general, then of the texts of a task, then a classifier of them.

A text is 20 of 32 letters and has one of six topics, each with a map from a letter to the one that usually follows it.
The label is whether the topic is of the first three. An AWD-LSTM reads texts without labels; then texts of the task,
in which letters stray more often; then, with concat pooling and two layers on top, it learns fifty labels, layer by
layer from the top, the lower ones slower, along a slanted triangle. The same model learns the labels afresh, and, as a
comparison without a bar, from the pretrained weights with all layers at once and at one rate.

B texts, T letters, E width of the last layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from portlm.flows.lab.experiment import Bar
from portlm.flows.lab.fitting import Batch, fit, mean_curve, named, seeded
from portlm.models.awd_lstm import AWDLSTM, AWDLSTMConfig
from portlm.train.config import LayerSettings
from portlm.train.evaluation import evaluating
from portlm.train.schedule import SlantedTriangle

_LETTERS, _TOPICS, _LENGTH = 32, 6, 20
_FOLLOWS = {"general": 0.95, "task": 0.8}  # how often a letter is the one that the topic's map says
_POOL = 20_000  # texts without labels
_LABELS, _JUDGED = 50, 1000
_STEPS = {"general": 900, "task": 60, "labels": 240}
_UNFREEZE = 30  # steps after which one more layer learns
_CONFIG = AWDLSTMConfig(
    vocab_size=_LETTERS, context_length=_LENGTH, n_layer=2, width=48, hidden=96, dropout=0.1, input_dropout=0.1,
    layer_dropout=0.1, embedding_dropout=0.02, weight_dropout=0.2,
)  # fmt: skip


class Classifier(AWDLSTM):
    """An AWD-LSTM with Howard and Ruder's head: concat pooling and two layers, each behind a batch norm and dropout."""

    def __init__(self, config: AWDLSTMConfig):
        super().__init__(config)
        E = config.width
        self.heads = nn.Sequential(
            nn.BatchNorm1d(3 * E), nn.Dropout(0.2), nn.Linear(3 * E, 50), nn.ReLU(),
            nn.BatchNorm1d(50), nn.Dropout(0.1), nn.Linear(50, 2),
        )  # fmt: skip

    def answer(self, ids: Tensor) -> Tensor:
        """Return the logits (B, 2) of texts (B, T): of the last state, and of the largest and the mean of all."""
        y, _ = self._read(ids, None, None)  # (B, T, E)
        pooled = torch.cat((y[:, -1], y.amax(1), y.mean(1)), dim=1)  # (B, 3 E)
        found: Tensor = self.heads(pooled)
        return found


class World:
    """Topics, and texts that are drawn from them."""

    def __init__(self, seed: int):
        generator = np.random.default_rng((seed, 14))
        self._next = np.stack([generator.permutation(_LETTERS) for _ in range(_TOPICS)])

    def texts(self, generator: np.random.Generator, count: int, kind: str) -> Batch:
        """Return texts (N, T) and their labels (N,)."""
        topics = generator.integers(_TOPICS, size=count)
        letters = np.empty((count, _LENGTH), np.int64)
        letters[:, 0] = generator.integers(_LETTERS, size=count)
        for t in range(1, _LENGTH):
            usual = self._next[topics, letters[:, t - 1]]
            strays = generator.random(count) >= _FOLLOWS[kind]
            letters[:, t] = np.where(strays, generator.integers(_LETTERS, size=count), usual)
        return torch.from_numpy(letters), torch.from_numpy((topics < _TOPICS // 2).astype(np.int64))


class Transfer:
    """An AWD-LSTM on fifty labels: by ULMFiT's three stages, and from scratch."""

    name: ClassVar[str] = "transfer"
    shows: ClassVar[str] = (
        "A language model, tuned to a task and unfrozen layer by layer, learns from fifty labels what a fresh one "
        "does not."
    )
    source: ClassVar[str] = "Howard and Ruder, 2018"
    seeds: ClassVar[tuple[int, ...]] = (0, 1, 2)
    bars: ClassVar[tuple[Bar, ...]] = (Bar("ulmfit_over_scratch", ">=", 0.15),)

    def run(self, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
        """Measure the accuracy of each way on 1000 texts of the task that none has seen."""
        world, generator = World(seed), seeded(seed)
        general, _ = world.texts(generator, _POOL, "general")
        learned, judged = (
            world.texts(seeded(seed, stream), count, "task") for stream, count in ((1, _LABELS), (2, _JUDGED))
        )
        torch.manual_seed(seed)
        model = Classifier(_CONFIG)
        fresh = {name: value.clone() for name, value in model.state_dict().items()}
        figures: dict[str, Any] = {"curves": {}}
        losses = fit(
            model, _following(generator, general), _STEPS["general"], lr=8e-3, tell=named(tell, "pretraining")
        )
        pretrained = {name: value.clone() for name, value in model.state_dict().items()}
        figures["curves"]["pretraining"] = mean_curve(losses)
        figures["loss_pretrained"] = _loss(model, judged[0])
        # Stage 2: the texts of the task, without their labels.
        fit(
            model, _following(generator, learned[0]), _STEPS["task"], lr=4e-3,
            schedule=SlantedTriangle(4e-3, 32.0, _STEPS["task"] // 10, _STEPS["task"]),
            layers=LayerSettings(decay=2.6), tell=named(tell, "the task's texts"),
        )  # fmt: skip
        figures["loss_tuned"] = _loss(model, judged[0])
        ways: dict[str, tuple[Any, LayerSettings]] = {
            "ulmfit": (
                {name: value.clone() for name, value in model.state_dict().items()},
                LayerSettings(decay=2.6, unfreeze=_UNFREEZE),
            ),
            "all_at_once": (pretrained, LayerSettings()),
            "scratch": (fresh, LayerSettings()),
        }
        steps = _STEPS["labels"]
        for name, (weights, layers) in ways.items():
            model = Classifier(_CONFIG)
            model.load_state_dict(weights)
            draws = seeded(seed, 3)
            losses = fit(
                model, _labelled(draws, learned), steps, lr=1e-2, layers=layers,
                schedule=SlantedTriangle(1e-2, 32.0, steps // 10, steps), tell=named(tell, name),
                loss=partial(_of_labels, model),
            )  # fmt: skip
            figures["curves"][name] = mean_curve(losses)
            with torch.no_grad(), evaluating(model):
                right = model.answer(judged[0]).argmax(1) == judged[1]
            figures[name] = float(right.double().mean())
            tell(f"{name}: accuracy {figures[name]:.3f}")
        figures["ulmfit_over_scratch"] = figures["ulmfit"] - figures["scratch"]
        return figures

    def draw(self, results: Mapping[int, dict[str, Any]], path: Path) -> None:
        """Draw the accuracy of each way, by seed."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        names = ("ulmfit", "all_at_once", "scratch")
        for place, (seed, result) in enumerate(results.items()):
            shares = [result[name] for name in names]
            axes.bar(np.arange(3) + 0.25 * place, shares, 0.25, label=f"seed {seed}")
        axes.axhline(0.5, color="black", linestyle="--", label="chance")
        axes.set_xticks(np.arange(3) + 0.25, ["ULMFiT", "pretrained,\nall at once", "from scratch"])
        axes.set_ylabel(f"accuracy with {_LABELS} labels")
        axes.legend()
        figure.savefig(path, dpi=120)


def _following(generator: np.random.Generator, texts: Tensor, rows: int = 48) -> Iterator[Batch]:
    """Yield texts to be read and what follows each letter, (B, T - 1) both."""
    while True:
        chosen = texts[torch.from_numpy(generator.integers(0, len(texts), rows))]
        yield chosen[:, :-1], chosen[:, 1:]


def _labelled(generator: np.random.Generator, texts: Batch, rows: int = 25) -> Iterator[Batch]:
    while True:
        chosen = torch.from_numpy(generator.integers(0, len(texts[0]), rows))
        yield texts[0][chosen], texts[1][chosen]


def _of_labels(model: Classifier, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of the labels of a batch."""
    return F.cross_entropy(model.answer(batch[0]), batch[1])


@torch.no_grad()
def _loss(model: Any, texts: Tensor) -> float:
    """Return the mean cross-entropy of letters, in nats."""
    with evaluating(model):
        return float(model(texts[:, :-1], texts[:, 1:]))
