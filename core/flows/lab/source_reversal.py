"""Reading a source from its end: what Sutskever et al. found to help an encoder-decoder without attention.

The task is to copy a string. In its own order, every symbol is as far from its copy as the string is long. Read from
its end, the average distance is the same, but the first symbols are near to their copies: short dependencies, from
which training finds its way to the long ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from portlm.flows.lab.alignment import END, START, VOCABULARY, batches, exact, pairs
from portlm.flows.lab.experiment import Bar
from portlm.flows.lab.fitting import fit, fresh, mean_curve, seeded
from portlm.models.seq2seq import Seq2SeqConfig

_SHORTEST, _LONGEST = 4, 12
_STEPS, _ROWS = 400, 64
_JUDGED = 400


class SourceReversal:
    """The same LSTM encoder-decoder, which reads its sources in either order, learns to copy strings."""

    name: ClassVar[str] = "source-reversal"
    shows: ClassVar[str] = (
        "An encoder-decoder without attention learns faster if it reads its source from the end."
    )
    source: ClassVar[str] = "Sutskever, Vinyals and Le, 2014"
    seeds: ClassVar[tuple[int, ...]] = (0, 1, 2)
    bars: ClassVar[tuple[Bar, ...]] = (Bar("gain", ">", 0.0),)

    def run(self, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
        """Train both, and measure their loss on strings that were not learned from."""
        found: dict[str, Any] = {"curves": {}}
        rng = seeded(seed, 1)
        held_out = pairs(rng, rng.integers(_SHORTEST, _LONGEST + 1, _JUDGED), reverse=False)
        short = pairs(rng, np.full(_JUDGED, _SHORTEST), reverse=False)
        for name, reverse in (("reversed", True), ("forward", False)):
            config = Seq2SeqConfig(
                vocab_size=VOCABULARY, context_length=32, n_layer=1, width=96, bias=True, reverse_source=reverse,
                decoder_start_token_id=START, eos_token_ids=(END,),
            )  # fmt: skip
            model: Any = fresh(config, seed)
            data = batches(seeded(seed), _ROWS, _SHORTEST, _LONGEST, reverse=False)
            losses = fit(
                model,
                data,
                _STEPS,
                weight_decay=0.0,
                tell=tell,
            )
            found["curves"][name] = mean_curve(losses)
            with torch.no_grad():
                found[f"loss_{name}"] = float(model(*held_out))
            found[f"exact_4_{name}"] = exact(model, short)
            tell(f"{name}: held-out loss {found[f'loss_{name}']:.4f}")
        found["gain"] = found["loss_forward"] - found["loss_reversed"]
        return found

    def draw(self, results: Mapping[int, dict[str, Any]], path: Path) -> None:
        """Draw the losses of training."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for place, result in enumerate(results.values()):
            for number, (name, curve) in enumerate(result["curves"].items()):
                steps = np.linspace(0, _STEPS, len(curve))
                label = None if place else f"source {name}"
                axes.plot(steps, curve, color=f"C{number}", label=label)
        axes.set_xlabel("steps")
        axes.set_ylabel("training loss (nats)")
        axes.legend()
        figure.savefig(path, dpi=120)
