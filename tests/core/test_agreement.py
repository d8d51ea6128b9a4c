import math

import pytest

from portlm.agreement import within

NAN, INF = math.nan, math.inf


def test_an_error_up_to_the_limit_is_allowed():
    assert within(0.0, 0.0)
    assert within(1e-4, 1e-4)
    assert not within(1.0001e-4, 1e-4)


@pytest.mark.parametrize(
    ("error", "limit"), [(NAN, 1.0), (INF, 1.0), (0.0, NAN), (0.0, INF), (INF, INF), (NAN, NAN)]
)
def test_nothing_is_within_a_limit_where_a_number_is_missing(error, limit):
    """A limit is infinite where it grows with a largest value that is: then everything would be near enough."""
    assert not within(error, limit)
