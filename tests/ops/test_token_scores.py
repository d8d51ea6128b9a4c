import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from portlm.errors import UsageError
from portlm.ops.compiled import kernels
from portlm.ops.token_scores import token_scores, token_scores_reference

BOTH = pytest.mark.parametrize(
    "score",
    [
        pytest.param(token_scores_reference, id="reference", marks=pytest.mark.no_kernel("the reference")),
        pytest.param(token_scores, id="kernel"),
    ],
)
SIZES = [1, 2, 15, 16, 17, 31, 33, 255, 256, 257, 1023, 1025, 5003, 50_257]


def oracle(logits, targets):
    """Log-probabilities in 80 bits where the machine has them."""
    x = logits.astype(np.longdouble)
    largest = x.max(1)
    chosen = np.take_along_axis(x, targets[:, None], 1)[:, 0]
    return chosen - largest - np.log(np.exp(x - largest[:, None]).sum(1))


def drawn(rows, V, scale=4.0, seed=0):
    rng = np.random.default_rng(seed + V)
    logits = rng.standard_normal((rows, V)).astype(np.float32) * np.float32(scale)
    return logits, rng.integers(0, V, rows)


def allowed(logits, targets):
    """One rounding of either term of the difference, and a sum whose terms and additions are wrong by 2e-14 of it."""
    size = np.abs(logits).max(1).astype(np.float64) + np.log(logits.shape[1])
    return 2 * np.finfo(np.float64).eps * size + 2e-14


@pytest.mark.parametrize("scale", [0.1, 4.0, 100.0])
@pytest.mark.parametrize("V", SIZES)
def test_scores_are_as_accurate_as_rounding_allows(V, scale):
    _check_with_a_longer_float(token_scores, V, scale)


@pytest.mark.no_kernel("the reference")
@pytest.mark.parametrize("scale", [0.1, 4.0, 100.0])
@pytest.mark.parametrize("V", SIZES)
def test_the_reference_gives_the_scores_of_a_longer_float(V, scale):
    _check_with_a_longer_float(token_scores_reference, V, scale)


def _check_with_a_longer_float(score, V, scale):
    logits, targets = drawn(7, V, scale)
    found, best = score(logits, targets)
    assert (np.abs(found - oracle(logits, targets)) <= allowed(logits, targets)).all()
    assert (best == logits.argmax(1)).all()


@BOTH
def test_infinities_forbid_or_spoil_and_nan_spoils(score):
    inf, nan = np.inf, np.nan
    logits = np.float32([
        [0, -inf, 0, -inf], [nan, 1, 2, 3], [1, 2, 3, nan], [1, inf, 2, 3], [-inf] * 4,
        [-inf, -inf, -inf, 5], [-0.0, 0.0, -1, -1],
    ])  # fmt: skip
    targets = np.array([2, 1, 1, 1, 0, 3, 0])
    found, best = score(logits, targets)
    assert best.tolist() == [0, -1, -1, -1, -1, 3, 0]
    assert found[0] == pytest.approx(-np.log(2), abs=1e-15)
    assert np.isnan(found[1:5]).all()
    assert found[5] == 0
    assert score(logits[:1], np.array([1]))[0] == -inf


@BOTH
def test_the_largest_floats_do_not_overflow(score):
    logits = np.float32([[3e38, -3e38, 3e38], [-3e38, -3.1e38, -3e38]])
    found, best = score(logits, np.array([2, 0]))
    assert found == pytest.approx([-np.log(2)] * 2, abs=1e-15)
    assert best.tolist() == [0, 0]


def test_logits_may_begin_anywhere_in_memory():
    memory, targets = drawn(1, 3 * 1001 + 1)[0].ravel(), np.array([0, 500, 1000])
    logits = memory[1:].reshape(3, 1001)
    assert (token_scores(logits, targets)[0] == token_scores(logits.copy(), targets)[0]).all()
    strided = memory[: 3 * 1000].reshape(3, 1000)[:, ::2]
    assert (token_scores(strided, targets[:3] // 3)[0] == token_scores(strided.copy(), targets // 3)[0]).all()


def test_a_row_scores_the_same_alone_and_among_others_and_on_any_number_of_threads():
    logits, targets = drawn(40, 4001)
    before = kernels.set_threads(1)
    try:
        expected = token_scores(logits, targets)[0]
        for threads in (2, 3):
            kernels.set_threads(threads)
            assert (token_scores(logits, targets)[0] == expected).all()
    finally:
        kernels.set_threads(before)
    alone = [token_scores(logits[r : r + 1], targets[r : r + 1])[0][0] for r in range(40)]
    assert (expected == alone).all()


@pytest.mark.parametrize("targeted", [True, False])
def test_a_part_of_a_row_says_what_it_knows(targeted):
    """Ids from 100 on, of which one row's target is none, and one is all -inf."""
    logits, _ = drawn(3, 37)
    logits[2] = -np.inf
    targets, parts = np.array([136, 99, 100]), np.full((3, 4), 7.0)
    kernels.score_logits(
        logits.ctypes.data, 3, 37, 100, targets.ctypes.data if targeted else 0, parts.ctypes.data
    )
    assert (parts[:, 0] == [*logits[:2].max(1), -np.inf]).all()
    assert (parts[:, 1] == [*(logits[:2].argmax(1) + 100), -1]).all()
    if not targeted:
        assert (parts[:, 2:] == 7.0).all()
        return
    sums = np.exp(logits[:2].astype(np.float64) - parts[:2, :1]).sum(1)
    assert parts[:2, 2] == pytest.approx(sums, rel=1e-13)
    assert parts[2, 2] == 0
    assert parts[:, 3].tolist() == [logits[0, 36], -np.inf, -np.inf]


@pytest.mark.no_kernel("it counts the calls in processes of its own")
def test_every_instruction_set_gives_the_same_scores():
    program = (
        "import numpy as np, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import test_token_scores as t\n"
        "for V in (1, 7, 257, 3001):\n"
        "    logits, targets = t.drawn(20, V)\n"
        "    found, best = t.token_scores(logits, targets)\n"
        "    assert (np.abs(found - t.oracle(logits, targets)) <= t.allowed(logits, targets)).all()\n"
        "    print(found.tolist(), best.tolist())\n"
        "assert t.kernels.kernel_calls()['score_logits'][t.kernels.isa()] == 4\n"
    )
    answers = {
        isa: subprocess.run(
            [sys.executable, "-c", program, str(Path(__file__).parent)],
            env={**os.environ, "PORTLM_ISA": isa}, capture_output=True, text=True, check=True, timeout=60,
        ).stdout
        for isa in kernels.usable_isas()
    }  # fmt: skip
    assert len(set(answers.values())) == 1, sorted(answers)


@BOTH
def test_nothing_scores_nothing(score):
    found, best = score(np.zeros((0, 5), np.float32), np.zeros(0, np.int64))
    assert found.shape == best.shape == (0,)


@pytest.mark.no_kernel("nothing of it reaches the kernel")
@pytest.mark.parametrize(
    ("logits", "targets", "said"),
    [
        (np.zeros((2, 5)), np.zeros(2, np.int64), "float32 of 2 axes, got float64"),
        (np.zeros(5, np.float32), np.zeros(2, np.int64), "of 2 axes, got float32"),
        (np.zeros((2, 0), np.float32), np.zeros(2, np.int64), "one target is needed"),
        (np.zeros((2, 5), np.float32), np.zeros(3, np.int64), "one target is needed"),
        (np.zeros((2, 5), np.float32), np.zeros(2, np.int32), "int64 of 1 axes, got int32"),
        (np.zeros((2, 5), np.float32), np.array([0, 5]), "from 0 to 4, got 0 to 5"),
        (np.zeros((2, 5), np.float32), np.array([-1, 2]), "from 0 to 4, got -1 to 2"),
        ([[1.0]], np.array([0]), "got list"),
    ],
)
@pytest.mark.parametrize("score", [token_scores_reference, token_scores])
def test_what_does_not_fit_is_refused(score, logits, targets, said):
    with pytest.raises(UsageError, match=said):
        score(logits, targets)
