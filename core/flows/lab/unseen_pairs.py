"""Pairs that never met: an n-gram knows only what stood side by side, word vectors know what is alike.

Sixty names fall into six classes, and a relation leads from each class to one other. A sentence is "name relation name
end". For each name one of the four relations never occurs in training, though it does for names of the same class: what
follows the two is a guess for whoever counts, and follows from the class for whoever learned it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from portlm.flows.lab.counted import counted
from portlm.flows.lab.experiment import Bar
from portlm.flows.lab.fitting import fit, fresh, named, seeded, windows
from portlm.models import Config, Model
from portlm.models.nplm import NPLMConfig
from portlm.models.recurrent import RecurrentConfig

CLASSES, MEMBERS, RELATIONS = 6, 10, 4
NAMES = CLASSES * MEMBERS
END = NAMES + RELATIONS
VOCAB = END + 1
_SENTENCES, _STEPS, _LENGTH = 8000, 1500, 32
_MODELS: dict[str, tuple[Config, float]] = {  # with the largest learning rate; so narrow that names must share
    "nplm": (NPLMConfig(vocab_size=VOCAB, context_length=_LENGTH, order=5, width=8, hidden=32), 1e-2),
    "lstm": (
        RecurrentConfig(
            vocab_size=VOCAB, context_length=_LENGTH, cell="lstm", n_layer=1, width=32, init_range=0.2,
            forget_bias=1.0,
        ),
        2e-2,
    ),
}  # fmt: skip


class Facts:
    """A world of names and relations.

    Args:
        generator: Draws which class each relation leads to, and which relation each name lacks.
    """

    def __init__(self, generator: np.random.Generator):
        self.leads = np.stack([generator.permutation(CLASSES) for _ in range(RELATIONS)])  # (R, classes)
        self.lacks = generator.integers(0, RELATIONS, NAMES)

    def text(self, generator: np.random.Generator, sentences: int) -> np.ndarray:
        """Return that many sentences, (4 sentences,), none with what a name lacks."""
        first = generator.integers(0, NAMES, sentences)
        relation = (self.lacks[first] + generator.integers(1, RELATIONS, sentences)) % RELATIONS
        second = self.leads[relation, first // MEMBERS] * MEMBERS + generator.integers(0, MEMBERS, sentences)
        return np.stack([first, NAMES + relation, second, np.full(sentences, END)], axis=1).ravel()

    def questions(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the pairs that never met behind the end of a sentence, (names, 3), and the class that must follow."""
        names = np.arange(NAMES)
        asked = np.stack([np.full(NAMES, END), names, NAMES + self.lacks], axis=1)
        return asked, self.leads[self.lacks, names // MEMBERS]


def _right(probabilities: np.ndarray, classes: np.ndarray) -> float:
    """The mean probability of the class that must follow, of distributions (names, V)."""
    of_class = probabilities[:, :NAMES].reshape(len(probabilities), CLASSES, MEMBERS).sum(2)
    return float(of_class[np.arange(len(classes)), classes].mean())


@torch.no_grad()
def _ask(model: Model, questions: np.ndarray) -> np.ndarray:
    return model(torch.from_numpy(questions))[:, -1].softmax(-1).numpy()


class UnseenPairs:
    """A Kneser-Ney model of order 5 against two networks, on pairs that never stood side by side."""

    name: ClassVar[str] = "unseen-pairs"
    shows: ClassVar[str] = (
        "Word vectors carry what is known of one word to words that are alike, and n-grams cannot."
    )
    source: ClassVar[str] = "Bengio et al., 2003"
    seeds: ClassVar[tuple[int, ...]] = (0, 1, 2)
    bars: ClassVar[tuple[Bar, ...]] = (
        Bar("kn5", "<=", 1 / CLASSES + 0.08),  # chance is 1/6, and what follows a relation is nearly even
        Bar("nplm_lead", ">=", 0.30),
        Bar("lstm_lead", ">=", 0.30),
    )

    def run(self, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
        """Measure the probability of the right class behind each pair that never met."""
        generator = seeded(seed)
        facts = Facts(generator)
        text = facts.text(generator, _SENTENCES)
        questions, classes = facts.questions()
        # Its order asks for four tokens of history, and a sentence is over before it: another fact's last name.
        histories = np.concatenate([text[2 : 4 * NAMES : 4, None], questions], axis=1)
        figures: dict[str, Any] = {"kn5": _right(_ask(counted(text, 5, VOCAB), histories), classes)}
        for name, (config, lr) in _MODELS.items():
            model = fresh(config, seed)
            fit(
                model, windows(generator, text, 32, _LENGTH), _STEPS, lr=lr, weight_decay=0.3,
                tell=named(tell, name),
            )  # fmt: skip
            figures[name] = _right(_ask(model, questions), classes)
            figures[f"{name}_lead"] = figures[name] - figures["kn5"]
        return figures

    def draw(self, results: Mapping[int, dict[str, Any]], path: Path) -> None:
        """Draw the probability of the right class by model."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 4), layout="constrained")
        axes = figure.subplots()
        models = ("kn5", *_MODELS)
        for place, (seed, result) in enumerate(results.items()):
            at = np.arange(len(models)) + 0.8 * place / len(results)
            axes.bar(at, [result[name] for name in models], 0.8 / len(results), label=f"seed {seed}")
        axes.set_xticks(np.arange(len(models)) + 0.3, models)
        axes.axhline(1 / CLASSES, color="black", linestyle="--", label="chance")
        axes.set_ylabel("probability of the right class")
        axes.legend()
        figure.savefig(path, dpi=120)
