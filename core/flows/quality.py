"""What another form of a model costs on a text: perplexity, divergence and agreement beside the model itself.

Made for quantized weights, whose engines are proved against the dequantized weights (compile/parity.py): that proof
says nothing of what was lost before. Here both models read the same windows of a text, and their distributions are
compared token by token, in float64.

B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from portlm.artifact import read_manifest, replace, write_manifest
from portlm.data.batches import IGNORE, evaluation_batches
from portlm.engine import Array, Engine
from portlm.errors import PortlmError, UsageError
from portlm.quantization import QuantizationCost
from portlm.rows import Rows
from portlm.runtimes.session import Session

if TYPE_CHECKING:
    from torch import nn

    from portlm.compile.calibrate import Text

BATCH = 8
MOST_TOKENS = 2**14  # of the text that is held out: the divergence is then known to a few per cent
_NUMBERS = 2**20  # of float64 at a time in each array of the comparison, 8 MB


@dataclass(frozen=True)
class Quality:
    """How two models predict the same tokens.

    Attributes:
        tokens: how many were predicted.
        perplexity: exp of the mean negative log-likelihood, of the model itself.
        quantized_perplexity: the same of its other form.
        kl: mean of KL(model || other form) over the tokens, nats.
        top1: share of the tokens at which both think the same token likeliest.
    """

    tokens: int
    perplexity: float
    quantized_perplexity: float
    kl: float
    top1: float

    @property
    def ratio(self) -> float:
        """Perplexity of the other form, as a multiple of the model's."""
        return self.quantized_perplexity / self.perplexity


def quality(
    model: Engine | Session,
    quantized: Engine | Session,
    tokens: Sequence[int] | Array,
    *,
    before: int | None = None,
    behind: int = 0,
    batch_size: int = BATCH,
) -> Quality:
    """Compare two decoders on a text. Nothing is drawn, and the result does not depend on what ran before.

    The text is cut into windows of the context that do not overlap, as `portlm pretrain` evaluates: each token is
    predicted once, those at the start of a window from little.

    Args:
        model: the model itself, in float32.
        quantized: its other form, of the same vocabulary and context.
        tokens: N ids of the text; no text that the quantized form was made with, or the result flatters it.
        before: the id in front of them. Without it the first token is not predicted.
        behind: count only what is predicted from more than so many tokens: what a cache costs may grow with it.
        batch_size: windows per call.

    Raises:
        UsageError: there is nothing to predict, or the models do not fit each other or the tokens.
        PortlmError: one of them gives logits that are not numbers.
    """
    engines = [each.engine if isinstance(each, Session) else each for each in (model, quantized)]
    sizes = [(engine.vocab_size, engine.context_length) for engine in engines]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"one model has {sizes[0][0]} ids and {sizes[0][1]} positions, the other {sizes[1][0]} and {sizes[1][1]}: "
            "compare two forms of the same model"
        )
    ids = np.asarray(tokens, np.int64).reshape(-1)
    count, sums = 0, np.zeros(4)
    for inputs, targets in evaluation_batches(ids, batch_size, sizes[0][1], before):
        targets[:, :behind] = IGNORE
        for target, logits, other in _answers(engines, inputs, targets):
            count += len(target)
            sums += _compare(logits, other, target)
    if not count:
        raise UsageError(f"there is nothing to predict behind {behind} tokens of the same window")
    nll, quantized_nll, kl, same = (sums / count).tolist()
    return Quality(count, _perplexity(nll), _perplexity(quantized_nll), max(kl, 0.0), same)


def record_cost(folder: Path, module: nn.Module, text: Text, weights: str = "auto") -> QuantizationCost:
    """Measure what quantizing cost a model, on the last tenth of a text, and say so in the artifact's manifest.

    Args:
        folder: the artifact, with quantized weights, or a cache of 8 bits, or both, whose cost is then one.
        module: the model that it was made of, in float32, which declares its roles. It is not changed.
        text: only what is held out of it is read, up to MOST_TOKENS.
        weights: what the artifact's matrices were rounded to, see compile/halves.py: that is a part of the cost.

    Raises:
        UsageError, PortlmError: as quality().
    """
    from portlm.compile.halves import rounding
    from portlm.compile.quantized_module import dequantized
    from portlm.models.modes import answering
    from portlm.models.roles import roles_of
    from portlm.runtimes.eager import TorchEngine

    manifest = read_manifest(folder)
    if manifest.quantization is None and manifest.cache is None:
        raise UsageError(f"{folder} holds float32 weights and keeps float32: there is no cost to measure")
    twin = copy.deepcopy(module)
    sizes = manifest.model.vocab_size, manifest.model.context_length
    own, other = (
        TorchEngine(roles_of(each) or {}, *sizes, "cpu", "native", {"cpu": 0}) for each in (module, twin)
    )
    other.rounds_cache = manifest.cache is not None
    with answering(module), answering(twin), rounding(twin, weights), dequantized(twin, folder, manifest):
        found = quality(own, other, text.held_out[:MOST_TOKENS], before=text.before)
    cost = QuantizationCost(
        tokens=found.tokens,
        perplexity_float32=found.perplexity,
        perplexity=found.quantized_perplexity,
        kl=found.kl,
        top1=found.top1,
        text=f"the end of {Path(text.name).name}, which was not calibrated with",
    )
    if manifest.quantization is not None:
        manifest = replace(manifest, quantization=replace(manifest.quantization, cost=cost))
    elif manifest.cache is not None:
        manifest = replace(manifest, cache=replace(manifest.cache, cost=cost))
    write_manifest(folder, manifest)
    return cost


def _perplexity(nll: float) -> float:
    return exp(min(nll, 700.0))  # 1e304: what is worse is no number, and tells nobody more


def _answers(
    engines: Sequence[Engine], inputs: Array, targets: Array
) -> Iterator[tuple[Array, Array, Array]]:
    """Targets (n,) and both engines' logits (n, V) float64 for them, some tokens at a time."""
    B, T = inputs.shape
    rows = [Rows(engine, B) for engine in engines]
    for begin, end in rows[0].chunks(B, T, every=True):
        logits = [each.read(inputs[:, begin:end], every=True) for each in rows]
        wanted = (
            targets[:, begin:end] != IGNORE
        )  # the last window ends in padding, which nothing before it sees
        target = targets[:, begin:end][wanted]
        found = [each[wanted] for each in logits]
        step = max(1, _NUMBERS // engines[0].vocab_size)
        for place in range(0, len(target), step):
            some = slice(place, place + step)
            for engine, each in zip(engines, found, strict=True):
                if not np.isfinite(each[some]).all():
                    raise PortlmError(
                        f"{engine.name}:{engine.device} {engine.profile}: its logits on this text are not numbers: "
                        "look for weights that are NaN or overflow float32"
                    )
            yield target[some], found[0][some].astype(np.float64), found[1][some].astype(np.float64)


def _compare(logits: Array, other: Array, target: Array) -> Array:
    """Sums over n tokens: both negative log-likelihoods, KL, and how many have the same likeliest token."""
    places = np.arange(len(target))
    p, q = _log_softmax(logits), _log_softmax(other)
    divergence = (np.exp(p) * (p - q)).sum(axis=1)
    same = logits.argmax(axis=1) == other.argmax(axis=1)
    return np.array([-p[places, target].sum(), -q[places, target].sum(), divergence.sum(), same.sum()])


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
