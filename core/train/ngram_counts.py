"""Counting runs of words, and laying the tree of them out: the loops behind n-gram models, compiled by Numba.

Runs of one length are found from those one word shorter: a run is the shorter run that ends one place before, its
parent, and its last word. Two counting sorts order all places by parent and word, so equal runs stand side by side: the
time of a length is linear in the text, and nothing is hashed. What is held is a few whole numbers per word of the text.

Every loop is a plain function that Python runs as well, only a hundred times slower.

T words of the text, R different runs of one length, V vocabulary.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from portlm.errors import UsageError
from portlm.models.ngram import MAX_PLACES

_TRIES = 256  # places where a row does not fit, after which those before are left to rows of one child


class Level(NamedTuple):
    """All different runs of one length, ordered by parent and last word.

    Attributes:
        words: (R,) int32, the last word of each.
        parents: (R,) int32, the number of the run without its last word, one length shorter.
        suffixes: (R,) int32, the number of the run without its first word.
        counts: (R,) int64: how often each stands in the text, of the longest runs; of shorter ones, behind how many
            different words. The beginning of the text is one such word, so that none is 0 but of single words.
    """

    words: np.ndarray
    parents: np.ndarray
    suffixes: np.ndarray
    counts: np.ndarray


def count(tokens: np.ndarray, vocab_size: int, order: int) -> Iterator[Level]:
    """Yield the runs of 1, 2, ..., ``order`` words of a text, each length once the next one is counted.

    Args:
        tokens: (T,) of whole numbers below vocab_size.
        vocab_size: V.
        order: The longest length.

    Raises:
        UsageError: The text is shorter than the longest runs, or has more than 2^31 words.
    """
    T = len(tokens)
    if not order <= T < 2**31:
        raise UsageError(f"n-grams of up to {order} words need a text of {order} to {2**31 - 1}, got {T}")
    words = np.ascontiguousarray(tokens, np.int32)
    by_word = np.argsort(words, kind="stable").astype(np.int32)
    nothing = np.zeros(vocab_size, np.int32)
    level = Level(
        np.arange(vocab_size, dtype=np.int32), nothing, nothing, np.bincount(words, minlength=vocab_size)
    )
    ends = words  # the run that ends at each place, of the length at hand; -1 where the text is too short
    for length in range(2, order + 1):
        parents = np.empty(T, np.int32)
        parents[0], parents[1:] = -1, ends[:-1]
        after, firsts, counts = compiled(_runs)(parents, words, by_word, len(level.words))
        longer = Level(words[firsts], parents[firsts], ends[firsts], counts)
        before = np.bincount(longer.suffixes, minlength=len(level.words))
        before[ends[length - 2]] += 1
        yield level._replace(counts=before)
        level, ends = longer, after
    yield level


def _runs(
    parents: np.ndarray, words: np.ndarray, by_word: np.ndarray, shorter: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number the runs of one length.

    Args:
        parents: (T,) int32, the number of the shorter run that ends before each place; -1 for none.
        words: (T,) int32.
        by_word: (T,) int32, the places in the order of their words, equal ones as they come.
        shorter: How many shorter runs there are.

    Returns:
        The run that ends at each place (T,) int32, -1 for none; the first place of each run (R,) int64; how often it
        is there (R,) int64.
    """
    T = len(words)
    starts = np.zeros(shorter + 1, np.int64)
    for i in range(T):
        if parents[i] >= 0:
            starts[parents[i] + 1] += 1
    for p in range(shorter):
        starts[p + 1] += starts[p]
    total = starts[shorter]
    places = np.empty(total, np.int32)
    for i in by_word:
        p = parents[i]
        if p >= 0:
            places[starts[p]] = i
            starts[p] += 1
    ends = np.full(T, -1, np.int32)
    R = 0
    for j in range(total):
        i = places[j]
        if j == 0 or parents[i] != parents[places[j - 1]] or words[i] != words[places[j - 1]]:
            R += 1
        ends[i] = R - 1
    firsts, counts = np.empty(R, np.int64), np.zeros(R, np.int64)
    for j in range(total - 1, -1, -1):
        i = places[j]
        firsts[ends[i]] = i
        counts[ends[i]] += 1
    return ends, firsts, counts


def lay_out(levels: list[Level], vocab_size: int) -> tuple[list[np.ndarray], list[np.ndarray], int, int]:
    """Give each run a place in the double array of portlm.models.ngram.

    Rows, the children of one run, are laid down length by length, the largest first, each at the first place where all
    its children fall into gaps.

    Args:
        levels: Runs of 1, 2, ..., n words.
        vocab_size: V.

    Returns:
        The places of the runs of each level; the base of the runs of each level but the last; M and N.

    Raises:
        UsageError: They take more than MAX_PLACES.
    """
    V = vocab_size
    places, bases, begin = [np.arange(1, V + 1)], list[np.ndarray](), V + 1
    used, histories = np.zeros(2 * V + 2, np.bool_), V + 1
    for length, level in enumerate(levels[1:], 2):
        if length == len(levels):
            begin = histories  # the longest runs have no children: their places come last
        sizes = np.bincount(level.parents, minlength=len(levels[length - 2].words))
        starts = np.concatenate(([0], np.cumsum(sizes)))
        rows = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
        base, used = compiled(_pack)(rows, starts, level.words, used, begin, MAX_PLACES)
        if (base < 0).any():
            raise UsageError(
                f"n-grams of up to {length} words take more than {MAX_PLACES} places: take a lower order or less text"
            )
        bases.append(base)
        places.append(base[level.parents] + level.words)
        end = int(places[-1].max()) + 1
        if length < len(levels):
            histories = max(histories, end)
    last = max([histories, *(int(found.max()) + 1 for found in places)])
    return places, bases, histories, max([last, histories + V, *(int(base.max()) + V for base in bases)])


def _pack(
    rows: np.ndarray, starts: np.ndarray, words: np.ndarray, used: np.ndarray, begin: int, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find a base for each row.

    Args:
        rows: (r,) int64, the numbers of rows with children, in the order in which they are laid down.
        starts: (R + 1,) int64, where the children of each row begin and end.
        words: int32, of all children, rising in each row.
        used: bool, which places are taken.
        begin: The first place that may be taken, above every word.
        most: Places in all.

    Returns:
        (R,) int64, the base of each row, 0 for those without children and -1 for one that finds no place; and `used`
        after that.
    """
    base = np.zeros(len(starts) - 1, np.int64)
    free = begin  # all places before are taken
    low = begin  # where rows of several children look first
    for row in rows:
        first, end = starts[row], starts[row + 1]
        while free < len(used) and used[free]:
            free += 1
        low = max(low, free)
        place, tries = (free if end - first == 1 else low), 0
        span = words[end - 1] - words[first]
        while True:
            if place + span >= most:
                base[row] = -1
                return base, used
            if place + span >= len(used):
                longer = np.zeros(2 * (place + span + 1), np.bool_)
                longer[: len(used)] = used
                used = longer
            fits = True
            for j in range(first, end):
                if used[place + words[j] - words[first]]:
                    fits = False
                    break
            if fits:
                break
            place, tries = place + 1, tries + 1
        base[row] = place - words[first]
        for j in range(first, end):
            used[base[row] + words[j]] = True
        if tries > _TRIES:
            low = place
    return base, used


def score(
    tokens: np.ndarray,
    begin: int,
    words: int,
    base: np.ndarray,
    parents: np.ndarray,
    log_probs: np.ndarray,
    back_offs: np.ndarray,
) -> np.ndarray:
    """Return the log-probability of each word of a text from a place on, each behind all words before it.

    Args:
        tokens: (T,) int64 below the vocabulary.
        begin: The first word to score.
        words: K, how many words are looked back at.
        base: Table of the model, as the others.
        parents: Table.
        log_probs: Table.
        back_offs: Table.

    Returns:
        (T - begin,) float64.
    """
    found: np.ndarray = compiled(_score)(tokens, begin, words, base, parents, log_probs, back_offs)
    return found


def _score(
    tokens: np.ndarray,
    begin: int,
    words: int,
    base: np.ndarray,
    parents: np.ndarray,
    log_probs: np.ndarray,
    back_offs: np.ndarray,
) -> np.ndarray:
    scores = np.empty(len(tokens) - begin, np.float64)
    history = np.zeros(words, np.int64)
    for i in range(max(0, begin - words), len(tokens)):
        word = tokens[i]
        found, last = np.float64(log_probs[1 + word]), 1 + word
        for k in range(words):
            entry = history[k]
            place = base[entry] + word
            history[k] = last
            last = 0
            if parents[place] == entry:
                found, last = np.float64(log_probs[place]), place
            else:
                found += back_offs[entry]
        if i >= begin:
            scores[i - begin] = found
    return scores


@functools.cache
def compiled(loop: Callable[..., Any]) -> Callable[..., Any]:
    """Return one of the loops of this file, compiled. That takes a second or two, once on a machine that keeps it."""
    import numba

    try:
        fast: Callable[..., Any] = numba.njit(nogil=True, cache=True)(loop)
    except RuntimeError:  # there is no folder that it could be kept in
        fast = numba.njit(nogil=True)(loop)
    return fast
