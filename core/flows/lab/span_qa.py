"""Questions about facts: an encoder that learned hidden tokens finds answers with few labels, a fresh one does not.

A fact is an entity, a relation, one to three values, and a dot, one letter each: ``kB7QX.`` says what B of k is. A text
for pretraining goes on without end and states each fact twice, the second time soon after the first, so that a hidden
letter can often be looked up elsewhere. A question is an entity and a relation, its text twelve facts, and the answer
the values of the one that is asked for, in a text that says it once: what has to be learned from labels is that this is
wanted. All of it runs through ``portlm pretrain``'s masked objective and ``portlm finetune --objective answer``.
"""

from __future__ import annotations

import json
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

_ENTITIES, _RELATIONS, _VALUES = "abcdefghijklmnopqrst", "ABCD", "0123456789EFGHIJKLMNOPQR"
_FACTS, _LONGEST = 12, 3  # of a text; values of a fact
_STATED = 60_000  # facts of the text for pretraining, each twice
_LABELS, _JUDGED = 500, 400
_PRETRAINING, _STEPS = 2000, 400
_SHAPE = {"family": "bert", "n_layer": 2, "n_head": 4, "width": 64, "context_length": 84}


class Fact:
    """A key, which is an entity and a relation, and its values."""

    def __init__(self, generator: np.random.Generator, key: int):
        self.key = _ENTITIES[key // len(_RELATIONS)] + _RELATIONS[key % len(_RELATIONS)]
        count = int(generator.integers(1, _LONGEST + 1))
        self.values = "".join(_VALUES[i] for i in generator.integers(0, len(_VALUES), count))

    def __str__(self) -> str:
        return f"{self.key}{self.values}."


_KEYS = len(_ENTITIES) * len(_RELATIONS)


def stream(generator: np.random.Generator, count: int) -> str:
    """Return a text that states so many facts twice each, and none with the same key between."""
    waiting: list[tuple[int, Fact]] = []
    said = []
    while count or waiting:
        if count and (len(waiting) < _FACTS // 2 or generator.random() < 0.5):
            taken = {key for key, _ in waiting}
            key = next(key for key in generator.permutation(_KEYS).tolist() if key not in taken)
            fact, count = Fact(generator, key), count - 1
            waiting.append((key, fact))
        else:
            _, fact = waiting.pop(int(generator.integers(min(len(waiting), _FACTS // 2))))
        said.append(str(fact))
    return "".join(said)


def question(generator: np.random.Generator) -> dict[str, Any]:
    """Return a question, its text of facts with keys of their own, and the answer with where it starts."""
    facts = [Fact(generator, key) for key in generator.choice(_KEYS, _FACTS, replace=False).tolist()]
    place = int(generator.integers(_FACTS))
    start = sum(len(str(fact)) for fact in facts[:place]) + 2
    text, asked = "".join(map(str, facts)), facts[place]
    return {"question": asked.key, "text": text, "answer": asked.values, "start": start}


class SpanQA:
    """A BERT of two layers that finds answers: pretrained on hidden tokens, and from scratch, with 500 labels."""

    name: ClassVar[str] = "span-qa"
    shows: ClassVar[str] = (
        "An encoder that was pretrained on hidden tokens finds answers with a few hundred labels, a fresh one does not."
    )
    source: ClassVar[str] = "Devlin et al., 2018"
    seeds: ClassVar[tuple[int, ...]] = (0, 1, 2)
    bars: ClassVar[tuple[Bar, ...]] = (
        Bar("pretrained", ">=", 0.90),
        Bar("pretrained_over_scratch", ">=", 0.05),
    )

    def run(self, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
        """Pretrain, and measure the share of 400 answers that each way finds without a fault."""
        generator = np.random.default_rng((seed, 14))
        found: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            text = folder / "facts.txt"
            text.write_text(stream(generator, _STATED))
            files = {}
            for kind, count in (("labelled", _LABELS), ("judged", _JUDGED)):
                files[kind] = folder / f"{kind}.jsonl"
                files[kind].write_text("\n".join(json.dumps(question(generator)) for _ in range(count)))
            tell(f"pretraining, {_PRETRAINING} steps")
            begun = pretrain(_pretraining(text, seed), folder / "begun", quiet=True, plot=False)
            found["pretraining_loss"] = begun.loss
            ways: dict[str, dict[str, Any]] = {
                "pretrained": {"init": str(begun.checkpoint)},
                "scratch": {"model." + key: value for key, value in _SHAPE.items()},
            }
            for way, given in ways.items():
                tell(f"{way}, {_LABELS} labels")
                config = _tuning(files, seed, given)
                done = finetune(config, folder / way, quiet=True, plot=False)
                found[way] = done.accuracy
                tell(f"{way}: {done.accuracy:.3f} of the answers")
        found["pretrained_over_scratch"] = found["pretrained"] - found["scratch"]
        return found

    def draw(self, results: Mapping[int, dict[str, Any]], path: Path) -> None:
        """Draw the share of answers that each way finds, by seed."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for number, way in enumerate(("pretrained", "scratch")):
            shares = [result[way] for result in results.values()]
            axes.bar(np.arange(len(shares)) + 0.4 * number, shares, 0.4, label=way)
        axes.axhline(1 / _FACTS, color="black", linestyle="--", label="a guess among the facts")
        axes.set_xticks(np.arange(len(results)) + 0.2, [f"seed {seed}" for seed in results])
        axes.set_ylabel(f"answers found, {_LABELS} labels")
        axes.legend()
        figure.savefig(path, dpi=120)


def _pretraining(text: Path, seed: int) -> PretrainConfig:
    return settings.load(
        PretrainConfig,
        overrides=[
            *(("model." + key, value) for key, value in _SHAPE.items()), ("objective", "masked"),
            ("data.texts", [str(text)]), ("data.batch_size", 32), ("data.validation_fraction", 0.02),
            ("steps", _PRETRAINING), ("seed", seed), ("optimizer.lr", 2e-3), ("optimizer.weight_decay", 0.01),
            ("threads", 1), ("evaluation.interval", _PRETRAINING), ("evaluation.max_tokens", 5_000),
            ("evaluation.sample_tokens", 0), ("checkpoint.interval", _PRETRAINING),
        ],
    )  # fmt: skip


def _tuning(files: Mapping[str, Path], seed: int, given: Mapping[str, Any]) -> PretrainConfig:
    return settings.load(
        PretrainConfig,
        preset=PRESET,
        overrides=[
            ("objective", "answer"), ("data.texts", [str(files["labelled"])]),
            ("data.held_out", str(files["judged"])), ("steps", _STEPS), ("seed", seed), ("optimizer.lr", 1e-3),
            ("schedule.warmup", 0.1), ("threads", 1), ("evaluation.interval", _STEPS),
            ("evaluation.sample_tokens", 0), ("checkpoint.interval", _STEPS), *given.items(),
        ],
    )  # fmt: skip
