"""GPTQ: what it promises of a matrix for given inputs, against rounding to nearest and against its definition."""

import numpy as np
import pytest

from portlm.compile import gptq as module
from portlm.compile.gptq import gptq
from portlm.compile.quantize import RoundToNearest, Scheme, dequantize
from portlm.errors import PortlmError

INT4 = Scheme(4, 32)
SCHEMES = [INT4, Scheme(4, 32, False), Scheme(4, 64), Scheme(8, 32), Scheme(8, 32, False)]
schemes = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def case(N: int, K: int, tokens: int, seed: int = 0):
    """A matrix, and inputs that are correlated as those of a layer are: few directions carry most."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((K, K)) * np.arange(1, K + 1) ** -0.7
    x = rng.standard_normal((tokens, K)) @ mixing.T
    return rng.standard_normal((N, K)).astype(np.float32), x, x.T @ x / tokens


def rounded(weight, scheme=INT4):
    return RoundToNearest(scheme)("w", weight)


def output_error(x, weight, quantized, scheme=INT4) -> float:
    return float((((weight - dequantize(quantized, scheme)).astype(np.float64) @ x.T) ** 2).mean())


def by_definition(weight, start, H, damping, scheme):
    """Each column rounded in turn; those that are free then solve the least squares problem, afresh, in float64."""
    N, K = weight.shape
    scale = np.repeat(start.scale.astype(np.float64), scheme.group, axis=1)
    zero = np.full((N, K), float(scheme.middle))
    if start.zero is not None:
        zero = np.repeat(start.zero.astype(np.float64), scheme.group, axis=1)
    H = H + damping * np.diag(H).mean() * np.eye(K)
    order = np.argsort(-np.diag(H), kind="stable")
    target = weight.astype(np.float64)
    found, q = target.copy(), np.zeros((N, K))
    for j, k in enumerate(order):
        q[:, k] = np.clip(np.rint(found[:, k] / scale[:, k]) + zero[:, k], 0, scheme.top)
        done, free = order[: j + 1], order[j + 1 :]
        found[:, k] = scale[:, k] * (q[:, k] - zero[:, k])
        error = target[:, done] - found[:, done]
        # the minimum of (w - v) H (w - v)^T over the free v
        found[:, free] = (
            target[:, free] + np.linalg.solve(H[np.ix_(free, free)], H[np.ix_(free, done)] @ error.T).T
        )
    return q.astype(np.uint8)


@schemes
def test_outputs_for_correlated_inputs_are_nearer_than_by_rounding(scheme):
    """A third of the error of rounding at most; 7 to 18 % was measured on such inputs."""
    weight, x, H = case(48, 192, 1024)
    plain = output_error(x, weight, rounded(weight, scheme), scheme)
    assert output_error(x, weight, gptq(weight, H, scheme), scheme) < plain / 3


def test_the_gain_holds_for_inputs_that_were_not_calibrated_with():
    weight, x, _ = case(48, 96, 8192)
    seen, unseen = x[:4096], x[4096:]
    plain = output_error(unseen, weight, rounded(weight))
    assert output_error(unseen, weight, gptq(weight, seen.T @ seen, INT4)) < plain / 3


@schemes
def test_unrelated_inputs_of_equal_size_give_rounding_to_nearest(scheme):
    weight, _, _ = case(16, 128, 1)
    found = gptq(weight, 3.0 * np.eye(128), scheme)
    plain = rounded(weight, scheme)
    for field in ("q", "scale", "zero"):
        assert np.array_equal(getattr(found, field), getattr(plain, field))


@schemes
def test_the_integers_are_those_of_the_definition(scheme):
    """Solved afresh for each column in float64: the same integers but for ties that rounding errors of 1e-12 decide."""
    weight, _, H = case(6, 64, 256)
    start = rounded(weight, scheme)
    found = gptq(weight, H, scheme)
    assert np.array_equal(found.q, by_definition(weight, start, H, module.DAMPING, scheme))


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_blocks_and_parts_of_the_rows_change_nothing(block, monkeypatch):
    weight, _, H = case(37, 160, 512)
    expected = gptq(weight, H, INT4)
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 160 * 5)
    assert np.array_equal(gptq(weight, H, INT4).q, expected.q)


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_the_size_of_the_inputs_does_not_matter(factor):
    weight, _, H = case(8, 64, 256)
    assert np.array_equal(gptq(weight, factor * H, INT4).q, gptq(weight, H, INT4).q)


def test_fewer_tokens_than_inputs_are_enough_to_go_on():
    """Then the moments are singular, and only the damping makes them invertible."""
    weight, x, _ = case(16, 64, 5)
    found = gptq(weight, x.T @ x / len(x), INT4)
    assert output_error(x, weight, found) < output_error(x, weight, rounded(weight)) / 3


def test_columns_whose_input_was_always_0_are_rounded_to_nearest():
    weight, x, _ = case(16, 64, 256)
    dead = [0, 5, 40, 63]
    x[:, dead] = 0.0
    found, plain = gptq(weight, x.T @ x, INT4), rounded(weight)
    assert np.array_equal(found.q[:, dead], plain.q[:, dead])
    assert output_error(x, weight, found) < output_error(x, weight, plain)


def test_a_matrix_that_no_input_ever_reaches_is_rounded_to_nearest():
    weight, _, _ = case(4, 32, 1)
    assert np.array_equal(gptq(weight, np.zeros((32, 32)), INT4).q, rounded(weight).q)


def test_a_group_of_zeros_stays_a_group_of_zeros():
    """Its scale is 0, so nothing that other columns push into it can be said."""
    weight, _, H = case(4, 64, 256)
    weight[1, :32] = 0.0
    found = gptq(weight, H, INT4)
    assert found.scale[1, 0] == 0
    assert not dequantize(found, INT4)[1, :32].any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_moments_that_are_not_finite_are_refused(value):
    weight, _, H = case(4, 32, 64)
    H[3, 7] = H[7, 3] = value
    with pytest.raises(PortlmError, match=r"input 3 are not finite"):
        gptq(weight, H, INT4)


def test_what_cannot_be_moments_is_refused():
    weight, _, H = case(4, 32, 64)
    with pytest.raises(PortlmError, match="mean square of input 2 is negative"):
        gptq(weight, H - np.diag([0, 0, 1e3] + [0] * 29), INT4)
    with pytest.raises(
        PortlmError, match="cannot be factorised: calibrate with more text, or a larger damping"
    ):
        gptq(weight, np.ones((32, 32)) - 0.9 * np.eye(32), INT4)
    with pytest.raises(
        ValueError, match=r"moments must be \(32, 32\) for a matrix of 32 inputs, got \(31, 31\)"
    ):
        gptq(weight, H[1:, 1:], INT4)
