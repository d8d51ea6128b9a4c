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

    def bias(self, causal: bool = False) -> np.ndarray:
        """Return what attention adds to scores so that each token sees its own text alone, (B, 1, T, T) float32.

        Args:
            causal: Hide what comes later, too.
        """
        seen = self.texts[:, :, None] == self.texts[:, None, :]
        seen = np.tril(seen) if causal else seen
        return np.where(seen, np.float32(0), np.float32(HIDDEN))[:, None]


def first_fit(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Return which texts share a row, the longest first and each in the first row that has room.

    Args:
        lengths: Tokens of each text, 1 to T.
        length: T.
    """
    rows: list[list[int]] = []
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    room = [length] * (
        2 * leaves
    )  # a tree: the most room among the rows below each node, which are its leaves
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= lengths[number] else 2 * node + 1
        if node - leaves == len(rows):
            rows.append([])
        rows[node - leaves].append(number)
        room[node] -= lengths[number]
        while node := node // 2:
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


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
    rows = first_fit(lengths, length)
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
