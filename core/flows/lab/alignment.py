"""Attention against one vector: strings of symbols, to be written in reverse.

Without attention, all that the decoder has of a source is a state of fixed size, and long strings do not fit in it.
With it, the decoder looks at what it needs, and where it looks is the alignment: for a string that is written in
reverse, the anti-diagonal of the matrix. An encoder knows a symbol at its neighbours, too, so nothing forces the weight
onto the symbol itself: with wide embeddings and fast steps the loss is as near 0 and 0.5 to 0.65 is on the diagonal.
``within_one`` is the weight on it and one symbol beside it, and ``most_on_diagonal`` how often the symbol that has most
of the weight is the one to be written; neither has a bar.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from portlm.flows.lab.experiment import Bar
from portlm.flows.lab.fitting import fit, fresh, mean_curve, parameters, seeded
from portlm.models.bahdanau import BahdanauConfig
from portlm.models.recurrent_encoder_decoder import IGNORE
from portlm.models.seq2seq import Seq2SeqConfig

SYMBOLS = 20
START, END = SYMBOLS, SYMBOLS + 1
VOCABULARY = SYMBOLS + 2
_SHORTEST, _LONGEST = 4, 18
_STEPS, _ROWS = 1000, 64
# With steps as long as the other's, attention learns as much and looks less sharply.
_RATES = {"attention": 7e-4, "plain": 2e-3}
_JUDGED = 200  # strings of each length
_LENGTHS = (12, 18)

Pairs = tuple[
    Tensor, Tensor, Tensor, Tensor
]  # source, what is read and what is to be said of the target, mask of the source


def pairs(rng: np.random.Generator, lengths: np.ndarray, *, reverse: bool) -> Pairs:
    """Draw strings of such lengths, with their targets: the same symbols in reverse or in order, and an end."""
    rows, longest = len(lengths), int(lengths.max())
    source = np.full((rows, longest), START)
    read, wanted = np.full((rows, longest + 1), START), np.full((rows, longest + 1), IGNORE)
    for row, length in enumerate(lengths.tolist()):
        symbols = rng.integers(SYMBOLS, size=length)
        source[row, :length] = symbols
        target = symbols[::-1] if reverse else symbols
        read[row, 1 : length + 1] = target
        wanted[row, : length + 1] = [*target, END]
    mask = np.arange(longest) < lengths[:, None]
    ids, targets, labels, shown = (
        torch.from_numpy(array.astype(np.int64)) for array in (source, read, wanted, mask)
    )
    return ids, targets, labels, shown


def batches(
    rng: np.random.Generator, rows: int, shortest: int, longest: int, *, reverse: bool
) -> Iterator[Pairs]:
    """Yield pairs whose lengths differ within a batch."""
    while True:
        yield pairs(rng, rng.integers(shortest, longest + 1, rows), reverse=reverse)


@torch.no_grad()
def written(model: Any, source: Tensor, mask: Tensor, count: int) -> Tensor:
    """Return the first tokens (B, count) that a model finds most likely, one after the other."""
    memory, token, tokens = model.read(source, mask), torch.full((len(source), 1), START), []
    for _ in range(count):
        logits, memory = model.step(token, memory)
        token = logits.argmax(-1)
        tokens.append(token)
    return torch.cat(tokens, dim=1)


def exact(model: Any, found: Pairs) -> float:
    """Return the share of strings of one length whose target is written without a fault, its end included."""
    source, _, wanted, mask = found
    return float((written(model, source, mask, wanted.shape[1]) == wanted).all(1).float().mean())


class Alignment:
    """Two encoder-decoders of GRUs, with and without attention, that learn to reverse strings."""

    name: ClassVar[str] = "alignment"
    shows: ClassVar[str] = (
        "A decoder that looks back at its source reverses strings that one vector cannot hold."
    )
    source: ClassVar[str] = "Bahdanau, Cho and Bengio, 2015"
    seeds: ClassVar[tuple[int, ...]] = (0, 1, 2)
    bars: ClassVar[tuple[Bar, ...]] = (
        Bar("attention_18", ">=", 0.80),
        Bar("plain_18", "<=", 0.10),
        Bar("anti_diagonal", ">=", 0.80),
    )

    def run(self, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
        """Train both, and measure strings of 12 and 18 symbols and where attention looks."""
        shared: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "context_length": 32,
            "decoder_start_token_id": START,
            "eos_token_ids": (END,),
        }
        models: dict[str, Any] = {
            "attention": fresh(
                BahdanauConfig(**shared, embed_width=16, width=96, alignment=96, maxout=96, init="scaled"),
                seed,
            ),
            # Nearly twice the parameters, and the order in which the first symbol to write is the last that was read.
            "plain": fresh(
                Seq2SeqConfig(
                    **shared,
                    cell="gru",
                    n_layer=1,
                    width=192,
                    bias=True,
                    reverse_source=False,
                    init_range=0.08,
                ),
                seed,
            ),
        }
        with torch.no_grad():  # symbols begin as faint as in the paper, and scores sharp
            models["attention"].encoder.embed.weight.mul_(0.1)
            models["attention"].decoder.score.mul_(2.0)
        found: dict[str, Any] = {"curves": {}}
        for name, model in models.items():
            data = batches(seeded(seed), _ROWS, _SHORTEST, _LONGEST, reverse=True)
            losses = fit(
                model,
                data,
                _STEPS,
                lr=_RATES[name],
                weight_decay=0.0,
                tell=tell,
            )
            found["curves"][name] = mean_curve(losses)
            found[f"parameters_{name}"] = parameters(model)
            for length in _LENGTHS:
                held_out = pairs(seeded(seed, length), np.full(_JUDGED, length), reverse=True)
                found[f"{name}_{length}"] = exact(model, held_out)
                tell(f"{name}: {found[f'{name}_{length}']:.3f} of {length} symbols without a fault")
        source, read, _, mask = held_out
        with torch.no_grad():
            weights = models["attention"].align(source, read, mask)[:, :_LONGEST]  # (B, T, S)
        found["anti_diagonal"] = float(weights.flip(-1).diagonal(dim1=1, dim2=2).mean())
        most = weights.flip(-1).argmax(-1) == torch.arange(_LONGEST)
        found["most_on_diagonal"] = float(most.float().mean())
        near = [weights.flip(-1).diagonal(offset, 1, 2).sum(-1) for offset in (-1, 0, 1)]
        found["within_one"] = float(sum(near).mean()) / _LONGEST
        found["alignment"] = [[round(share, 4) for share in row] for row in weights[0].tolist()]
        found["string"] = source[0].tolist()
        return found

    def draw(self, results: Mapping[int, dict[str, Any]], path: Path) -> None:
        """Draw the alignment of a string with its reverse, for each seed, and both losses of training."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4 * (len(results) + 1), 4), layout="constrained")
        *pictures, curves = figure.subplots(1, len(results) + 1)
        for axes, (seed, result) in zip(pictures, results.items(), strict=True):
            letters = [chr(ord("a") + symbol) for symbol in result["string"]]
            axes.imshow(result["alignment"], cmap="gray", vmin=0, vmax=1)
            axes.set_xticks(range(len(letters)), letters)
            axes.set_yticks(range(len(letters)), letters[::-1])
            axes.set_title(f"seed {seed}: {result['anti_diagonal']:.2f} on the anti-diagonal", fontsize=9)
            axes.set_xlabel("source")
            axes.set_ylabel("target")
        for place, result in enumerate(results.values()):
            for number, (name, curve) in enumerate(result["curves"].items()):
                steps = np.linspace(0, _STEPS, len(curve))
                curves.plot(steps, curve, color=f"C{number}", label=None if place else name)
        curves.set_xlabel("steps")
        curves.set_ylabel("training loss (nats)")
        curves.legend()
        figure.savefig(path, dpi=120)
