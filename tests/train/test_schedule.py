"""The learning rate: exact at its corners, monotone between them, and free of state."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portlm.train.schedule import InverseSqrt, WarmupCosine, WarmupLinear


def test_the_corners_are_exact():
    rate = WarmupCosine(peak=1e-3, floor=1e-4, warmup=100, steps=2000)
    assert rate(0) == 1e-5
    assert rate(99) == 1e-3
    assert rate(1999) == 1e-4
    assert rate(5000) == 1e-4


def test_half_way_down_is_half_way_between():
    rate = WarmupCosine(peak=1.0, floor=0.5, warmup=0, steps=101)
    assert rate(0) == 1.0
    assert math.isclose(rate(50), 0.75, rel_tol=1e-15)


def test_a_line_falls_by_the_same_each_step():
    rate = WarmupLinear(peak=1.0, floor=0.2, warmup=2, steps=11)
    assert [rate(step) for step in range(12)] == pytest.approx(
        [0.5, 1.0, *(1.0 - 0.8 * i / 9 for i in range(1, 10)), 0.2], rel=1e-12
    )


@pytest.mark.parametrize(("width", "warmup"), [(512, 4000), (1024, 4000), (64, 1)])
def test_the_inverse_root_is_that_of_the_paper(width, warmup):
    rate = InverseSqrt((width * warmup) ** -0.5, warmup)
    for n in (1, 2, warmup - 1, warmup, warmup + 1, 3 * warmup, 100_000):
        if n > 0:
            expected = width**-0.5 * min(n**-0.5, n * warmup**-1.5)
            assert rate(n - 1) == pytest.approx(expected, rel=1e-12)  # the same powers in another order


def test_the_cosine_is_that_of_pytorch():
    """CosineAnnealingLR is defined by a recurrence, so equality holds to its accumulated rounding."""
    torch = pytest.importorskip("torch")
    steps, peak, floor = 50, 3e-4, 3e-5
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps - 1, eta_min=floor)
    ours = WarmupCosine(peak, floor, warmup=0, steps=steps)
    for step in range(steps):
        assert math.isclose(ours(step), optimizer.param_groups[0]["lr"], rel_tol=1e-12)
        optimizer.step()
        theirs.step()


@given(
    peak=st.floats(1e-6, 1.0),
    share=st.floats(0, 1),
    warmup=st.integers(0, 50),
    steps=st.integers(1, 200),
)
def test_it_rises_then_falls_and_stays_between_zero_and_the_peak(peak, share, warmup, steps):
    rate = WarmupCosine(peak, peak * share, warmup, steps)
    values = [rate(step) for step in range(steps + 5)]
    slack = 1e-12 * peak  # one rounding of the cosine
    assert all(0 < value <= peak + slack or value == peak * share for value in values)
    top = max(warmup - 1, 0)
    assert all(a <= b + slack for a, b in itertools.pairwise(values[: top + 1]))
    assert all(a >= b - slack for a, b in itertools.pairwise(values[top:]))
