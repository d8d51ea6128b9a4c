"""Texts of different lengths in rows of one length, so that few places are padding, and none sees another text.

First-fit decreasing: the longest text first, each into the first row that has room. At most 11/9 of the least possible
number of rows, and one more, are needed (Johnson, 1973).

B rows, T tokens of a row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from portlm.errors import UsageError

HIDDEN = -1e30  # added to the score of a key that is not to be seen


class Packed(NamedTuple):
    """Rows of texts; all (B, T) int64.

    Attributes:
        ids: Tokens, and the filling behind them.
        texts: Which text a token is of, by its place in what was packed; -1 for filling.
        positions: From 0 on in each text.
    """

    ids: np.ndarray
    texts: np.ndarray
    positions: np.ndarray

    def bias(self) -> np.ndarray:
        """Return what attention adds to scores so that each token sees its own text alone, (B, 1, T, T) float32."""
        same = self.texts[:, :, None] == self.texts[:, None, :]
        return np.where(same, 0.0, HIDDEN).astype(np.float32)[:, None]


def pack(texts: Sequence[Sequence[int]], length: int, fill: int) -> Packed:
    """Pack texts into rows.

    Args:
        texts: Tokens of each; none is empty.
        length: T.
        fill: The id behind the last text of a row.

    Raises:
        UsageError: There is no text, or one is empty or longer than a row.
    """
    lengths = [len(text) for text in texts]
    if not lengths or not min(lengths) or max(lengths) > length:
        raise UsageError(
            f"each text must have 1 to {length} tokens to be packed, got {sorted({*lengths})[:8] or 'no text'}"
        )
    rows: list[list[int]] = []  # texts of each
    room: list[int] = []
    for number in sorted(range(len(texts)), key=lambda i: -lengths[i]):
        row = next((row for row, left in enumerate(room) if left >= lengths[number]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(number)
        room[row] -= lengths[number]
    shape = len(rows), length
    found = Packed(np.full(shape, fill, np.int64), np.full(shape, -1, np.int64), np.zeros(shape, np.int64))
    for row, numbers in enumerate(rows):
        at = 0
        for number in numbers:
            inside = slice(at, at + lengths[number])
            found.ids[row, inside], found.texts[row, inside] = texts[number], number
            found.positions[row, inside] = np.arange(lengths[number])
            at += lengths[number]
    return found
