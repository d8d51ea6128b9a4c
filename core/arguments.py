"""Arguments of any type are checked before they are used, so that one that cannot work is one UsageError.

A message may have to show anything: numbers of thousands of digits, arrays, objects that cannot be shown at all.
"""

import math
import operator
import reprlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from portlm.errors import UsageError

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 60


def shown(value: object) -> str:
    """Show an argument, short and on one line."""
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} {value.shape}"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    try:
        return " ".join(_SHORT.repr(value).split())
    except Exception:  # whatever the object's own code raises
        return f"an object of type {type(value).__name__}"


def whole(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """Return a whole number from `low` to `high`.

    Raises:
        UsageError: it is another one, or none. True and False are none.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    inside = number is not None and (low is None or number >= low) and (high is None or number <= high)
    if number is None or not inside:
        raise UsageError(f"{name} must be a whole number{_range(low, high)}, got {shown(value)}")
    return number


def real(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, above: bool = False
) -> float:
    """Return a finite number in [low, high], or in (low, high] with `above`, as a float.

    Raises:
        UsageError: it is another one, or none. True and False are none, and neither is NaN.
    """
    number = math.nan
    if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    inside = math.isfinite(number) and (low < number if above else low <= number) and number <= high
    if not inside:
        bounds = _range(None if low == -math.inf else low, None if high == math.inf else high, above)
        raise UsageError(f"{name} must be a finite number{bounds}, got {shown(value)}")
    return number


def flag(name: str, value: Any) -> bool:
    """Return True or False.

    Raises:
        UsageError: it is neither.
    """
    if not isinstance(value, bool | np.bool_):
        raise UsageError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def one_of(what: str, value: Any, known: tuple[str, ...]) -> str:
    """Return a name that is known.

    Raises:
        UsageError: it is not; the message lists those that are.
    """
    if not isinstance(value, str) or value not in known:
        raise UsageError(f"there is no {what} {shown(value)}: choose one of {', '.join(known)}")
    return value


def wholes(name: str, values: Any, high: int) -> list[int]:
    """Return whole numbers from 0 to `high`, of a list or another sequence or a flat array, as a list.

    Raises:
        UsageError: it is something else, or one of them is another number.
    """
    flat = isinstance(values, np.ndarray) and values.ndim == 1
    if not (flat or isinstance(values, Sequence)) or isinstance(values, str | bytes):
        raise UsageError(f"{name} must be whole numbers in a list, got {shown(values)}")
    return [whole(f"one of {name}", value, 0, high) for value in values]  # the first that is wrong ends it


def count(values: Any) -> int:
    """The length of a sequence, which of a range may be more than len() can say."""
    try:
        return len(values)
    except OverflowError:
        return sys.maxsize


def _range(low: float | None, high: float | None, above: bool = False) -> str:
    if low is None and high is None:
        return ""
    if low is None:
        return f" of at most {high:g}"
    if high is None:
        return f" above {low:g}" if above else f" of at least {low:g}"
    return f" above {low:g} and at most {high:g}" if above else f" from {_plain(low)} to {_plain(high)}"


def _plain(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"
