"""A recurrent layer in front of attention: a state for what nests, and looking back for what was read once.

Half of the texts are brackets, which a state follows (core/flows/lab/brackets.py), half are blocks that repeat with a
period of their own, which attention looks up (core/flows/lab/retrieval.py). An LSTM, a Transformer and an LSTM layer
with one layer of attention behind it learn both, with as many parameters and steps. Looking a block up takes a
Transformer two layers, one of them to know what came before each token; a state knows that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from portlm.flows.lab import brackets, retrieval
from portlm.flows.lab.experiment import Bar
from portlm.flows.lab.fitting import Batch, bits_per_token, fit, fresh, mean_curve, named, parameters, seeded
from portlm.flows.lab.parallel_depth import training_seconds
from portlm.models.llama import Llama, LlamaConfig
from portlm.models.recurrent import CellLayer, RecurrentConfig

_LENGTH = retrieval.LENGTH
_VOCAB = brackets.VOCAB + retrieval.VOCAB  # the ids of repeating blocks follow those of brackets
_STEPS, _ROWS = 700, 64
_JUDGED = 500  # rows of each kind
_LONG, _LONG_ROWS = 512, 4  # of the speed that is told
_SIZES: dict[str, Any] = {"vocab_size": _VOCAB, "context_length": _LONG}


class Hybrid(Llama):
    """A LLaMA whose blocks read the sum of the embedding and of what an LSTM makes of it."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.before = CellLayer("lstm", config.width, config.width)
        for p in self.before.parameters():
            nn.init.uniform_(p, -0.1, 0.1)

    def embed(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        """Return what enters the first block, (B, T, C), for ids (B, T)."""
        x = super().embed(input_ids, position_ids)
        nothing = x.new_zeros(len(x), x.shape[2])
        y, _ = self.before(x, (nothing, nothing), None)
        return x + y


def _llama(n_layer: int, width: int, hidden: int) -> LlamaConfig:
    return LlamaConfig(**_SIZES, n_layer=n_layer, n_head=4, n_kv_head=4, width=width, hidden=hidden)


_MODELS: dict[str, Callable[[int], Any]] = {  # of a seed, each with about 60 000 parameters
    "lstm": lambda seed: fresh(
        RecurrentConfig(**_SIZES, cell="lstm", n_layer=1, width=80, forget_bias=1.0), seed
    ),
    "transformer": lambda seed: fresh(_llama(2, 48, 128), seed),
    "hybrid": lambda seed: _hybrid(seed),
}


def _hybrid(seed: int) -> Hybrid:
    torch.manual_seed(seed)
    return Hybrid(_llama(1, 56, 96))


def rows_of_brackets(generator: np.random.Generator, rows: int) -> Batch:
    """Return rows of brackets, inputs and targets (B, T), cut from one text."""
    text, _ = brackets.brackets(generator, rows * (_LENGTH + 1))
    tokens = torch.from_numpy(text).view(rows, _LENGTH + 1)
    return tokens[:, :-1], tokens[:, 1:]


def rows_of_repeats(generator: np.random.Generator, rows: int) -> Batch:
    """Return rows of repeating blocks, inputs and targets (B, T)."""
    tokens, _ = retrieval.repeats(generator, rows)
    tokens = tokens + brackets.VOCAB
    return tokens[:, :-1], tokens[:, 1:]


def _batches(generator: np.random.Generator) -> Iterator[Batch]:
    while True:
        nested, repeated = (make(generator, _ROWS // 2) for make in (rows_of_brackets, rows_of_repeats))
        yield torch.cat((nested[0], repeated[0])), torch.cat((nested[1], repeated[1]))


class Hybrids:
    """An LSTM, a LLaMA of two layers, and an LSTM layer under one layer of LLaMA, on two languages at once."""

    name: ClassVar[str] = "hybrid"
    shows: ClassVar[str] = (
        "A recurrent layer under attention learns what nests and what repeats better than either alone."
    )
    source: ClassVar[str] = "Hao et al., Modeling Recurrence for Transformer, 2019"
    seeds: ClassVar[tuple[int, ...]] = (0, 1, 2)
    bars: ClassVar[tuple[Bar, ...]] = (
        Bar("lead_over_lstm", ">=", 1.0),  # bits per token, both languages together
        Bar("lead_over_transformer", ">=", 0.4),
        Bar("largest_size_over_smallest", "<=", 1.1),
    )

    def run(self, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
        """Measure bits per token on 500 rows of each language that none has seen, and the speed of training."""
        figures: dict[str, Any] = {
            what: {} for what in ("brackets", "repeats", "both", "parameters", "tokens_per_second", "curves")
        }
        judged = seeded(seed, stream=1)
        held_out = {
            "brackets": rows_of_brackets(judged, _JUDGED), "repeats": rows_of_repeats(judged, _JUDGED)
        }  # fmt: skip
        for name, make in _MODELS.items():
            model = make(seed)
            figures["parameters"][name] = parameters(model)
            losses = fit(
                model, _batches(seeded(seed)), _STEPS, lr=5e-3, warmup=50, tell=named(tell, name)
            )  # fmt: skip
            for kind, rows in held_out.items():
                figures[kind][name] = bits_per_token(model, *rows)
            figures["both"][name] = (figures["brackets"][name] + figures["repeats"][name]) / 2
            ids = torch.from_numpy(judged.integers(0, _VOCAB, (_LONG_ROWS, _LONG)))
            figures["tokens_per_second"][name] = ids.numel() / training_seconds(model, ids)
            figures["curves"][name] = mean_curve(losses)
        both, sizes = figures["both"], figures["parameters"].values()
        return figures | {
            "lead_over_lstm": both["lstm"] - both["hybrid"],
            "lead_over_transformer": both["transformer"] - both["hybrid"],
            "largest_size_over_smallest": max(sizes) / min(sizes),
        }

    def draw(self, results: Mapping[int, dict[str, Any]], path: Path) -> None:
        """Draw bits per token by language, and how fast each trains on long rows."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4), layout="constrained")
        bits, speed = figure.subplots(1, 2)
        places = np.arange(3)
        for number, name in enumerate(_MODELS):
            means = [
                float(np.mean([result[kind][name] for result in results.values()]))
                for kind in ("brackets", "repeats", "both")
            ]
            bars = bits.bar(places + 0.27 * number, means, 0.27, label=name)
            bits.bar_label(bars, fmt="%.2f", fontsize=8)
            speeds = [result["tokens_per_second"][name] for result in results.values()]
            speed.bar([name], [float(np.mean(speeds))], color=f"C{number}")
        bits.set_xticks(places + 0.27, ["brackets", "repeats", "both"])
        bits.set_ylabel("bits per token")
        bits.legend()
        speed.set_ylabel(f"tokens per second, rows of {_LONG}, one thread")
        figure.savefig(path, dpi=120)
