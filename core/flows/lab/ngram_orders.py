"""Orders of n-grams on natural text: how much each further character of history tells, and where it stops.

The text is the language reference that help() shows, of the Python that runs: the same for every seed, so there is one.
It repeats itself much, which n-grams profit from; so no bar says that networks are better here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from portlm.data.python_topics import python_topics
from portlm.flows.lab.experiment import Bar

_ORDERS = range(1, 9)
_MONOTONE = 6


class NGramOrders:
    """Kneser-Ney models of orders 1 to 8, with one discount and with three, on the characters of nine tenths."""

    name: ClassVar[str] = "ngram-orders"
    shows: ClassVar[str] = "Each further character of history makes a Kneser-Ney model better, up to six."
    source: ClassVar[str] = "Kneser and Ney, 1995; Chen and Goodman, 1998"
    seeds: ClassVar[tuple[int, ...]] = (0,)
    bars: ClassVar[tuple[Bar, ...]] = (
        Bar("least_gain", ">", 0.0),  # bits per character of each order up to 6 against the one before
        Bar("modified_gain", ">", 0.0),  # of three discounts against one, at the best order
    )

    def run(self, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
        """Measure bits per character of every order on the last tenth."""
        from portlm.train.kneser_ney import MODIFIED, PLAIN, estimate, make_model
        from portlm.train.ngram import scores
        from portlm.train.ngram_counts import count

        alphabet, text = np.unique(list(python_topics()), return_inverse=True)
        begin = len(text) * 9 // 10
        bits: dict[str, list[float]] = {PLAIN: [], MODIFIED: []}
        for order in _ORDERS:
            levels = list(count(text[:begin], len(alphabet), order))
            for smoothing, found in bits.items():
                model = make_model(levels, estimate(levels, smoothing))
                found.append(-float(scores(model, text, begin).mean()) / math.log(2))
                tell(f"{smoothing} of {order}: {found[-1]:.3f} bits per character")
        plain, modified = bits[PLAIN], bits[MODIFIED]
        return {
            "characters": len(text),
            "alphabet": len(alphabet),
            "plain": plain,
            "modified": modified,
            "least_gain": -max(float(np.diff(curve[:_MONOTONE]).max()) for curve in bits.values()),
            "modified_gain": min(plain) - min(modified),
        }

    def draw(self, results: Mapping[int, dict[str, Any]], path: Path) -> None:
        """Draw bits per character by the order."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for result in results.values():
            for name, label in (("plain", "Kneser-Ney"), ("modified", "modified Kneser-Ney")):
                axes.plot(_ORDERS, result[name], "o-", label=f"{label}: {min(result[name]):.3f}")
        axes.set_xlabel("order")
        axes.set_ylabel("bits per character")
        axes.legend()
        figure.savefig(path, dpi=120)
