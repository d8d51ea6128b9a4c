"""Pretraining pays where labels are few: the same model, fine-tuned, with its head trained alone, or trained afresh.

A text is 24 of 64 letters. Each of six topics has a map from a letter to the one that usually follows it; a text has
one topic and follows its map, but for a letter now and then. Its label is whether the topic is of the first three or
else the first letter is an even one, and not both: neither the topic nor the letter says anything of it alone. Texts
without labels teach what topics are, which a few hundred labels cannot; that the two belong together only labels can
teach, so a head on what the model knows already is not enough.
"""

from __future__ import annotations

import string
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from portlm import settings
from portlm.flows.lab.experiment import Bar
from portlm.train.config import PretrainConfig
from portlm.train.finetune import PRESET, finetune
from portlm.train.pretrain import pretrain

_LETTERS = np.array([*string.ascii_letters, *string.digits, "+", "/"])
_TOPICS, _LENGTH = 6, 24
_FOLLOWS = 0.85  # how often a letter is the one that the topic's map says
_UNLABELLED, _JUDGED = 20_000, 500
_STEPS = {300: 150, 2000: 300}  # by number of labels
_PRETRAINING = 500
_SHAPE = {"family": "gpt2", "n_layer": 3, "n_head": 4, "width": 64, "context_length": 28}
_WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "head": {"layers.freeze": "backbone", "optimizer.lr": 1e-2},
    "scratch": {},
}


class Pretraining:
    """A GPT of three layers on 300 and on 2000 labels: fine-tuned, frozen under a new head, and from scratch."""

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
        world = _World(seed)
        found: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            texts, judged = folder / "texts.txt", folder / "judged.tsv"
            texts.write_text("".join(f"{text}\n" for text, _ in world.texts(_UNLABELLED)))
            judged.write_text(_lines(world.texts(_JUDGED)))
            tell(f"pretraining, {_PRETRAINING} steps")
            begun = pretrain(_pretraining(texts, seed), folder / "pretrained", quiet=True, plot=False)
            found["pretraining_loss"] = begun.loss
            for count, steps in _STEPS.items():
                labelled = folder / f"{count}.tsv"
                labelled.write_text(_lines(world.texts(count)))
                for way, changes in _WAYS.items():
                    tell(f"{way}, {count} labels")
                    given = {"model." + key: value for key, value in _SHAPE.items()}
                    if way != "scratch":
                        given = {"init": str(begun.checkpoint)}
                    config = _tuning(labelled, judged, steps, seed, given | changes)
                    done = finetune(config, folder / f"{way}-{count}", quiet=True, plot=False)
                    found[f"{way}_{count}"] = done.accuracy
                    tell(f"{way}, {count} labels: accuracy {done.accuracy:.3f}")
        found["full_over_scratch_300"] = found["full_300"] - found["scratch_300"]
        found["full_over_head_2000"] = found["full_2000"] - found["head_2000"]
        return found

    def draw(self, results: Mapping[int, dict[str, Any]], path: Path) -> None:
        """Draw accuracy over the number of labels, a line for each way and seed."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for number, way in enumerate(_WAYS):
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


class _World:
    """Topics, and texts that are drawn from them one after the other."""

    def __init__(self, seed: int):
        self._generator = np.random.default_rng((seed, 15))
        self._next = np.stack([self._generator.permutation(len(_LETTERS)) for _ in range(_TOPICS)])

    def texts(self, count: int) -> list[tuple[str, str]]:
        """Return texts, each with its label."""
        draw, size = self._generator, len(_LETTERS)
        topics = draw.integers(_TOPICS, size=count)
        letters = np.empty((count, _LENGTH), np.int64)
        letters[:, 0] = draw.integers(size, size=count)
        for t in range(1, _LENGTH):
            usual = self._next[topics, letters[:, t - 1]]
            other = draw.integers(size, size=count)
            letters[:, t] = np.where(draw.random(count) < _FOLLOWS, usual, other)
        labels = (topics < _TOPICS // 2) ^ (letters[:, 0] % 2 == 0)
        return [
            ("".join(_LETTERS[row]), "yes" if label else "no")
            for row, label in zip(letters, labels.tolist(), strict=True)
        ]


def _lines(texts: list[tuple[str, str]]) -> str:
    return "".join(f"{label}\t{text}\n" for text, label in texts)


def _pretraining(texts: Path, seed: int) -> PretrainConfig:
    return settings.load(
        PretrainConfig,
        overrides=[
            *(("model." + key, value) for key, value in _SHAPE.items()),
            ("data.texts", [str(texts)]), ("data.batch_size", 32), ("data.validation_fraction", 0.02),
            ("steps", _PRETRAINING), ("seed", seed), ("optimizer.lr", 3e-3), ("threads", 1),
            ("evaluation.interval", _PRETRAINING), ("evaluation.max_tokens", 5_000), ("evaluation.sample_tokens", 0),
            ("checkpoint.interval", _PRETRAINING),
        ],
    )  # fmt: skip


def _tuning(
    labelled: Path, judged: Path, steps: int, seed: int, changes: Mapping[str, Any]
) -> PretrainConfig:
    return settings.load(
        PretrainConfig,
        preset=PRESET,
        overrides=[
            ("data.texts", [str(labelled)]), ("data.held_out", str(judged)),
            ("steps", steps), ("seed", seed), ("optimizer.lr", 1e-3), ("schedule.warmup", 0.1), ("threads", 1),
            ("evaluation.interval", steps), ("evaluation.sample_tokens", 0), ("checkpoint.interval", steps),
            *changes.items(),
        ],
    )  # fmt: skip
