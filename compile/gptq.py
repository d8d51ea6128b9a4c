"""GPTQ: the integers of a matrix chosen so that what the matrix gives on real inputs changes least.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022
(arXiv:2210.17323), after Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon",
1993.

Rounding to nearest minimises the error of the weights. What counts is the error of the outputs, of which the mean over
inputs x is, for each row w of the matrix and its quantized form v,

    (w - v) H (w - v)^T,    H = E[x x^T].

Columns are quantized one after another, and after each the columns that are still free move to where they make up best
for the error so far. That is exact for each step, and greedy over all of them.

N outputs, K inputs, G = K / group.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from portlm.compile.quantize import Bytes, Floats, Quantized, Scheme, choose_scales
from portlm.errors import PortlmError

DAMPING = 0.01  # of the mean of H's diagonal, added to the diagonal: the paper's
BLOCK = 128  # columns whose effect on all later ones is computed in one product: the paper's
_ROWS_AT_ONCE = 2**22  # numbers of float64 of the rows in work, 32 MB: rows do not depend on each other

Float64 = npt.NDArray[np.float64]


class Order(NamedTuple):
    """In which order columns are quantized, and how the error of one moves those behind it.

    Attributes:
        columns: (K,) int64, those with the largest mean square of the input first: they then move least.
        factor: (K, K) float64, upper triangular U in that order, with U^T U the inverse of the damped H.
    """

    columns: npt.NDArray[np.int64]
    factor: Float64


def gptq(weight: Floats, moments: Float64, scheme: Scheme, damping: float = DAMPING) -> Quantized:
    """Quantize a matrix for inputs with given second moments.

    Scales and zeros are those of rounding to nearest. They are chosen first, for groups of neighbours, so that columns
    can be taken in any order and lie in the file as they always do.

    Args:
        weight: (N, K) float32, finite, K a multiple of the scheme's group.
        moments: (K, K) float64, H up to a factor. A column whose input was always 0 is rounded to nearest.
        scheme: which numbers there are.
        damping: share of the mean of H's diagonal that is added to the diagonal. Larger values trust the moments less;
            an infinite one would be rounding to nearest.

    Raises:
        PortlmError: the moments hold NaN or infinity, or cannot be factorised.
        ValueError: shapes do not fit.
    """
    return solve(weight, ordered(moments, weight.shape[1], damping), scheme)


def ordered(moments: Float64, K: int, damping: float = DAMPING) -> Order:
    """Return the order of columns and the factor of the inverse, which all matrices with the same input share.

    Args:
        moments: (K, K), see gptq.
        K: inputs of the matrix.
        damping: see gptq.

    Raises:
        PortlmError: the moments hold NaN or infinity, or cannot be factorised.
        ValueError: they have another shape.
    """
    if moments.shape != (K, K):
        raise ValueError(f"moments must be ({K}, {K}) for a matrix of {K} inputs, got {moments.shape}")
    diagonal = np.array(np.diagonal(moments), np.float64)
    if not np.isfinite(moments).all():
        bad = int(np.argmin(np.isfinite(moments).all(axis=1)))
        raise PortlmError(
            f"the second moments of input {bad} are not finite: its values overflow, or are NaN"
        )
    if (diagonal < 0).any():
        raise PortlmError(
            f"the mean square of input {int(diagonal.argmin())} is negative: no moments of real inputs"
        )
    live = diagonal > 0
    mean = diagonal[live].mean() if live.any() else 1.0
    columns = np.argsort(-diagonal, kind="stable")
    H = np.array(moments, np.float64)[np.ix_(columns, columns)] / mean
    # A dead column has zeros in its row, too: with any number on the diagonal it neither moves nor is moved.
    H[np.diag_indices(K)] += np.where(live[columns], damping, 1.0)
    # U is wanted with U^T U = H^-1, so H = V V^T with V = U^-1 upper triangular: the Cholesky factor, read backwards.
    try:
        backwards = np.linalg.cholesky(H[::-1, ::-1])
    except np.linalg.LinAlgError as error:
        raise PortlmError(
            "the second moments of the inputs cannot be factorised: calibrate with more text, or a larger damping"
        ) from error
    return Order(columns, _inverse(backwards)[::-1, ::-1])


def _inverse(lower: Float64) -> Float64:
    """Invert a lower triangular matrix, by halves: an eighth of the arithmetic of a general inverse."""
    K = len(lower)
    if K <= BLOCK:
        return np.tril(np.linalg.inv(lower))
    half = K // 2
    result = np.zeros_like(lower)
    result[:half, :half] = first = _inverse(lower[:half, :half])
    result[half:, half:] = second = _inverse(lower[half:, half:])
    result[half:, :half] = -second @ (lower[half:, :half] @ first)
    return result


def solve(weight: Floats, order: Order, scheme: Scheme) -> Quantized:
    """Quantize a matrix (N, K) with the order and the factor of its inputs; see gptq."""
    K = weight.shape[1]
    scale, zero = choose_scales(weight, scheme)
    q = np.empty(weight.shape, np.uint8)
    step = max(1, _ROWS_AT_ONCE // K)
    for begin in range(0, len(weight), step):
        rows = slice(begin, begin + step)
        q[rows] = _rows(weight[rows], scale[rows], None if zero is None else zero[rows], order, scheme)
    return Quantized(q, scale, zero)


def _rows(weight: Floats, scale: Floats, zero: Bytes | None, order: Order, scheme: Scheme) -> Bytes:
    """Integers (n, K) of some rows."""
    n, K = weight.shape
    columns, U = order
    w = np.ascontiguousarray(weight.T[columns], np.float64)  # (K, n): a column is contiguous
    scales = scale.T.astype(np.float64)  # (G, n)
    zeros = np.full_like(scales, scheme.middle) if zero is None else zero.T.astype(np.float64)
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)
    q = np.empty((K, n))
    for begin in range(0, K, BLOCK):
        end = min(begin + BLOCK, K)
        errors = np.empty((end - begin, n))
        for j in range(begin, end):
            g = columns[j] // scheme.group
            q[j] = np.clip(np.rint(w[j] * inverse[g]) + zeros[g], 0, scheme.top)
            errors[j - begin] = (w[j] - scales[g] * (q[j] - zeros[g])) / U[j, j]
            w[j + 1 : end] -= np.outer(U[j, j + 1 : end], errors[j - begin])
        w[end:] -= U[begin:end, end:].T @ errors
    placed = np.empty((K, n), np.uint8)
    placed[columns] = q
    return np.ascontiguousarray(placed.T)
