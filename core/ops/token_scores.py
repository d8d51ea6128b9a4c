"""How probable given tokens are by rows of logits, and which token is the most probable one.

The log-probability of token t is x[t] - m - ln(sum of e^(x - m)) for logits x, m the largest of them: in float64 from
float32 logits, so that what it is off by is what the logits are. A logit of -inf forbids its token. NaN, +inf, or a row
of nothing but -inf says nothing; greedy decoding refuses such a row, too (portlm.ops.token_selection).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from portlm.errors import UsageError
from portlm.ops.compiled import available, kernels
from portlm.ops.spec import OpSpec

Ids = npt.NDArray[np.int64]
Scores = tuple[npt.NDArray[np.float64], Ids]


def token_scores(logits: npt.NDArray[np.float32] | Any, targets: Ids) -> Scores:
    """Return the log-probability of one token for each row of logits, and the row's most probable token.

    Args:
        logits: (R, V) float32: an array, or a tensor on a CUDA device, where it is scored then.
        targets: (R,) int64, of 0 to V - 1.

    Returns:
        (R,) float64 natural logarithms, and (R,) int64 ids, the lowest among equals. A row that says nothing has NaN
        and -1.

    Raises:
        UsageError: an argument is of another shape or type, or a target is no token.
    """
    if getattr(logits, "is_cuda", False):
        from portlm.ops.token_scores_cuda import token_scores_cuda

        tensor: Any = logits
        return token_scores_cuda(tensor, targets)
    logits, targets = _checked(logits, targets)
    if not available():
        return _reference(logits, targets)
    R, V = logits.shape
    parts = np.empty((R, 4), np.float64)
    kernels.score_logits(_address(logits), R, V, 0, _address(targets), _address(parts))
    return from_parts(parts)


def token_scores_reference(logits: npt.NDArray[np.float32], targets: Ids) -> Scores:
    """The definition, in numpy. Arguments, result and errors as of ``token_scores``."""
    return _reference(*_checked(logits, targets))


def from_parts(parts: npt.NDArray[np.float64]) -> Scores:
    """Scores from what the kernel score_logits says of whole rows, (R, 4)."""
    largest, ids, total, target = parts.T
    good, logprobs = ids >= 0, np.full(len(parts), np.nan)
    logprobs[good] = (target[good] - largest[good]) - np.log(total[good])
    return logprobs, ids.astype(np.int64)


def _reference(logits: npt.NDArray[np.float32], targets: Ids) -> Scores:
    logprobs, best = np.full(len(logits), np.nan), np.full(len(logits), -1, np.int64)
    for r, row in enumerate(logits.astype(np.float64)):
        largest = row.max()
        if np.isfinite(largest):
            logprobs[r] = (row[targets[r]] - largest) - np.log(np.exp(row - largest).sum())
            best[r] = row.argmax()
    return logprobs, best


def _checked(logits: npt.NDArray[np.float32], targets: Ids) -> tuple[npt.NDArray[np.float32], Ids]:
    if not isinstance(logits, np.ndarray) or logits.dtype != np.float32 or logits.ndim != 2:
        raise wrong("logits", "an array of float32 of 2 axes", logits)
    return np.ascontiguousarray(logits), check_rows(logits.shape, targets)


def check_rows(shape: Sequence[int], targets: Ids) -> Ids:
    """Return contiguous targets, one for each row of logits of a shape (R, V).

    Raises:
        UsageError: they are of another shape or type, or one is no token.
    """
    if not isinstance(targets, np.ndarray) or targets.dtype != np.int64 or targets.ndim != 1:
        raise wrong("targets", "an array of int64 of 1 axes", targets)
    R, V = shape
    if V == 0 or len(targets) != R:
        raise UsageError(
            f"[token_scores] one target is needed for each row of logits {tuple(shape)}, got {len(targets)}"
        )
    check_targets(targets, V)
    return np.ascontiguousarray(targets)


def wrong(name: str, wanted: str, given: Any) -> UsageError:
    """Return the error of an argument that is not what is wanted."""
    shape = getattr(given, "shape", None)
    what = type(given).__name__ if shape is None else f"{given.dtype} {tuple(shape)}"
    return UsageError(f"[token_scores] {name} must be {wanted}, got {what}")


def check_targets(targets: Ids, vocab_size: int) -> None:
    """Raise UsageError unless every target is a token of a vocabulary of this size."""
    if targets.size and not (targets.min() >= 0 and targets.max() < vocab_size):
        raise UsageError(
            f"[token_scores] targets must be from 0 to {vocab_size - 1}, got {targets.min()} to {targets.max()}"
        )


def _address(array: npt.NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


SPEC = OpSpec(
    name="token_scores",
    summary="log-probabilities of given tokens, and the most probable ones",
    forward=("score_logits",),
    cuda=("score_logits",),
)
