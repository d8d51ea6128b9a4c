import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portlm.errors import PortlmError, UsageError
from portlm.ops import token_selection
from portlm.ops.token_selection import philox4x64, random_unit, select_tokens, token_selection_reference

BOTH = pytest.mark.parametrize(
    "select",
    [
        pytest.param(token_selection_reference, id="reference", marks=pytest.mark.no_kernel("the reference")),
        pytest.param(select_tokens, id="kernel"),
    ],
)


def needs_kernel():
    if token_selection.kernels is None:
        pytest.skip("portlm._C is not built")


def draws(logits, n, **filters):
    """Tokens of n rows that differ in nothing but their random numbers."""
    return select_tokens(np.repeat(np.float32([logits]), n, axis=0), **filters)


def softmax(logits):
    e = np.exp(np.float64(logits) - max(logits))
    return e / e.sum()


# --- what the filters mean ------------------------------------------------------------------------


@BOTH
def test_greedy_takes_the_lowest_id_among_equals(select):
    logits = np.float32([[1, 3, 3, 2], [-np.inf, -5, -np.inf, -5], [-0.0, 0.0, -1, -1], [0, 0, 0, 7]])
    assert select(logits).tolist() == [1, 1, 0, 3]


@BOTH
@pytest.mark.parametrize("V", [1, 15, 16, 17, 1023, 1024, 1025, 5000])
def test_greedy_finds_the_largest_logit_wherever_it_is(select, V):
    rng = np.random.default_rng(V)
    logits = rng.standard_normal((50, V)).astype(np.float32)
    assert (select(logits) == logits.argmax(1)).all()


@pytest.mark.parametrize(
    "filters",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 2.0, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_tokens_are_drawn_with_the_probabilities_of_the_filtered_softmax(filters):
    """Each of 16 counts of 40 000 draws within 6 standard deviations: wrong alarm once in 10^7 seeds."""
    logits = np.random.default_rng(7).standard_normal(16).astype(np.float32) * np.float32(2)
    expected = allowed(logits, **filters)
    counts = np.bincount(draws(logits, 40_000, seed=11, **filters), minlength=16)
    assert (counts[expected == 0] == 0).all()
    deviation = np.sqrt(40_000 * expected * (1 - expected))
    assert (np.abs(counts - 40_000 * expected) <= 6 * deviation).all()


def allowed(logits, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """The filtered distribution, from sorted probabilities as the papers write it. No equal logits."""
    p = softmax(logits / np.float64(temperature))
    order = np.argsort(-p)
    if top_k:
        p[order[top_k:]] = 0
        p /= p.sum()
    reached = np.cumsum(p[order]) >= top_p
    if top_p < 1:
        p[order[reached.argmax() + 1 :]] = 0
        p /= p.sum()
    p[p < min_p * p.max()] = 0
    return p / p.sum()


@BOTH
def test_equal_logits_are_kept_or_dropped_together(select):
    logits = np.repeat(np.float32([[5, 1, 1, 1, -9]]), 400, axis=0)
    assert set(select(logits, temperature=5.0, top_k=2)) == {0, 1, 2, 3}
    assert set(select(logits, temperature=5.0, top_p=0.5)) == {0, 1, 2, 3}
    assert set(select(logits, temperature=5.0, min_p=0.4)) == {0, 1, 2, 3}
    assert set(select(logits, temperature=5.0, top_k=1)) == {0}


@BOTH
def test_top_p_stops_at_the_token_that_reaches_it(select):
    logits = np.repeat(np.log(np.float32([[0.5, 0.25, 0.125, 0.125]])), 400, axis=0)
    assert set(select(logits, temperature=1.0, top_p=0.49)) == {0}
    assert set(select(logits, temperature=1.0, top_p=0.7)) == {0, 1}
    assert set(select(logits, temperature=1.0, top_p=1e-300)) == {0}


@BOTH
def test_a_forbidden_token_is_never_drawn(select):
    logits = np.full((2000, 6), -np.inf, np.float32)
    logits[:, 4] = -3e38
    logits[:, 1] = -3e38
    assert set(select(logits, temperature=1.0)) == {1, 4}
    assert set(select(logits, temperature=1.0, top_k=5, top_p=0.99, min_p=0.5)) == {1, 4}


@BOTH
def test_temperature_goes_from_greedy_to_uniform(select):
    logits = np.repeat(np.float32([[1.0, 1.001, 0.5, -2]]), 500, axis=0)
    assert set(select(logits, temperature=5e-324)) == {1}
    counts = np.bincount(select(logits, temperature=1e300), minlength=4)
    assert counts.min() > 75  # binomial(500, 1/4): below 75 once in 10^8 seeds


# --- the same tokens everywhere -------------------------------------------------------------------


rows_of_logits = st.integers(1, 2100).flatmap(
    lambda V: st.tuples(
        st.just(V),
        st.integers(1, 3),
        st.integers(0, 2**32 - 1),
        st.sampled_from([0.01, 1.0, 10.0, 1e30]),
        st.booleans(),
        st.floats(0, 0.9),
    )
)
any_filters = st.fixed_dictionaries(
    {
        "temperature": st.one_of(st.floats(0, 3), st.floats(0, 1e308)),
        "top_p": st.one_of(st.just(1.0), st.floats(0, 1, exclude_min=True)),
        "min_p": st.one_of(st.just(0.0), st.floats(0, 1)),
        "seed": st.integers(0, 2**64 - 1),
        "step": st.integers(0, 2**64 - 1),
    }
)


def make_logits(V, B, seed, scale, rounded, forbidden):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((B, V)) * scale).astype(np.float32)
    if rounded:  # many ties, and both zeros
        logits = np.round(logits)
    logits[rng.random((B, V)) < forbidden] = -np.inf
    logits[:, rng.integers(V)] = np.float32(scale / 3)
    return logits


@settings(max_examples=300, deadline=None)
@given(rows_of_logits, any_filters, st.one_of(st.just(0.0), st.floats(0, 1)))
def test_the_kernel_gives_the_tokens_of_the_reference(shape, filters, top_k_share):
    needs_kernel()
    logits = make_logits(*shape)
    filters["top_k"] = round(top_k_share * logits.shape[1])
    assert (select_tokens(logits, **filters) == token_selection_reference(logits, **filters)).all()


def test_the_kernel_gives_the_tokens_of_the_reference_for_a_real_vocabulary():
    needs_kernel()
    logits = np.random.default_rng(0).standard_normal((4, 50257)).astype(np.float32) * np.float32(4)
    for filters in ({}, {"top_k": 40}, {"top_k": 40_000}, {"top_p": 0.95}, {"min_p": 0.02}):
        for step in range(5):
            expected = token_selection_reference(logits, temperature=0.9, step=step, **filters)
            assert (select_tokens(logits, temperature=0.9, step=step, **filters) == expected).all()


@pytest.mark.parametrize("order", ["ascending", "descending", "equal"])
def test_the_kernel_needs_no_luck_with_the_order_of_the_logits(order):
    needs_kernel()
    row = {"ascending": np.arange(9000), "descending": -np.arange(9000), "equal": np.zeros(9000)}[order]
    logits = np.float32([row]) / np.float32(500)
    for filters in ({"top_k": 1}, {"top_k": 700}, {"top_p": 0.5}, {"top_k": 8999, "top_p": 0.999}):
        expected = token_selection_reference(logits, temperature=1.0, **filters)
        assert (select_tokens(logits, temperature=1.0, **filters) == expected).all()


@pytest.mark.no_kernel("it counts the calls in processes of its own")
def test_every_instruction_set_gives_the_same_tokens():
    needs_kernel()
    program = (
        "import numpy as np\n"
        "from portlm import _C\n"
        "from portlm.ops.token_selection import select_tokens\n"
        "x = np.random.default_rng(3).standard_normal((40, 3001)).astype(np.float32) * np.float32(3)\n"
        "for f in ({}, {'top_k': 9}, {'top_p': .9}, {'min_p': .1}, {'temperature': 0.0}):\n"
        "    print(select_tokens(x, **{'temperature': 1.1, 'seed': 5, **f}).tolist())\n"
        "assert _C.kernel_calls()['select_tokens'][_C.isa()] == 5\n"
    )
    answers = {
        isa: subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PORTLM_ISA": isa}, capture_output=True, text=True, check=True, timeout=60,
        ).stdout
        for isa in token_selection.kernels.usable_isas()
    }  # fmt: skip
    assert len(set(answers.values())) == 1, sorted(answers)


def test_a_difference_in_the_last_digits_of_the_logits_does_not_change_tokens():
    """Engines agree to about 1e-6; a token changes only if its random number is that close to a boundary."""
    rng = np.random.default_rng(2)
    logits = np.repeat(rng.standard_normal((1, 500)).astype(np.float32) * np.float32(2), 2000, axis=0)
    other = logits + rng.uniform(-1e-6, 1e-6, logits.shape).astype(np.float32)
    changed = draws_differ(logits, other)
    assert changed <= 1  # expected 2000 * 1e-6 * a few


def draws_differ(a, b):
    return int((select_tokens(a, temperature=1.0, seed=1) != select_tokens(b, temperature=1.0, seed=1)).sum())


# --- random numbers -------------------------------------------------------------------------------


@pytest.mark.no_kernel("it is about the reference's random numbers")
@settings(max_examples=50, deadline=None)
@given(st.tuples(*[st.integers(0, 2**64 - 1)] * 4), st.tuples(*[st.integers(0, 2**64 - 1)] * 2))
def test_philox_gives_the_words_of_numpys_philox(counter, key):
    """Numpy counts up before it draws, so its generator is set one step back."""
    whole = (sum(word << (64 * i) for i, word in enumerate(counter)) - 1) % 2**256
    theirs = np.random.Philox(counter=whole, key=sum(word << (64 * i) for i, word in enumerate(key)))
    assert philox4x64(counter, key) == tuple(int(word) for word in theirs.random_raw(4))


@pytest.mark.no_kernel("it is about the reference's random numbers")
def test_random_units_are_uniform():
    """Kolmogorov's statistic of 10 000 numbers exceeds 2.6 once in 10^5 seeds."""
    u = np.sort([random_unit(a, b, c) for a in range(10) for b in range(10) for c in range(100)])
    gap = np.abs(u - (np.arange(u.size) + 0.5) / u.size).max() * np.sqrt(u.size)
    assert gap < 2.6
    assert 0 <= u[0] <= u[-1] < 1


@BOTH
def test_a_row_draws_the_same_number_alone_and_in_a_batch(select):
    logits = np.random.default_rng(4).standard_normal((8, 300)).astype(np.float32)
    together = select(logits, temperature=1.0, seed=9, step=3)
    alone = [select(logits[i : i + 1], temperature=1.0, seed=9, step=3, rows=[i])[0] for i in range(8)]
    assert together.tolist() == alone
    seeds = list(range(8))
    together = select(logits, temperature=1.0, seed=seeds, rows=[0] * 8)
    assert together.tolist() == [select(logits[i : i + 1], temperature=1.0, seed=i)[0] for i in range(8)]


def test_seed_row_and_step_each_change_the_draw():
    logits = [0.0] * 1000
    base = draws(logits, 50, temperature=1.0, seed=0, step=0)
    assert len(set(base)) > 30
    assert (draws(logits, 50, temperature=1.0, seed=1, step=0) != base).sum() > 40
    assert (draws(logits, 50, temperature=1.0, seed=0, step=1) != base).sum() > 40
    assert (draws(logits, 50, temperature=1.0, seed=0, step=0) == base).all()


# --- what is refused ------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([0, np.nan, 0], "row 1: the logit of token 1 is nan"),
        ([0, 0, np.inf], "row 1: the logit of token 2 is inf"),
        ([-np.inf] * 3, "row 1: every logit is -inf"),
    ],
)
def test_logits_without_a_meaning_are_an_error_that_names_the_row(select, temperature, bad, words):
    logits = np.float32([[1, 2, 3], bad])
    with pytest.raises(PortlmError, match=words):
        select(logits, temperature=temperature)


@BOTH
@pytest.mark.parametrize("V", [15, 16, 17, 1500])
def test_one_nan_anywhere_is_found(select, V):
    for position in range(0, V, 7):
        logits = np.zeros((1, V), np.float32)
        logits[0, position] = np.nan
        with pytest.raises(PortlmError, match=f"token {position} is nan"):
            select(logits)


@pytest.mark.no_kernel("refused before a kernel is called")
@BOTH
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("temperature", -1), ("temperature", float("nan")), ("temperature", float("inf")),
        ("temperature", "hot"),
        ("top_k", -1), ("top_k", 5), ("top_k", 1.5), ("top_k", 2**70),
        ("top_p", 0), ("top_p", 1.1), ("top_p", float("nan")), ("top_p", None),
        ("min_p", -0.1), ("min_p", 1.1), ("min_p", float("nan")), ("min_p", True),
        ("seed", -1), ("seed", 2**64), ("seed", 0.5), ("seed", [1, 2, 3]), ("seed", None),
        ("step", -1), ("step", "1"), ("rows", [0]), ("rows", [0, -1]),
    ],
)  # fmt: skip
def test_an_argument_out_of_range_is_named(select, argument, value):
    with pytest.raises(UsageError, match=rf"\[token_selection\] .*{argument.removesuffix('s')}"):
        select(np.zeros((2, 4), np.float32), **{argument: value})


@pytest.mark.no_kernel("refused before a kernel is called")
@BOTH
@pytest.mark.parametrize(
    "logits",
    [np.zeros((2, 4)), np.zeros(4, np.float32), np.zeros((2, 0), np.float32), [[1.0, 2.0]]],
    ids=["float64", "one dimension", "no tokens", "a list"],
)
def test_logits_of_another_kind_are_refused(select, logits):
    with pytest.raises(UsageError, match="logits"):
        select(logits)


@BOTH
def test_no_rows_give_no_tokens(select):
    assert select(np.zeros((0, 5), np.float32), temperature=1.0).shape == (0,)


@BOTH
def test_logits_need_not_be_contiguous(select):
    logits = np.random.default_rng(1).standard_normal((6, 40)).astype(np.float32)
    part = logits[::2, ::4]
    assert (select(part, temperature=1.0) == select(part.copy(), temperature=1.0)).all()


@pytest.mark.no_kernel("nothing is computed")
def test_importing_it_loads_no_torch():
    program = "import sys, portlm.ops.token_selection; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
