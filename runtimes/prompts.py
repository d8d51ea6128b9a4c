"""What may be given as a prompt: a text, token ids in a list or an array, or several of these."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from portlm.arguments import count, shown, whole
from portlm.errors import ContextLengthError, UsageError

Ids = Sequence[int] | npt.NDArray[np.integer]
Prompt = str | Ids


def one_or_several(what: str, given: Any) -> tuple[list[Any], bool]:
    """Return prompts as a list, and whether one was given by itself: a text, or a flat list or array of token ids.

    Args:
        what: "prompt" or "text", for messages.
        given: by the caller. An empty list is no prompt at all; a matrix is a prompt in each row.

    Raises:
        UsageError: it is something else, or mixes token ids with prompts.
    """
    if isinstance(given, str):
        return [given], True
    if isinstance(given, np.ndarray) and given.ndim in (1, 2) and given.dtype != object:
        return ([given], True) if given.ndim == 1 else (list(given), False)
    if not _is_sequence(given):
        raise UsageError(
            f"{what}s must be a text, token ids in a list or an array, or a list of these, got {shown(given)}"
        )
    if isinstance(given, range) and given:
        return [given], True
    items = list(given)
    flat = [_is_number(item) for item in items]
    if items and all(flat):
        return [items], True
    for i, item in enumerate(items):
        if flat[i]:
            raise UsageError(
                f"{what} {i} is a number beside other {what}s: put the token ids of one {what} in a list of their own"
            )
        if not (
            isinstance(item, str) or _is_sequence(item) or (isinstance(item, np.ndarray) and item.ndim == 1)
        ):
            raise UsageError(
                f"{what} {i} must be a text, or token ids in a list or an array, got {shown(item)}"
            )
    return items, False


def token_ids(name: str, given: Ids, vocab_size: int, context_length: int) -> tuple[int, ...]:
    """Return the token ids of one prompt.

    Raises:
        ContextLengthError: there are more than the model's context holds.
        UsageError: one is no whole number, or none of the model's.
    """
    if count(given) > context_length:  # before they are looked at, since there may be any number
        raise ContextLengthError(count(given), context_length, name)
    if isinstance(given, np.ndarray):
        if given.dtype.kind not in "iu":
            raise UsageError(f"the token ids of {name} must be whole numbers, got {shown(given)}")
        given = given.tolist()
    ids = tuple(whole(f"a token of {name}", token) for token in given)
    for token in ids:
        if not 0 <= token < vocab_size:
            raise UsageError(f"{name} holds token {shown(token)}, but ids run from 0 to {vocab_size - 1}")
    return ids


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.generic) and not isinstance(value, str | bytes)
