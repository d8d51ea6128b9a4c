"""The numbers of quantized weights: how a matrix becomes small whole numbers, how they lie in a file, and the way back.

A matrix W (N, K) = (out, in) is cut along k into G = K / g groups of g numbers. Each group of a row has a scale, and a
zero point z in 0 .. 2^bits - 1, which without zero points of its own is 2^(bits - 1):

    w[n, k] = scale[n, k // g] * (q[n, k] - z[n, k // g])        q in 0 .. 2^bits - 1

Scales are rounded to float16 values before any q is chosen, so that who packs them into two bytes loses nothing. So the
product above is exact in float32: 11 bits times at most 9.

A file holds q as uint8 (N, G, g * bits / 8), with 4 bits two to a byte, the even k in the low half; scales as float32
(N, G); and zero points as uint8 (N, ceil(G * bits / 8)), paired along G in the same way. That is the layout of ONNX
Runtime's MatMulNBits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from portlm.arguments import flag, shown
from portlm.errors import FormatError, UsageError

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

BITS = {"int8": 8, "int4": 4}
GROUPS = (32, 64, 128)
DEFAULT_GROUP = 64
# Shares of the scale with which the largest number of a group just fits. With 4 bits it is worth clipping that one a
# little, if all others become finer.
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
LARGEST = float(
    np.finfo(np.float16).max
)  # of a weight: far beyond any model's, and every scale is then finite
CHUNK = (
    2**16
)  # numbers that are looked at together, which with what stands beside them stay in the second-level cache


@dataclass(frozen=True)
class Scheme:
    """Which numbers there are.

    Attributes:
        bits: 4 or 8.
        group: how many consecutive k share a scale.
        symmetric: every zero point is 2^(bits - 1).
    """

    bits: int
    group: int
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS.values() or self.group not in GROUPS:
            raise UsageError(
                f"quantized weights have {' or '.join(map(str, sorted(BITS.values())))} bits in groups of "
                f"{', '.join(map(str, GROUPS))}, got {self.bits} bits in groups of {self.group}"
            )

    @property
    def top(self) -> int:
        """The largest q."""
        return int(2**self.bits - 1)

    @property
    def middle(self) -> int:
        """The zero point of a group that has none of its own."""
        return int(2 ** (self.bits - 1))


@dataclass(frozen=True)
class Quantized:
    """A matrix in whole numbers: q uint8 (N, K), scale float32 (N, G), zero uint8 (N, G), or None for the middle."""

    q: Bytes
    scale: Floats
    zero: Bytes | None = None


class Quantizer(Protocol):
    """Chooses the numbers of one matrix after another."""

    scheme: Scheme

    @property
    def method(self) -> str:
        """Its name, for the manifest."""

    def __call__(self, name: str, weight: Floats) -> Quantized:
        """Return the numbers of a matrix.

        Args:
            name: of the parameter in the module.
            weight: (N, K), float32, finite, K a multiple of the scheme's group.
        """


Prepare = Callable[[Any], Quantizer]
"""Makes the quantizer of a module, whose parameters the names that it is given are of."""


def scheme_of(quantize: str | None, group: int | None, asymmetric: bool) -> Scheme | None:
    """Return the scheme that a user asks for, None for none.

    Args:
        quantize: a key of BITS.
        group: None for DEFAULT_GROUP.
        asymmetric: with zero points.

    Raises:
        UsageError: there is no such scheme, or the other two are said without the first.
    """
    if quantize is None:
        if group is not None or asymmetric:
            raise UsageError("group and asymmetric say how to quantize: say int8 or int4 as well")
        return None
    if not isinstance(quantize, str) or quantize not in BITS:
        raise UsageError(f"quantize must be {' or '.join(BITS)}, got {shown(quantize)}")
    group = DEFAULT_GROUP if group is None else group
    if type(group) is not int or group not in GROUPS:
        raise UsageError(f"group must be one of {', '.join(map(str, GROUPS))}, got {shown(group)}")
    return Scheme(BITS[quantize], group, not flag("asymmetric", asymmetric))


class RoundToNearest:
    """The Quantizer that looks at the weights alone."""

    @classmethod
    def prepare(cls, scheme: Scheme) -> Prepare:
        """Return what makes it of any module."""
        return lambda module: cls(scheme)

    method = "round to nearest"

    def __init__(self, scheme: Scheme):
        """Take the numbers that there are."""
        self.scheme = scheme

    def __call__(self, name: str, weight: Floats) -> Quantized:
        """Return each number's nearest; the scales are those of `choose_scales`."""
        scale, zero = choose_scales(weight, self.scheme)
        return Quantized(nearest(weight, scale, zero, self.scheme), scale, zero)


def quantize(name: str, weight: Floats, quantizer: Quantizer) -> Quantized:
    """Return a matrix in the numbers that a quantizer chooses, after it was looked at.

    Args:
        name: of the parameter.
        weight: (N, K) float32.
        quantizer: chooses.

    Raises:
        UsageError: the group does not divide K.
        FormatError: a weight is not finite, or too large.
        ValueError: the quantizer broke its word.
    """
    scheme = quantizer.scheme
    N, K = weight.shape
    if K % scheme.group:
        fitting = [str(group) for group in GROUPS if K % group == 0]
        advice = (
            f"choose {' or '.join(fitting)}" if fitting else f"none of {', '.join(map(str, GROUPS))} does"
        )
        raise UsageError(f"{name} has {K} inputs, which groups of {scheme.group} do not divide: {advice}")
    if not np.isfinite(weight).all():
        raise FormatError(f"{name} holds NaN or infinity: export a checkpoint that has not diverged")
    if (largest := np.abs(weight).max(initial=0)) > LARGEST:
        raise FormatError(f"{name} holds weights up to {largest:.3g}, too large to be quantized")
    found = quantizer(name, weight)
    G = K // scheme.group
    zero = found.zero
    if (
        (found.q.shape, found.q.dtype) != ((N, K), np.uint8)
        or (found.scale.shape, found.scale.dtype) != ((N, G), np.float32)
        or (zero is None) != scheme.symmetric
        or (zero is not None and (zero.shape, zero.dtype) != ((N, G), np.uint8))
        or max(int(found.q.max(initial=0)), 0 if zero is None else int(zero.max(initial=0))) > scheme.top
    ):
        raise ValueError(f"{quantizer.method} gives numbers of {name} that are not of its scheme {scheme}")
    if (found.scale != found.scale.astype(np.float16)).any():
        raise ValueError(f"{quantizer.method} gives scales of {name} that half precision does not have")
    return found


def choose_scales(weight: Floats, scheme: Scheme) -> tuple[Floats, Bytes | None]:
    """Return the scale of every group (N, G), a float16 value, and its zero point, None if the scheme is symmetric.

    With 8 bits the largest number of a group just fits. With 4 bits, scales a little smaller are tried as well, and
    symmetric ones of either sign, since -8 has no counterpart: the one with the least squared error is taken, the
    first among equals. Groups of zeros, and those too small for half precision, have the scale 0.
    """
    N, K = weight.shape
    G = K // scheme.group
    scales = np.zeros((N, G), np.float32)
    zeros = None if scheme.symmetric else np.zeros((N, G), np.uint8)
    for rows, groups in _chunks(weight, scheme):
        least = np.full(groups.shape[:2], np.inf)
        for scale, zero in _candidates(groups, scheme):
            difference = _round(groups, scale, zero, scheme)
            difference -= zero[..., None]
            difference *= scale[..., None]
            np.subtract(groups, difference, out=difference)
            error = np.einsum("ngk,ngk->ng", difference, difference, dtype=np.float64)
            better = error < least
            least[better] = error[better]
            scales[rows][better] = scale[better]
            if zeros is not None:
                zeros[rows][better] = zero[better]
    return scales, zeros


def _chunks(weight: Floats, scheme: Scheme) -> Iterator[tuple[slice, Floats]]:
    """Yield a few rows after another, and these as groups (n, G, g) that lie in memory in this order.

    A matrix often comes as the transpose of what a checkpoint holds, and all that is made of it would lie so, too.
    """
    N, K = weight.shape
    step = max(1, CHUNK // max(1, K))
    for begin in range(0, N, step):
        rows = slice(begin, begin + step)
        yield (
            rows,
            np.ascontiguousarray(weight[rows], np.float32).reshape(-1, K // scheme.group, scheme.group),
        )


def _candidates(groups: Floats, scheme: Scheme) -> Iterator[tuple[Floats, Floats]]:
    """Yield scales and zero points (n, G) to try for groups (n, G, g)."""
    shares = SHARES if scheme.bits == 4 else (1.0,)
    if scheme.symmetric:
        middle = np.full(groups.shape[:2], scheme.middle, np.float32)
        largest = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)[..., 0]
        for share in shares:
            yield _half(np.abs(largest) * np.float32(share / (scheme.middle - 1))), middle
            if scheme.bits == 4:  # the largest becomes the one number without a counterpart
                yield _half(largest * np.float32(-share / scheme.middle)), middle
        return
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    for share in shares:
        scale = _half((high - low) * np.float32(share / scheme.top))
        yield scale, np.clip(np.rint(_over(-low * np.float32(share), scale)), 0, scheme.top)


def nearest(weight: Floats, scale: Floats, zero: Bytes | None, scheme: Scheme) -> Bytes:
    """Return q (N, K) for given scales and zero points (N, G): of each weight the nearest, halves to even."""
    N, K = weight.shape
    found = np.empty((N, K), np.uint8)
    for rows, groups in _chunks(weight, scheme):
        middle = np.full(groups.shape[:2], scheme.middle) if zero is None else zero[rows]
        found[rows] = _round(groups, scale[rows], middle.astype(np.float32), scheme).reshape(-1, K)
    return found


def _round(groups: Floats, scale: Floats, zero: Floats, scheme: Scheme) -> Floats:
    """Whole numbers (n, G, g) for scales and zero points (n, G); the zero point itself where the scale is 0."""
    q = np.rint(_over(groups, scale[..., None]))
    q += zero[..., None]
    rounded: Floats = np.clip(q, 0, scheme.top, out=q)
    return rounded


def _over(values: Floats, scale: Floats) -> Floats:
    """Quotients of finite values, 0 where the scale is."""
    return np.divide(values, np.where(scale == 0, np.float32(np.inf), scale))


def _half(values: Floats) -> Floats:
    """The nearest values of half precision."""
    return values.astype(np.float16).astype(np.float32)


def dequantize(matrix: Quantized, scheme: Scheme) -> Floats:
    """Return the matrix (N, K) that the numbers mean, float32, without rounding."""
    N, K = matrix.q.shape
    G = K // scheme.group
    wide = matrix.q.reshape(N, G, scheme.group).astype(np.float32)
    wide -= np.float32(scheme.middle) if matrix.zero is None else matrix.zero[..., None].astype(np.float32)
    wide *= matrix.scale[..., None]
    return wide.reshape(N, K)


def pack(q: Bytes, scheme: Scheme) -> Bytes:
    """Return q (N, K) as a file holds it, uint8 (N, G, g * bits / 8)."""
    N, K = q.shape
    packed = _pairs(q) if scheme.bits == 4 else q
    return packed.reshape(N, K // scheme.group, scheme.group * scheme.bits // 8)


def unpack(packed: Bytes, scheme: Scheme) -> Bytes:
    """Return q (N, K) of what `pack` gives."""
    N = len(packed)
    return (_halves(packed) if scheme.bits == 4 else packed).reshape(N, -1)


def pack_zeros(zero: Bytes, scheme: Scheme) -> Bytes:
    """Return zero points (N, G) as a file holds them, uint8 (N, ceil(G * bits / 8)); a half without a group is 0."""
    return _pairs(np.pad(zero, ((0, 0), (0, zero.shape[1] % 2)))) if scheme.bits == 4 else zero


def unpack_zeros(packed: Bytes, groups: int, scheme: Scheme) -> Bytes:
    """Return zero points (N, G) of what `pack_zeros` gives for G groups."""
    return (_halves(packed) if scheme.bits == 4 else packed)[:, :groups]


def _pairs(values: Bytes) -> Bytes:
    """Numbers below 16, two to a byte along the last axis, the first in the low half."""
    return np.bitwise_or(values[..., ::2], np.left_shift(values[..., 1::2], 4), dtype=np.uint8)


def _halves(values: Bytes) -> Bytes:
    halves: Bytes = np.stack([values & 15, values >> 4], -1).reshape(*values.shape[:-1], -1)
    return halves
