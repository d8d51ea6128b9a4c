"""Typed brackets: what n-grams, recurrent networks and attention reach of a language whose entropy is known.

Half of the tokens are one of eight fillers. The others open one of eight kinds of bracket, or close the innermost, each
with probability 1/2 where both are possible; at most four are open. A closing token follows from the opening one,
however many fillers lie between: a state of four kinds is all there is to remember, and an n-gram does not.
In the long run a token has 1 + log2(8)/2 + 2.25/2 = 3.625 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from portlm.flows.lab.counted import bits_of, counted
from portlm.flows.lab.experiment import Bar
from portlm.flows.lab.fitting import bits_per_token, fit, fresh, mean_curve, named, rows_of, seeded, windows
from portlm.models import Config
from portlm.models.gpt2 import GPT2Config
from portlm.models.recurrent import RecurrentConfig

KINDS = FILLERS = 8
VOCAB = 2 * KINDS + FILLERS  # ids: openers, closers, fillers
DEPTH = 4
_ORDERS = range(1, 7)
_LENGTH = 64
_STEPS = 900
_MODELS: dict[str, Config] = {
    "rnn": RecurrentConfig(vocab_size=VOCAB, context_length=_LENGTH, cell="rnn", n_layer=1, width=128),
    "gru": RecurrentConfig(vocab_size=VOCAB, context_length=_LENGTH, cell="gru", n_layer=1, width=96),
    "lstm": RecurrentConfig(
        vocab_size=VOCAB, context_length=_LENGTH, cell="lstm", n_layer=1, width=96, forget_bias=1.0
    ),
    "transformer": GPT2Config(vocab_size=VOCAB, context_length=_LENGTH, n_layer=2, n_head=4, width=64),
}


def brackets(generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a text (count,) and the bits of each of its tokens under what generates it, (count,)."""
    tokens, bits = np.empty(count, np.int64), np.empty(count)
    stack: list[int] = []
    draws = generator.random((count, 2))
    kinds = generator.integers(0, KINDS, count)
    for t in range(count):
        if draws[t, 0] < 0.5:
            tokens[t], bits[t] = 2 * KINDS + kinds[t], 1 + math.log2(FILLERS)
            continue
        choice = 0.0 if len(stack) in (0, DEPTH) else 1.0  # bits of whether to open
        if not stack or (len(stack) < DEPTH and draws[t, 1] < 0.5):
            stack.append(int(kinds[t]))
            tokens[t], bits[t] = kinds[t], 1 + choice + math.log2(KINDS)
        else:
            tokens[t], bits[t] = KINDS + stack.pop(), 1 + choice
    return tokens, bits


class Brackets:
    """Kneser-Ney models of orders 1 to 6 and four small networks, on 400 000 tokens."""

    name: ClassVar[str] = "brackets"
    shows: ClassVar[str] = (
        "Networks come near the entropy of nested brackets, where longer n-grams only get sparser."
    )
    source: ClassVar[str] = "Elman, 1990; Hochreiter and Schmidhuber, 1997; Vaswani et al., 2017"
    seeds: ClassVar[tuple[int, ...]] = (0, 1, 2)
    bars: ClassVar[tuple[Bar, ...]] = (
        Bar("worst_network_gain", ">=", 0.25),  # bits below the best n-gram model
        Bar("lstm_minus_gru", "<=", 0.02),
        Bar("gru_minus_rnn", "<=", 0.02),
        Bar("least_above_floor", ">=", -0.005),  # nothing knows more than the generator; its luck is shared
        Bar("kn6_minus_kn3", ">", 0.0),
    )

    def run(self, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
        """Measure bits per token of every model on 40 000 tokens that none has seen."""
        generator = seeded(seed)
        train, _ = brackets(generator, 400_000)
        test, true_bits = brackets(seeded(seed, stream=1), 40_000)
        inputs, targets = rows_of(test, _LENGTH)
        targets = targets.clone()
        targets[:, : _LENGTH // 2] = -100  # the first half of a row has less to go by
        asked = np.flatnonzero(targets.numpy().ravel() != -100) + 1  # places in the text
        floor = float(true_bits[asked].mean())
        figures: dict[str, Any] = {"floor": floor, "curves": {}}
        for order in _ORDERS:
            figures[f"kn{order}"] = float(bits_of(counted(train, order, VOCAB), test)[asked].mean())
        for name, config in _MODELS.items():
            tell(name)
            network = fresh(config, seed)
            losses = fit(
                network, windows(generator, train, 48, _LENGTH), _STEPS, lr=4e-3,
                tell=named(tell, name),
            )  # fmt: skip
            figures[name] = bits_per_token(network, inputs, targets)
            figures["curves"][name] = [value / math.log(2) for value in mean_curve(losses)]
        networks = [figures[name] for name in _MODELS]
        counts = [figures[f"kn{order}"] for order in _ORDERS]
        return figures | {
            "worst_network_gain": min(counts) - max(networks),
            "lstm_minus_gru": figures["lstm"] - figures["gru"],
            "gru_minus_rnn": figures["gru"] - figures["rnn"],
            "least_above_floor": min(networks + counts) - floor,
            "kn6_minus_kn3": figures["kn6"] - figures["kn3"],
        }

    def draw(self, results: Mapping[int, dict[str, Any]], path: Path) -> None:
        """Draw what n-gram models reach by their order, and the networks beside the entropy."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4), layout="constrained")
        counts, training = figure.subplots(1, 2, sharey=True)
        for place, result in enumerate(results.values()):
            bits = [result[f"kn{order}"] for order in _ORDERS]
            counts.plot(_ORDERS, bits, "o-", color="C7", label="Kneser-Ney" if place == 0 else None)
            for number, name in enumerate(_MODELS):
                curve = result["curves"][name]
                steps = np.linspace(0, _STEPS, len(curve))
                label = f"{name}: {result[name]:.3f}" if place == 0 else None
                training.plot(steps, curve, color=f"C{number}", linewidth=1, label=label)
        floor = float(np.mean([result["floor"] for result in results.values()]))
        for axes, what in ((counts, "order"), (training, "step")):
            axes.axhline(floor, color="black", linestyle="--", label=f"entropy {floor:.3f}")
            axes.set_xlabel(what)
            axes.legend()
        counts.set_ylabel("bits per token")
        counts.set_ylim(3.5, 5.0)
        figure.savefig(path, dpi=120)
