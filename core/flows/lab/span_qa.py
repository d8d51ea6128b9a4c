"""Questions about facts: an encoder that learned hidden words finds answers with few labels, a fresh one finds fewer.

A fact is an entity, a relation, one to three values and a dot: ``e7 rB B03 B21 .`` says what B of e7 is. Each relation
has values of its own, as years answer "when" and towns "where". A text is twelve facts, one of each relation, in any
order; texts without questions teach which words are values of what. A question is an entity and a relation, and the
answer the values of that fact. What has to be learned from labels is that a question wants the values of its relation;
which words those are, hundreds of them, 500 labels show a fresh encoder two or three times each.

All of it runs through ``portlm pretrain --objective masked`` and ``portlm finetune --objective answer``.
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

_RELATIONS, _ENTITIES, _VALUES, _LONGEST = 12, 16, 24, 3  # values of each relation; of a fact, at most
_TEXTS = 5000  # without questions
_LABELS, _JUDGED = 500, 400
_PRETRAINING, _STEPS = 800, 400
_SHAPE = {"family": "bert", "n_layer": 2, "n_head": 4, "width": 64, "context_length": 80}
# [UNK], the dot, and all others, each of which a text for pretraining has
_WORDS = 2 + _ENTITIES + _RELATIONS * (1 + _VALUES)


def facts(generator: np.random.Generator) -> list[tuple[str, str]]:
    """Return the facts of a text: the question that each answers, and its values."""
    found = []
    for number in generator.permutation(_RELATIONS).tolist():
        name, count = chr(ord("A") + number), int(generator.integers(1, _LONGEST + 1))
        values = (f"{name}{value:02}" for value in generator.integers(0, _VALUES, count).tolist())
        found.append((f"e{generator.integers(_ENTITIES)} r{name}", " ".join(values)))
    return found


def text_of(said: list[tuple[str, str]]) -> str:
    """Return facts as a text."""
    return " ".join(f"{key} {values} ." for key, values in said)


def question(generator: np.random.Generator) -> dict[str, Any]:
    """Return a question with its text, the answer and the character at which that starts."""
    said = facts(generator)
    place = int(generator.integers(_RELATIONS))
    key, values = said[place]
    start = len(text_of(said[:place])) + bool(place) + len(key) + 1
    return {"question": key, "text": text_of(said), "answer": values, "start": start}


class SpanQA:
    """A BERT of two layers that finds answers: pretrained on hidden words, and from scratch, with 500 labels."""

    name: ClassVar[str] = "span-qa"
    shows: ClassVar[str] = (
        "An encoder pretrained on hidden words finds answers after a few hundred labels that a fresh one misses."
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
            text.write_text("".join(f"{text_of(facts(generator))}\n" for _ in range(_TEXTS)))
            files = {}
            for kind, count in (("labelled", _LABELS), ("judged", _JUDGED)):
                files[kind] = folder / f"{kind}.jsonl"
                files[kind].write_text("\n".join(json.dumps(question(generator)) for _ in range(count)))
            tell(f"pretraining, {_PRETRAINING} steps")
            begun = pretrain(_pretraining(text, seed), folder / "begun", quiet=True, plot=False)
            found["pretraining_loss"] = begun.loss
            ways: dict[str, dict[str, Any]] = {
                "pretrained": {"init": str(begun.checkpoint)},
                "scratch": {"model." + key: value for key, value in _SHAPE.items()}
                | {"data.tokenizer": str(begun.checkpoint / "tokenizer.json")},
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
        axes.axhline(1 / _RELATIONS, color="black", linestyle="--", label="a guess among the facts")
        axes.set_xticks(np.arange(len(results)) + 0.2, [f"seed {seed}" for seed in results])
        axes.set_ylabel(f"answers found, {_LABELS} labels")
        axes.legend()
        figure.savefig(path, dpi=120)


def _pretraining(text: Path, seed: int) -> PretrainConfig:
    return settings.load(
        PretrainConfig,
        overrides=[
            *(("model." + key, value) for key, value in _SHAPE.items()), ("objective", "masked"),
            ("data.texts", [str(text)]), ("data.tokenizer", f"word:{_WORDS}"), ("data.batch_size", 32),
            ("data.validation_fraction", 0.02),
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
