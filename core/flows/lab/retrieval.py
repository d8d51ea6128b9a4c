"""Retrieval: to go on with what was read before, attention looks it up and a recurrent state must have kept it all.

Each row repeats a random block with a period of its own, which must be found out: with one period for all, positions
alone would do. What a model knows shows in the second and the third turn of the block, whose tokens were all read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from portlm.flows.lab.experiment import Bar
from portlm.flows.lab.fitting import Batch, accuracy, fit, fresh, mean_curve, named, parameters, seeded
from portlm.models import Config
from portlm.models.llama import LlamaConfig
from portlm.models.recurrent import RecurrentConfig

VOCAB, LENGTH = 32, 48
_PERIODS = (6, 20)
_STEPS = 1500
# Weights from N(0, 0.02²) are for a width of 1024 and more: products are as large at one of 32 from 0.11. From 0.02 the
# Transformer finds so late how to look up that 1500 steps end at 0.83 of the second turn.
_MODELS: dict[str, tuple[Config, float]] = {  # with the largest learning rate
    "transformer": (
        LlamaConfig(
            vocab_size=VOCAB,
            context_length=LENGTH,
            n_layer=2,
            n_head=4,
            n_kv_head=4,
            width=32,
            hidden=88,
            init_std=0.1,
        ),
        5e-3,
    ),
    "lstm": (
        RecurrentConfig(
            vocab_size=VOCAB, context_length=LENGTH, cell="lstm", n_layer=1, width=128, forget_bias=1.0
        ),
        5e-3,
    ),
}


def repeats(generator: np.random.Generator, rows: int) -> tuple[Tensor, Tensor]:
    """Return rows (B, T + 1) of blocks that repeat, and the turn of the block each token is in, from 0 on."""
    periods = generator.integers(_PERIODS[0], _PERIODS[1] + 1, (rows, 1))
    blocks = generator.integers(0, VOCAB, (rows, _PERIODS[1]))
    places = np.arange(LENGTH + 1)
    tokens = np.take_along_axis(blocks, places % periods, axis=1)
    return torch.from_numpy(tokens), torch.from_numpy(places // periods)


def _batches(generator: np.random.Generator) -> Iterator[Batch]:
    while True:
        tokens, _ = repeats(generator, 64)
        yield tokens[:, :-1], tokens[:, 1:]


class Retrieval:
    """A Transformer of two layers against an LSTM with five times its parameters."""

    name: ClassVar[str] = "retrieval"
    shows: ClassVar[str] = (
        "Attention repeats what it read once, where an LSTM with five times the parameters does not."
    )
    source: ClassVar[str] = "Vaswani et al., 2017; Olsson et al., 2022"
    seeds: ClassVar[tuple[int, ...]] = (0, 1, 2)
    bars: ClassVar[tuple[Bar, ...]] = (
        Bar("transformer_2nd", ">=", 0.85),
        Bar("lead_2nd", ">=", 0.15),
        Bar("share_of_parameters", "<=", 0.2),
    )

    def run(self, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
        """Measure how often the next token is right in each turn of the block, on 1000 rows that none has seen."""
        tokens, turns = repeats(seeded(seed, stream=1), 1000)
        inputs, sizes = tokens[:, :-1], {}
        figures: dict[str, Any] = {"curves": {}}
        for name, (config, lr) in _MODELS.items():
            model = fresh(config, seed)
            sizes[name] = parameters(model)
            losses = fit(
                model, _batches(seeded(seed)), _STEPS, lr=lr, warmup=100, tell=named(tell, name)
            )  # fmt: skip
            for turn, what in enumerate(("1st", "2nd", "3rd")):
                asked = torch.where(turns[:, 1:] == turn, tokens[:, 1:], -100)
                figures[f"{name}_{what}"] = accuracy(model, inputs, asked)
            figures["curves"][name] = mean_curve(losses)
        return figures | {
            "lead_2nd": figures["transformer_2nd"] - figures["lstm_2nd"],
            "share_of_parameters": sizes["transformer"] / sizes["lstm"],
            "parameters": sizes,
        }

    def draw(self, results: Mapping[int, dict[str, Any]], path: Path) -> None:
        """Draw the accuracy by turn."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        turns = ("1st", "2nd", "3rd")
        for number, name in enumerate(_MODELS):
            for place, result in enumerate(results.values()):
                label = f"{name}, {result['parameters'][name]:,} parameters" if place == 0 else None
                shares = [result[f"{name}_{turn}"] for turn in turns]
                axes.plot(turns, shares, "o-", color=f"C{number}", label=label)
        axes.axhline(1 / VOCAB, color="C7", linestyle="--", label="chance")
        axes.set_xlabel("turn of the block")
        axes.set_ylabel("next token right")
        axes.legend()
        figure.savefig(path, dpi=120)
