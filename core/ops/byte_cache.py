"""A key/value cache of 8 bits: what is kept of a vector. portlm.ops.quantized_attention computes on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from portlm.ops import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", Tensor="torch:Tensor")

LEVELS = 127
SMALLEST = 2.0**-126  # a normal float32

_rounding: ContextVar[bool] = ContextVar("rounding", default=False)


def to_bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what is kept of vectors (..., D): whole numbers (..., D) int8 and scales (..., 1) float32.

    The scale is max|x| / 127, and the numbers are x / scale, rounded to the nearest, of two the even one: -127 to 127.
    A vector of zeros has scale 0 and zeros. A scale below the smallest normal float32 divides as that. Where a vector
    holds NaN or infinity, so does its scale.
    """
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True) / LEVELS
    q = torch.where(scale.isfinite(), torch.round(x / scale.clamp_min(SMALLEST)), 0.0)
    return q.to(torch.int8), scale


def kept(x: Tensor) -> Tensor:
    """Return vectors (..., D) as such a cache has them, in their own type."""
    q, scale = to_bytes(x)
    return q.to(x.dtype) * scale.to(x.dtype)


@contextmanager
def rounded_cache(rounded: bool = True) -> Iterator[None]:
    """Let portlm.ops.cached_attention keep in floats what a cache of 8 bits would: the model as engines are to run it.

    It counts for this thread alone, and for its own code: a recording of a model does not see it.
    """
    token = _rounding.set(rounded)
    try:
        yield
    finally:
        _rounding.reset(token)


def is_rounded() -> bool:
    """Say whether this is inside `rounded_cache`."""
    return _rounding.get()
