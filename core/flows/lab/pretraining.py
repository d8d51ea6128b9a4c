"""Pretraining pays where labels are few: the same model, fine-tuned, with its head trained alone, or trained afresh.

A text is 24 of 64 symbols in a circle. Each of six topics has a step from a symbol to the one that usually follows it;
a text has one topic and takes its steps, but for a symbol now and then. Its label is whether the topic is of the first
three or else the first symbol is an even one, and not both: neither the topic nor the symbol says anything of it alone.
Texts without labels teach what topics are and how symbols lie, which a few hundred labels cannot; that the two belong
together only labels can teach, so a head on what the model knows already is not enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from portlm.flows.lab.experiment import Bar
from portlm.flows.lab.fitting import Batch, fit, fresh, mean_curve, named, parameters, seeded
from portlm.models.gpt2 import GPT2Config
from portlm.models.heads import CLASSIFY, with_labels
from portlm.train.evaluation import evaluating

SYMBOLS, TOPICS, LENGTH = 64, 6, 24
_FOLLOWS = 0.95  # how often a symbol is a step of the topic from the one before
_GPT = GPT2Config(vocab_size=SYMBOLS, context_length=40, n_layer=4, n_head=4, width=96)
_PRETRAINING, _ROWS = 1200, 64  # steps, texts in each
_STEPS = {300: 300, 2000: 600}  # by number of labels
_LABELLED_ROWS, _JUDGED = 32, 1000
_RATES = {"full": 1e-3, "head": 1e-2, "scratch": 1e-3}


class World:
    """Topics, and texts that are drawn from them."""

    def __init__(self, generator: np.random.Generator):
        self.steps = 1 + generator.permutation(SYMBOLS - 1)[:TOPICS]

    def texts(self, generator: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Return texts (B, T) and their labels (B,), 0 or 1, both int64."""
        topics = generator.integers(TOPICS, size=count)
        symbols = generator.integers(SYMBOLS, size=(count, LENGTH))
        usual = generator.random((count, LENGTH)) < _FOLLOWS
        for t in range(1, LENGTH):
            following = (symbols[:, t - 1] + self.steps[topics]) % SYMBOLS
            symbols[:, t] = np.where(usual[:, t], following, symbols[:, t])
        labels = (topics < TOPICS // 2) ^ (symbols[:, 0] % 2 == 0)
        return torch.from_numpy(symbols), torch.from_numpy(labels.astype(np.int64))


def epochs(generator: np.random.Generator, texts: Tensor, labels: Tensor, rows: int) -> Iterator[Batch]:
    """Yield batches of all texts in an order of their own each time, without what is left of a full batch."""
    while True:
        order = torch.from_numpy(generator.permutation(len(texts)))
        for part in order[: len(order) // rows * rows].view(-1, rows):
            yield texts[part], labels[part]


@torch.no_grad()
def right(model: Any, texts: Tensor, labels: Tensor) -> float:
    """Return the share of labels that a model says."""
    with evaluating(model):
        said = [model.answer(CLASSIFY, part).argmax(-1) for part in texts.split(250)]
    return float((torch.cat(said) == labels).float().mean())


class Pretraining:
    """A GPT of four layers on 300 and on 2000 labels: fine-tuned, frozen under a new head, and from scratch."""

    name: ClassVar[str] = "pretraining-pays"
    shows: ClassVar[str] = (
        "A pretrained model needs fewer labels than a fresh one, and more of it than the head must learn."
    )
    source: ClassVar[str] = "Radford, Narasimhan, Salimans and Sutskever, 2018"
    seeds: ClassVar[tuple[int, ...]] = (0, 1, 2)
    bars: ClassVar[tuple[Bar, ...]] = (
        Bar("full_over_scratch_300", ">=", 0.05),
        Bar("full_over_head_2000", ">=", 0.15),
    )

    def run(self, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
        """Pretrain on texts, and measure the accuracy of each way with each number of labels."""
        generator = seeded(seed)
        world = World(generator)

        def following() -> Iterator[Batch]:
            while True:
                texts, _ = world.texts(generator, _ROWS)
                yield texts[:, :-1], texts[:, 1:]

        pretrained = fresh(_GPT, seed)
        losses = fit(
            pretrained, following(), _PRETRAINING, lr=1e-3, warmup=100, tell=named(tell, "pretraining")
        )
        figures: dict[str, Any] = {
            "curve": mean_curve(losses),
            "pretraining_loss": float(np.mean(losses[-50:])),
            "parameters": parameters(pretrained),
        }
        judged = world.texts(seeded(seed, stream=1), _JUDGED)
        for count, steps in _STEPS.items():
            labelled = world.texts(seeded(seed, stream=count), count)
            for way, rate in _RATES.items():
                model: Any = fresh(with_labels(_GPT, ("no", "yes")), seed)
                if way != "scratch":
                    model.load_state_dict(model.state_dict() | pretrained.state_dict())
                if way == "head":
                    model.requires_grad_(False)
                    model.heads.requires_grad_(True)

                def loss(batch: Batch, model: Any = model) -> Tensor:
                    return torch.nn.functional.cross_entropy(model.answer(CLASSIFY, batch[0]), batch[1])

                batches = epochs(seeded(seed, stream=2), *labelled, _LABELLED_ROWS)
                fit(model, batches, steps, lr=rate, warmup=steps // 10, loss=loss)
                figures[f"{way}_{count}"] = right(model, *judged)
                tell(f"{way}, {count} labels: accuracy {figures[f'{way}_{count}']:.3f}")
        figures["full_over_scratch_300"] = figures["full_300"] - figures["scratch_300"]
        figures["full_over_head_2000"] = figures["full_2000"] - figures["head_2000"]
        return figures

    def draw(self, results: Mapping[int, dict[str, Any]], path: Path) -> None:
        """Draw accuracy over the number of labels, a line for each way and seed."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for number, way in enumerate(_RATES):
            for place, result in enumerate(results.values()):
                reached = [result[f"{way}_{count}"] for count in _STEPS]
                label = way if place == 0 else None
                axes.plot([*_STEPS], reached, marker="o", color=f"C{number}", label=label)
        axes.axhline(0.5, color="grey", linestyle=":", label="chance")
        axes.set_xscale("log")
        axes.set_xticks([*_STEPS], [str(count) for count in _STEPS])
        axes.set_xlabel("labels")
        axes.set_ylabel("accuracy on held-out texts")
        axes.legend()
        figure.savefig(path, dpi=120)
