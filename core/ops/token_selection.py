"""Choosing the next token: greedy, temperature, top-k, top-p and min-p.

The same seed gives the same tokens on every engine, instruction set and machine, because nothing here
depends on the order of a sum or on a mathematical library:

1. A logit of -inf forbids its token. NaN, +inf, or a row of nothing but -inf is an error.
2. **Greedy** (temperature 0): the largest logit, the lowest id among equals. No other filter matters.
3. **Weights**: w = rint(2^s exp((logit - largest) / temperature)), a whole number. s is the largest integer
   for which the weights of V tokens add up to 2^52 at most, so that every sum of them is exact in whatever
   order it is taken. A token less than 2^-(s+1) as probable as the most probable one (7e-12 for V = 50 257)
   has weight 0. The exponential is the polynomial written out below in float64, every operation rounded
   once, in C++ as here.
4. **top_k** > 0 keeps the tokens whose logit is at least the k-th largest (Fan et al. 2018).
5. **top_p** < 1 keeps a token iff the tokens with a strictly larger logit weigh less than top_p of all, both
   counted among what top_k left: the smallest set that reaches top_p (Holtzman et al. 2020).
6. **min_p** > 0 keeps the tokens at least min_p times as probable as the most probable one (Nguyen et al.
   2025).
7. **Draw**: the kept weights are added up over ids in ascending order; the token is the first whose sum
   exceeds floor(u total). Ascending ids, not descending probability: logits that differ in the last digit
   from one engine to the next move the boundaries by that digit, and cannot swap two tokens.

Tokens of equal logit are kept or dropped together, so a filter may keep more than it names, never fewer.

u comes from Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with key
(seed, 0) and counter (step, row, 0, 0): the upper 53 bits of its first word, times 2^-53.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from portlm.arguments import real, whole
from portlm.errors import PortlmError, UsageError
from portlm.ops.compiled import available, kernels
from portlm.ops.spec import OpSpec

Ids = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

_WORD = (1 << 64) - 1
_PHILOX_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_PHILOX_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)

_LOG2_E = 1.4426950408889634
_LN2_HIGH = 6.93147180369123816490e-01  # ln 2 in two parts, so that k ln 2 is subtracted without error
_LN2_LOW = 1.90821492927058770002e-10
_LOWEST = -64.0  # exp of it is weight 0 whatever s is
_INVERSE_FACTORIALS = (
    2.505210838544172e-08, 2.755731922398589e-07, 2.7557319223985893e-06, 2.48015873015873e-05,
    1.984126984126984e-04, 1.388888888888889e-03, 8.333333333333333e-03, 4.1666666666666664e-02,
    1.6666666666666666e-01, 0.5, 1.0, 1.0,
)  # fmt: skip


def select_tokens(
    logits: npt.NDArray[np.float32] | Any,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Sequence[int] = 0,
    step: int = 0,
    rows: Sequence[int] | None = None,
) -> Ids:
    """Choose one token for each row of logits.

    Args:
        logits: (B, V) float32: an array, or a tensor on a CUDA device, where its tokens are chosen then.
        temperature: 0 for greedy, otherwise what the logits are divided by.
        top_k: keep this many of the most probable tokens; 0 keeps all.
        top_p: keep the most probable tokens that together reach this probability; 1 keeps all.
        min_p: keep tokens at least this probable relative to the most probable one; 0 keeps all.
        seed: 0 <= seed < 2^64, or one for each row.
        step: counts the tokens of one generation, so that each draws its own random number.
        rows: which stream of random numbers each row draws from; 0 to B - 1 if not given.

    Returns:
        (B,) int64 token ids.

    Raises:
        UsageError: an argument is out of range.
        PortlmError: a logit is NaN or +inf, or a row forbids every token. The row is named.
    """
    if getattr(logits, "is_cuda", False):
        from portlm.ops.token_selection_cuda import select_tokens_cuda

        tensor: Any = logits
        return select_tokens_cuda(tensor, temperature, top_k, top_p, min_p, seed, step, rows)
    logits, seeds, streams = _checked(logits, temperature, top_k, top_p, min_p, seed, step, rows)
    if not available():
        return _reference(logits, temperature, top_k, top_p, min_p, seeds, step, streams)
    B, V = logits.shape
    tokens = np.empty(B, np.int64)
    kernels.select_tokens(
        _address(logits), B, V, temperature, top_k, top_p, min_p,
        _address(seeds), _address(streams), step, _address(tokens),
    )  # fmt: skip
    for index in range(B):
        if tokens[index] < 0:
            raise bad_row(logits, index)
    return tokens


def token_selection_reference(
    logits: npt.NDArray[np.float32],
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Sequence[int] = 0,
    step: int = 0,
    rows: Sequence[int] | None = None,
) -> Ids:
    """The definition, in numpy. Arguments, result and errors as of ``select_tokens``."""
    logits, seeds, streams = _checked(logits, temperature, top_k, top_p, min_p, seed, step, rows)
    return _reference(logits, temperature, top_k, top_p, min_p, seeds, step, streams)


def check_filters(vocab_size: int, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Raise UsageError unless every filter is in its range for a vocabulary of this size; 0 and 1 keep every token."""
    real("[token_selection] temperature", temperature, 0)
    real("[token_selection] top_p", top_p, 0, 1, above=True)
    real("[token_selection] min_p", min_p, 0, 1)
    whole("[token_selection] top_k", top_k, 0, vocab_size)


def random_unit(seed: int, row: int, step: int) -> float:
    """Return u in [0, 1), a multiple of 2^-53, which depends on nothing but its arguments."""
    return float(philox4x64((step, row, 0, 0), (seed, 0))[0] >> 11) * 2.0**-53


def philox4x64(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the four 64-bit words of Philox4x64-10 for a counter and a key."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = _PHILOX_MULTIPLIERS[0] * c0, _PHILOX_MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 & _WORD, (p0 >> 64) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & _WORD, (k1 + _PHILOX_WEYL[1]) & _WORD
    return c0, c1, c2, c3


def weights(logits: npt.NDArray[np.float32], temperature: float) -> Ids:
    """Return the whole-number weights (V,) of one row (V,) of logits, 2^s for the most probable token."""
    scale = weight_bits(logits.size)
    row = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature: the quotient is -inf, its weight 0
        x = np.maximum((row - row.max()) / temperature, _LOWEST)
    k = np.rint(x * _LOG2_E)
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    power = np.full_like(r, _INVERSE_FACTORIALS[0])
    for coefficient in _INVERSE_FACTORIALS[1:]:
        power = power * r + coefficient
    return np.rint(np.ldexp(power, k.astype(np.int32) + scale)).astype(np.int64)


def weight_bits(vocab_size: int) -> int:
    """Return s: the weight of the most probable token is 2^s, and that of all tokens at most 2^52."""
    return 52 - (vocab_size - 1).bit_length()


def _reference(
    logits: npt.NDArray[np.float32],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seeds: Words,
    step: int,
    streams: Words,
) -> Ids:
    tokens = np.empty(len(logits), np.int64)
    for index, row in enumerate(logits):
        if not (row < np.inf).all() or not (row > -np.inf).any():
            raise bad_row(logits, index)
        if temperature == 0:
            tokens[index] = row.argmax()
            continue
        w = weights(row, temperature)
        if top_k:
            w[row < np.partition(row, row.size - top_k)[row.size - top_k]] = 0
        if top_p < 1:
            descending = np.argsort(-row, kind="stable")
            values, mass = -row[descending], np.cumsum(w[descending])
            first_equal = np.searchsorted(values, values, side="left")
            larger = np.where(first_equal > 0, mass[first_equal - 1], 0)
            w[descending[larger.astype(np.float64) >= top_p * float(mass[-1])]] = 0
        w[w < min_p * 2.0 ** weight_bits(row.size)] = 0
        total = np.cumsum(w)
        u = random_unit(int(seeds[index]), int(streams[index]), step)
        tokens[index] = np.searchsorted(total, int(u * float(total[-1])), side="right")
    return tokens


def _checked(
    logits: npt.NDArray[np.float32],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int | Sequence[int],
    step: int,
    rows: Sequence[int] | None,
) -> tuple[npt.NDArray[np.float32], Words, Words]:
    """Check every argument, and return contiguous logits with one seed and one stream for each row."""
    if not isinstance(logits, np.ndarray) or logits.dtype != np.float32 or logits.ndim != 2:
        what = f"{logits.dtype} {logits.shape}" if isinstance(logits, np.ndarray) else type(logits).__name__
        raise UsageError(f"[token_selection] logits must be a float32 array (rows, vocabulary), got {what}")
    check_logits(logits.shape, temperature, top_k, top_p, min_p)
    return np.ascontiguousarray(logits), *streams_of(len(logits), seed, step, rows)


def check_logits(shape: Sequence[int], temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Raise UsageError unless there are tokens to choose from, and filters fit them. The shape is (B, V)."""
    if shape[1] == 0:
        raise UsageError("[token_selection] logits have no tokens to choose from")
    check_filters(shape[1], temperature, top_k, top_p, min_p)


def streams_of(
    B: int, seed: int | Sequence[int], step: int, rows: Sequence[int] | None
) -> tuple[Words, Words]:
    """Return a seed and a stream of random numbers (B,) for each row, from the arguments of ``select_tokens``.

    Raises:
        UsageError: an argument is out of range.
    """
    _word("step", step)
    seeds = _per_row("seed", [seed] * B if isinstance(seed, (int, np.integer)) else seed, B)
    return seeds, _per_row("row", range(B) if rows is None else rows, B)


def _address(array: npt.NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]  # a tenth of the time that .ctypes.data takes
    return address


def _per_row(name: str, values: Any, B: int) -> Words:
    try:
        words = [_word(name, value) for value in values]
    except TypeError:
        raise UsageError(f"[token_selection] {name} must be a whole number or one for each row") from None
    if len(words) != B:
        raise UsageError(f"[token_selection] {name} was given for {len(words)} rows, but logits have {B}")
    return np.array(words, np.uint64)


def _word(name: str, value: Any) -> int:
    return whole(f"[token_selection] {name}", value, 0, _WORD)


def bad_row(logits: npt.NDArray[np.float32], index: int) -> PortlmError:
    """Return the error of a row of (B, V) logits that no token can be chosen from."""
    bad = np.flatnonzero(~(logits[index] < np.inf))
    if bad.size:
        what = (
            f"the logit of token {bad[0]} is {logits[index, bad[0]]} (and {bad.size - 1} more are not finite)"
        )
    else:
        what = "every logit is -inf, so no token is allowed"
    return PortlmError(f"[token_selection] row {index}: {what}: check the weights for NaN or infinity")


SPEC = OpSpec(
    name="token_selection",
    summary="greedy, temperature, top-k, top-p, min-p",
    forward=("select_tokens",),
    cuda=("select_tokens",),
)
