"""A cloze needs both sides: what an opening bracket was says its closing one, which only a masked model sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from portlm.flows.lab.bracket_rows import KINDS, VOCAB, walk
from portlm.flows.lab.experiment import Bar
from portlm.flows.lab.fitting import Batch, fit, fresh, mean_curve, named, seeded
from portlm.models.bert import BertConfig
from portlm.models.gpt2 import GPT2Config
from portlm.train.evaluation import evaluating
from portlm.train.objectives.masked import hide

MASK = VOCAB
_LENGTH = 16
_STEPS = {"masked": 1500, "causal": 600}
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB + 1, "context_length": _LENGTH, "n_layer": 3, "n_head": 4, "width": 64
}  # fmt: skip


def texts(generator: np.random.Generator, rows: int) -> np.ndarray:
    """Return rows (B, T) of brackets."""
    return np.array([walk(generator, _LENGTH)[0] for _ in range(rows)], np.int64)


def closed_openers(text: np.ndarray) -> list[int]:
    """Return the places of opening brackets whose closing one is in the text as well."""
    stack, found = list[int](), list[int]()
    for place, token in enumerate(text.tolist()):
        if token < KINDS:
            stack.append(place)
        elif token < 2 * KINDS:
            found.append(stack.pop())
    return found


class Cloze:
    """A BERT that learns hidden tokens and a GPT-2 that learns the next one, of one size and on one language."""

    name: ClassVar[str] = "cloze-needs-both-sides"
    shows: ClassVar[str] = (
        "A masked model says what an opening bracket was from the one that closes it; a causal one can only guess."
    )
    source: ClassVar[str] = "Devlin et al., 2018"
    seeds: ClassVar[tuple[int, ...]] = (0, 1, 2)
    bars: ClassVar[tuple[Bar, ...]] = (Bar("masked", ">=", 0.70), Bar("causal", "<=", 0.20))

    def run(self, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
        """Measure how often each says the kind of an opening bracket, of eight, in 500 texts."""
        generator = seeded(seed)
        pool = texts(generator, 12_000)

        def some(rows: int) -> np.ndarray:
            return pool[generator.integers(0, len(pool), rows)]

        def hidden() -> Iterator[Batch]:
            for step in range(_STEPS["masked"]):
                read, said = hide(some(48), seed, step, VOCAB, MASK)
                yield torch.from_numpy(read), torch.from_numpy(said)

        def following() -> Iterator[Batch]:
            while True:
                rows = torch.from_numpy(some(48))
                yield rows[:, :-1], rows[:, 1:]

        encoder = fresh(BertConfig(hidden=256, heads=("masked_lm",), **_SHAPE), seed)
        decoder = fresh(GPT2Config(**_SHAPE), seed)
        curves = {}
        for kind, model, batches in (("masked", encoder, hidden()), ("causal", decoder, following())):
            losses = fit(model, batches, _STEPS[kind], lr=3e-3, tell=named(tell, kind))
            curves[kind] = mean_curve(losses)
        judged = texts(seeded(seed, stream=1), 500)
        places = [(row, place) for row, text in enumerate(judged) for place in closed_openers(text) if place]
        rows, at = (torch.tensor(part) for part in zip(*places, strict=True))
        wanted = torch.from_numpy(judged)[rows, at]
        blank = torch.from_numpy(judged)[rows]
        blank[torch.arange(len(rows)), at] = MASK
        each = torch.arange(256)
        right = {"masked": 0, "causal": 0}
        with evaluating(encoder), evaluating(decoder), torch.no_grad():
            for begin in range(0, len(rows), 256):
                part = slice(begin, begin + 256)
                here = each[: len(wanted[part])]
                for kind, model, place in (("masked", encoder, at[part]), ("causal", decoder, at[part] - 1)):
                    said = model(blank[part])[here, place, :KINDS].argmax(-1)
                    right[kind] += int((said == wanted[part]).sum())
        return {kind: count / len(rows) for kind, count in right.items()} | {
            "asked": len(rows),
            "curves": curves,
        }

    def draw(self, results: Mapping[int, dict[str, Any]], path: Path) -> None:
        """Draw the share that each model says, by seed."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for number, kind in enumerate(("masked", "causal")):
            shares = [result[kind] for result in results.values()]
            axes.bar(np.arange(len(shares)) + 0.4 * number, shares, 0.4, label=kind)
        axes.axhline(1 / KINDS, color="black", linestyle="--", label="chance")
        axes.set_xticks(np.arange(len(results)) + 0.2, [f"seed {seed}" for seed in results])
        axes.set_ylabel("kind of an opening bracket said")
        axes.legend()
        figure.savefig(path, dpi=120)
