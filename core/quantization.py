"""What an artifact says of its quantized weights and cache: which numbers they are, and what that costs.

And what activations are rounded to where they meet quantized weights, which is decided when an engine compiles.
"""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Annotated

from msgspec import Meta, Struct

from portlm.errors import UsageError
from portlm.roles import MAX_DIMENSION, Text, one_of

# The precision of engines that multiply quantized weights with activations rounded to so many bits, in place of "fp32".
FIFTEEN_BITS, EIGHT_BITS = "a15", "a8"
# The same of engines that keep keys and values in 8 bits, and compute in float32.
BYTE_CACHE = "kv8"

# What products with quantized weights may be asked to take: activations as precise as the engine takes them by itself,
# which is float32 or 15 bits, or 8 bits.
FLOATS, BYTES = ACTIVATIONS = ("float32", "int8")
ACTIVATIONS_VARIABLE = "PORTLM_ACTIVATIONS"

CACHES = ("int8",)  # what keys and values may be kept in, but for float32

MAX_TOKENS = 2**40
Perplexity = Annotated[float, Meta(ge=1, le=sys.float_info.max)]


_asked: ContextVar[str | None] = ContextVar("activations", default=None)


@contextlib.contextmanager
def at_activations(kind: str | None) -> Iterator[None]:
    """Compile for one of ACTIVATIONS inside the block, whatever the environment says; None changes nothing."""
    token = _asked.set(kind or _asked.get())
    try:
        yield
    finally:
        _asked.reset(token)


def asked_activations() -> str | None:
    """Return which of ACTIVATIONS at_activations() or else the environment says; None if neither says anything.

    Raises:
        UsageError: the variable is neither of the two.
    """
    said = _asked.get() or os.environ.get(ACTIVATIONS_VARIABLE)
    if said is not None and said not in ACTIVATIONS:
        raise UsageError(f"{ACTIVATIONS_VARIABLE} must be {' or '.join(ACTIVATIONS)}, got {said[:40]!r}")
    return said


def activations() -> str:
    """Return which of ACTIVATIONS is compiled for now: what was asked for, or float32.

    Raises:
        UsageError: as asked_activations().
    """
    return asked_activations() or FLOATS


def kept_activations(targets: Iterable[str]) -> str | None:
    """Return which of ACTIVATIONS files that are compiled again keep where nothing is asked for; None for none.

    Args:
        targets: of the entries that they replace.
    """
    kept = asked_activations() is None and any(takes_bytes(target) for target in targets)
    return BYTES if kept else None


def target_at(target: str, quantized: bool) -> str:
    """Return a target as entries of compiled files name it, with what activations() says of quantized weights."""
    return f"{target}, {_AT_BYTES}" if quantized and activations() == BYTES else target


def takes_bytes(target: str) -> bool:
    """Say whether a target is one of activations of 8 bits: target_at() gave it, or ONNX Runtime's compiler."""
    return target.endswith((f", {_AT_BYTES}", ", accuracy level 4"))


_AT_BYTES = f"activations {BYTES}"


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
