"""Extents that are only known when a graph runs: sums and products of a role's symbols.

A role's function is recorded twice, with other numbers for its symbols, and an extent is the expression that gives the
numbers of both. A number that is the same in both is a number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# For each symbol in order of appearance, its number while recording: once each column. All are different primes, so
# that the two values of a product tell which it is, and those of a sum of two are in no other ratio either; and small,
# for models that compare lengths with their context. The fifth, an encoder-decoder's source, grows as well: added to
# its past and twice its new tokens it must not give the same number in both, which would be taken for a number.
NUMBERS = ((2, 19), (3, 11), (5, 13), (7, 17), (23, 47), (53, 29), (59, 31), (61, 37))

Term = tuple[str, ...]  # the symbols of a product, sorted; () for a number


@dataclass(frozen=True)
class Extent:
    """A polynomial with integer coefficients in a role's symbols.

    Attributes:
        terms: products of symbols and their factors, sorted; never only a number.
    """

    terms: tuple[tuple[Term, int], ...]

    @classmethod
    def of(cls, symbol: str) -> Extent:
        """Return the extent that one symbol is."""
        return cls((((symbol,), 1),))

    def __add__(self, other: int | Extent) -> int | Extent:
        return _extent([*self.terms, *_terms(other)])

    def __mul__(self, other: int | Extent) -> int | Extent:
        return _extent((tuple(sorted(a + b)), m * n) for a, m in self.terms for b, n in _terms(other))

    __radd__, __rmul__ = __add__, __mul__

    def __str__(self) -> str:
        def text(symbols: Term, factor: int) -> str:
            return "*".join(([str(factor)] if factor != 1 or not symbols else []) + list(symbols))

        ordered = sorted(self.terms, key=lambda term: (not term[0], term))  # the number last
        return " + ".join(text(*term) for term in ordered)


def parse(dimension: int | str) -> int | Extent:
    """Return an extent as a role writes it: a number, a symbol, or a sum such as "past + sequence"."""
    if isinstance(dimension, int):
        return dimension
    return _extent(((part,), 1) for part in parts(dimension))


def parts(dimension: str) -> list[str]:
    """Return the symbols of an extent: "past + sequence" has two."""
    return [part.strip() for part in dimension.split("+")]


class Extents:
    """Finds the expressions of a role's symbols that give two numbers.

    Args:
        numbers: of each symbol in the two recordings.
    """

    def __init__(self, numbers: Mapping[str, tuple[int, int]]):
        symbols = [Extent.of(name) for name in numbers]
        values = list(numbers.values())
        self._known: dict[tuple[int, int], int | Extent] = {}
        self._units: list[tuple[int, int, int | Extent]] = []
        for (one, a), (other, b) in itertools.combinations(zip(symbols, values, strict=True), 2):
            self._units.append((a[0] + b[0], a[1] + b[1], one + other))
        triples = [
            (a[0] + b[0] + c[0], a[1] + b[1] + c[1], one + other + third)
            for (one, a), (other, b), (third, c) in itertools.combinations(
                zip(symbols, values, strict=True), 3
            )
        ]
        places: Iterable[tuple[int, ...]] = itertools.chain.from_iterable(
            itertools.combinations_with_replacement(range(len(symbols)), degree) for degree in (1, 2, 3)
        )
        products = []
        for chosen in places:
            product: Any = 1
            for place in chosen:
                product = product * symbols[place]
            first, second = (math.prod(values[place][side] for place in chosen) for side in (0, 1))
            products.append((first, second, product))
        sums = [(m * a, n * b, s * t) for m, n, s in self._units for a, b, t in products[: len(symbols)]]
        self._units = [*products[: len(symbols)], *self._units, *products[len(symbols) :], *sums, *triples]

    def find(self, first: int, second: int) -> int | Extent:
        """Return a number if both are the same, else the simplest expression.

        Where there is none (an extent that was divided, say), the result equals itself alone.
        """
        if first == second:
            return first
        key = (first, second)
        if key not in self._known:
            self._known[key] = self._search(first, second)
        return self._known[key]

    def _search(self, first: int, second: int) -> int | Extent:
        for a, b, unit in self._units:
            factor, rest = divmod(first, a)
            if factor > 0 and not rest and factor * b == second:
                return unit * factor
        for a, b, unit in self._units:  # and a number, as where tokens are put in front
            if second - first == b - a:
                return unit + (first - a)
        return Extent.of(f"({first} or {second})")


def _terms(value: int | Extent) -> tuple[tuple[Term, int], ...]:
    return value.terms if isinstance(value, Extent) else (((), value),)


def _extent(terms: Iterable[tuple[Term, int]]) -> int | Extent:
    factors: dict[Term, int] = {}
    for symbols, factor in terms:
        factors[symbols] = factors.get(symbols, 0) + factor
    kept = tuple(sorted((symbols, factor) for symbols, factor in factors.items() if factor))
    if not any(symbols for symbols, _ in kept):
        return sum(factor for _, factor in kept)
    return Extent(kept)
