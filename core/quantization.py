"""What an artifact says of its quantized weights and cache: which numbers they are, and what that costs."""

import sys
from typing import Annotated

from msgspec import Meta, Struct

from portlm.roles import MAX_DIMENSION, Text, one_of

# The precision of engines that multiply quantized weights with activations rounded to so many bits, in place of "fp32".
FIFTEEN_BITS, EIGHT_BITS = "a15", "a8"
# The same of engines that keep keys and values in 8 bits, and compute in float32.
BYTE_CACHE = "kv8"

CACHES = ("int8",)  # what keys and values may be kept in, but for float32

MAX_TOKENS = 2**40
Perplexity = Annotated[float, Meta(ge=1, le=sys.float_info.max)]


class QuantizationCost(Struct, frozen=True):
    """What quantizing costs on a text that nothing was chosen by, measured on the logits of both models.

    Attributes:
        tokens: that were predicted.
        perplexity_float32: of the model before.
        perplexity: of the model with quantized weights.
        kl: mean divergence of the second from the first, in nats for each token.
        top1: share of tokens for which both have the same best guess.
        text: what it was measured on, in words.
    """

    tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
    perplexity_float32: Perplexity
    perplexity: Perplexity
    kl: Annotated[float, Meta(ge=0, le=sys.float_info.max)]
    top1: Annotated[float, Meta(ge=0, le=1)]
    text: Text


class Quantization(Struct, frozen=True):
    """How the matrices and the token table became small whole numbers; see compile/quantize.py.

    Attributes:
        bits: of a weight.
        group: how many share a scale.
        symmetric: without zero points.
        method: that chose the numbers.
        cost: None where it was not measured.
    """

    bits: Annotated[int, Meta(ge=1, le=8)]
    group: Annotated[int, Meta(ge=1, le=MAX_DIMENSION)]
    symmetric: bool
    method: Text
    cost: QuantizationCost | None = None


class KeyValueCache(Struct, frozen=True):
    """In what an artifact's graphs keep keys and values; see core/ops/byte_cache.py.

    Attributes:
        kind: one of CACHES.
        cost: where it was measured, and weights are float32; what quantized weights cost includes it.
    """

    kind: Annotated[str, one_of(CACHES)]
    cost: QuantizationCost | None = None


def described_cache(cache: KeyValueCache) -> list[str]:
    """Return lines for people: what the cache is, and what that costs, as far as it was measured."""
    lines = [f"keys and values are kept in {cache.kind}, each vector with a scale of its own"]
    return lines if cache.cost is None else [*lines, _cost(f"a cache of {cache.kind}", cache.cost)]


def described(quantization: Quantization) -> list[str]:
    """Return lines for people: what the weights are, and what that costs, as far as it was measured."""
    kind = "symmetric" if quantization.symmetric else "with zero points"
    lines = [
        f"weights of {quantization.bits} bits in groups of {quantization.group}, {kind}, {quantization.method}"
    ]
    if (cost := quantization.cost) is not None:
        lines.append(_cost("quantizing", cost))
    return lines


def _cost(what: str, cost: QuantizationCost) -> str:
    return (
        f"{what} takes the perplexity from {cost.perplexity_float32:.4g} to {cost.perplexity:.4g}, diverges by "
        f"{cost.kl:.2g} nats a token and keeps {cost.top1:.1%} of the best guesses "
        f"({cost.tokens} tokens, {cost.text})"
    )
