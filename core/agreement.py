"""When a result is near enough to another: one rule for every check, which NaN and infinity do not pass."""

import math


def within(error: float, limit: float) -> bool:
    """Say whether an error is allowed: it is at most a limit that is finite.

    Written the other way round, ``error > limit`` is False for NaN, so a result that is no number would pass; and a
    limit that grows with the largest value is infinite where that value is, so everything would.

    Args:
        error: taken with a maximum that passes NaN on, as those of numpy and PyTorch do and Python's does not.
        limit: the largest error that is allowed.
    """
    return math.isfinite(limit) and error <= limit
