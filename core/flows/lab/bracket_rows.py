"""Rows of typed brackets, in which a closing bracket follows from the opening one and nothing else from anything.

A quarter of the tokens are one of eight fillers, the others open one of eight kinds of bracket or close the innermost;
at most three are open.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

KINDS = FILLERS = 8
DEPTH = 3
VOCAB = 2 * KINDS + FILLERS  # ids: openers, closers, fillers; what a model needs beside them follows


class Row(NamedTuple):
    """Tokens that end with no bracket open, and the run of closing ones in them that follows from what is around it.

    Attributes:
        before: Tokens up to the run, which leave a bracket open at least.
        run: What closes all that are open, the innermost first.
        after: Tokens behind the run, in which all that is opened is closed.
    """

    before: list[int]
    run: list[int]
    after: list[int]


def walk(generator: np.random.Generator, count: int) -> tuple[list[int], list[int]]:
    """Return so many tokens from where none is open, and the kinds that are open behind them."""
    tokens, stack = list[int](), list[int]()
    draws, kinds = generator.random((count, 2)), generator.integers(0, KINDS, count)
    for (which, side), kind in zip(draws.tolist(), kinds.tolist(), strict=True):
        if which < 0.25:
            tokens.append(2 * KINDS + kind)
        elif not stack or (len(stack) < DEPTH and side < 0.5):
            stack.append(kind)
            tokens.append(kind)
        else:
            tokens.append(KINDS + stack.pop())
    return tokens, stack


def row(generator: np.random.Generator, longest: int = 6) -> Row:
    """Return a row of at most 2 longest + 5 tokens."""
    before, stack = list[int](), list[int]()
    while not stack:
        before, stack = walk(generator, int(generator.integers(2, longest + 1)))
    after, left = walk(generator, int(generator.integers(longest // 2)))
    closed = [[KINDS + kind for kind in reversed(open_)] for open_ in (stack, left)]
    return Row(before, closed[0], [*after, *closed[1]])
