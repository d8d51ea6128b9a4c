"""Four ways to learn to fill in, each on its own task: prefix LM, span corruption, MASS and text infilling.

What is hidden is a run of closing brackets, since nothing else in the language follows from the rest. How it is hidden
and how it is asked for is that of the objective: behind a source that is read from both sides; as a sentinel; as a
fragment of masks whose places a decoder keeps; as one mask in a text that is said as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from portlm.data.batches import IGNORE
from portlm.data.pairs import padded
from portlm.data.spans import corrupted
from portlm.flows.lab.bracket_rows import VOCAB, Row, row
from portlm.flows.lab.experiment import Bar
from portlm.flows.lab.fitting import fit, fresh, mean_curve, named, seeded
from portlm.models.bart import BartConfig
from portlm.models.t5 import T5Config
from portlm.models.unilm import UniLMConfig
from portlm.train.evaluation import evaluating

CLS, SEP, MASK, SENTINEL = range(VOCAB, VOCAB + 4)
LAST = VOCAB + 4  # the sentinel behind the last span
_IDS = VOCAB + 5
_STEPS = 900
_ASKED = 400
_SHAPE: dict[str, Any] = {"vocab_size": _IDS, "context_length": 24, "n_layer": 2, "n_head": 4, "width": 64}
_TWO: dict[str, Any] = {**_SHAPE, "n_decoder_layer": 2, "hidden": 256, "decoder_start_token_id": SEP}
# BERT and BART begin with N(0, 0.02²), for a width of 1024: products are as large here with 0.02 * sqrt(1024 / 64).
# From 0.02 and with this learning rate MASS is still at a guess, ln 8, after 900 steps; with a third of it, it is not.
_INIT = 0.08


Asked = tuple[list[int], list[int], list[int]]  # what is read, what the decoder reads, what it says


def prefix(text: Row) -> Asked:
    """Return a source and what closes it; the rest of the text is not asked."""
    return [CLS, *text.before], [SEP, *text.run], [*text.run, SEP]


def span(text: Row) -> Asked:
    """Return a text with a sentinel, and the sentinel with what it stands for; T5's."""
    tokens = np.array([*text.before, *text.run, *text.after])
    places = np.arange(len(tokens)) - len(text.before)
    noise = (places >= 0) & (places < len(text.run))
    source, said = corrupted(tokens, noise, SENTINEL, SEP, last=False)
    return source.tolist(), [SEP, *said[:-1].tolist()], said.tolist()


def mass(text: Row) -> Asked:
    """Return a text with masks, and at the places of these what was there, read one token late; MASS's."""
    k, rest = len(text.run), [MASK] * len(text.after)
    source = [CLS, *text.before, *[MASK] * k, *text.after, SEP]
    read = [*[MASK] * (len(text.before) + 1), *text.run[:-1], *rest]
    said = [*[IGNORE] * len(text.before), *text.run, *[IGNORE] * len(text.after)]
    return source, read, said


def infilling(text: Row) -> Asked:
    """Return a text with one mask for the run, and all of the text; BART's."""
    whole = [*text.before, *text.run, *text.after]
    return [CLS, *text.before, MASK, *text.after, SEP], [SEP, *whole], [*whole, SEP]


TASKS: dict[str, tuple[Callable[[Row], Asked], Any]] = {
    "prefix": (prefix, UniLMConfig(
        hidden=256, decoder_start_token_id=SEP, mask_token_id=MASK, eos_token_ids=(SEP,), init_std=_INIT, **_SHAPE,
    )),
    "span": (span, T5Config(head_dim=16, **_TWO)),
    "mass": (mass, BartConfig(init_std=_INIT, **_TWO)),
    "infilling": (infilling, BartConfig(init_std=_INIT, **_TWO)),
}  # fmt: skip


def _tensors(asked: Sequence[Asked]) -> tuple[Tensor, ...]:
    sources, read, said = zip(*asked, strict=True)
    source = padded(sources, SEP)
    mask = (np.arange(source.shape[1]) < np.array([len(part) for part in sources])[:, None]).astype(np.int64)
    arrays = source, mask, padded(read, SEP), padded(said, IGNORE)
    return tuple(torch.from_numpy(array) for array in arrays)


def _logits(model: Any, source: Tensor, mask: Tensor, read: Tensor) -> Tensor:
    found: Tensor = (
        model.write(source, read, mask) if hasattr(model, "write") else model(source, read, None, mask)
    )
    return found


def filled(model: Any, asked: Sequence[Asked]) -> float:
    """Return in how many texts a decoder writes exactly what it should, each token behind its own earlier ones."""
    source, mask, read, said = _tensors(asked)
    read = read.clone()
    wanted = said != IGNORE
    with evaluating(model), torch.no_grad():
        for t in range(read.shape[1]):
            best = _logits(model, source, mask, read[:, : t + 1])[:, -1].argmax(-1)
            said_now = torch.where(wanted[:, t], best, said[:, t])
            if t + 1 < read.shape[1]:  # what it wrote is what it reads next, where the decoder reads the run
                behind = wanted[:, t] & (read[:, t + 1] == said[:, t])
                read[:, t + 1] = torch.where(behind, best, read[:, t + 1])
            wanted[:, t] &= said_now != said[:, t]
    return float((~wanted.any(1)).float().mean())


class Objectives:
    """A model for each objective, all of width 64, and the share of held-out runs that each fills exactly."""

    name: ClassVar[str] = "objectives"
    shows: ClassVar[str] = "Prefix LM, span corruption, MASS and infilling all learn to fill a hidden span."
    source: ClassVar[str] = "Dong et al., 2019; Raffel et al., 2019; Song et al., 2019; Lewis et al., 2019"
    seeds: ClassVar[tuple[int, ...]] = (0, 1, 2)
    bars: ClassVar[tuple[Bar, ...]] = tuple(Bar(name, ">=", 0.6) for name in TASKS)

    def run(self, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
        """Measure exact matches, greedily, on texts that were not learned from."""
        figures: dict[str, Any] = {"curves": {}}
        judged = [row(generator) for generator in [seeded(seed, stream=1)] for _ in range(_ASKED)]
        for name, (task, config) in TASKS.items():
            generator = seeded(seed)

            def batches(task: Any = task, generator: Any = generator) -> Iterator[tuple[Tensor, ...]]:
                while True:
                    yield _tensors([task(row(generator)) for _ in range(48)])

            model: Any = fresh(config, seed)

            def loss(batch: tuple[Tensor, ...], model: Any = model) -> Tensor:
                source, mask, read, said = batch
                logits = _logits(model, source, mask, read)
                return torch.nn.functional.cross_entropy(logits.flatten(0, 1), said.flatten())

            losses = fit(
                model, batches(), _STEPS, lr=3e-3, loss=loss, tell=named(tell, name)
            )  # fmt: skip
            figures[name] = filled(model, [task(text) for text in judged])
            figures["curves"][name] = mean_curve(losses)
            tell(f"{name}: {figures[name]:.3f} filled exactly")
        return figures

    def draw(self, results: Mapping[int, dict[str, Any]], path: Path) -> None:
        """Draw the share of runs that each objective fills, by seed."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        width = 0.8 / len(results)
        for number, (seed, result) in enumerate(results.items()):
            shares = [result[name] for name in TASKS]
            axes.bar(np.arange(len(shares)) + width * number, shares, width, label=f"seed {seed}")
        axes.axhline(0.6, color="black", linestyle="--", label="bar")
        axes.set_xticks(np.arange(len(TASKS)) + 0.4 - width / 2, list(TASKS))
        axes.set_ylabel("hidden spans filled exactly")
        axes.legend()
        figure.savefig(path, dpi=120)
