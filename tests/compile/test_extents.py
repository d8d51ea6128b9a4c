"""Sizes that are only known when a graph runs: found from their numbers in two recordings."""

import itertools

import pytest

from portlm.compile.extents import NUMBERS, Extent, Extents, parse

SYMBOLS = ("batch", "sequence", "past", "kept")
PAIRS = dict(zip(SYMBOLS, NUMBERS, strict=False))
BATCH, SEQUENCE, PAST, KEPT = map(Extent.of, SYMBOLS)


@pytest.mark.parametrize(
    ("extent", "text"),
    [
        (SEQUENCE, "sequence"),
        (SEQUENCE + PAST, "past + sequence"),
        (BATCH * SEQUENCE, "batch*sequence"),
        (SEQUENCE * BATCH * 12, "12*batch*sequence"),
        (BATCH * (PAST + SEQUENCE), "batch*past + batch*sequence"),
        (1 + SEQUENCE, "sequence + 1"),
        (SEQUENCE * SEQUENCE, "sequence*sequence"),
    ],
    ids=str,
)
def test_an_expression_is_found_from_its_two_values(extent, text):
    values = [sum(factor * _product(term, side) for term, factor in extent.terms) for side in (0, 1)]
    found = Extents(PAIRS).find(*values)
    assert found == extent
    assert str(found) == text


def _product(term, side):
    product = 1
    for symbol in term:
        product *= PAIRS[symbol][side]
    return product


def test_no_two_small_expressions_have_the_same_two_values():
    """Symbols, products and sums of two, each up to 4096 times: the ratio of the values tells them apart."""
    extents = [BATCH, SEQUENCE, PAST, KEPT]
    extents += [a * b for a, b in itertools.combinations_with_replacement(extents, 2)]
    extents += [a + b for a, b in itertools.combinations(extents[:4], 2)]
    known = Extents(PAIRS)
    for extent in extents:
        for factor in (1, 2, 3, 12, 64, 768, 4096):
            wanted = extent * factor
            values = [sum(n * _product(term, side) for term, n in wanted.terms) for side in (0, 1)]
            assert known.find(*values) == wanted


def test_a_number_and_what_no_expression_gives():
    known = Extents(PAIRS)
    assert known.find(3, 3) == 3
    divided = known.find(PAIRS["sequence"][0] // 2, PAIRS["sequence"][1] // 2)
    assert divided not in (SEQUENCE, 1)


def test_a_role_writes_numbers_symbols_and_sums():
    assert parse(12) == 12
    assert parse("past + sequence") == PAST + SEQUENCE
