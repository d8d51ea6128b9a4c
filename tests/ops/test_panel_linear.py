"""The linear map of packed files: against float64, on any rows, threads and shapes."""

import math

import numpy as np
import pytest

kernels = pytest.importorskip("portlm._C", reason="portlm._C was not built")

from portlm.panels import in_panels  # noqa: E402

pytestmark = pytest.mark.runs_kernel("panel_linear")
DEPTH = 256  # products in one sum before it joins the total
EPSILON = 2.0**-24
NAMES = ("none", "gelu", "gelu_tanh", "relu_squared", "relu")
CANARY = np.float32(12345.0)


def address(array):
    return 0 if array is None else array.ctypes.data


def run(x, W, bias=None, activation=0):
    """What the kernel makes of x (rows, K) and W (N, K); memory behind y must stay as it was."""
    rows, N = len(x), len(W)
    x, panels = np.ascontiguousarray(x), np.ascontiguousarray(in_panels(W))
    y = np.full(rows * N + 64, CANARY)
    kernels.panel_linear(
        address(x), address(panels), address(bias), address(y), rows, N, W.shape[1], activation
    )
    assert (y[rows * N :] == CANARY).all()
    return y[: rows * N].reshape(rows, N)


def exact(x, W, bias, activation):
    z = x.astype(np.float64) @ W.T.astype(np.float64) + (0 if bias is None else bias.astype(np.float64))
    if activation == 1:
        return z * 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))
    if activation == 2:
        return z * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    return np.maximum(z, 0) ** 2 if activation == 3 else np.maximum(z, 0) if activation == 4 else z


def sample(rows, N, K, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape, np.float32) for shape in ((rows, K), (N, K), (N,)))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 13, 127, 200])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (15, 7), (63, 256), (64, 257), (65, 64), (200, 600), (130, 1)])
def test_it_is_as_near_to_float64_as_sums_of_this_length_can_be(N, K, rows, has_bias):
    """Each product and each addition rounds once: K of them in chains of at most DEPTH, and the chains' sums."""
    x, W, bias = sample(rows, N, K)
    bias = bias if has_bias else None
    steps = min(K, DEPTH) + math.ceil(K / DEPTH) + 1
    sizes = exact(np.abs(x), np.abs(W), None if bias is None else np.abs(bias), 0)
    bound = 1.01 * steps * EPSILON * sizes
    assert (np.abs(run(x, W, bias) - exact(x, W, bias, 0)) <= bound).all()


@pytest.mark.parametrize("activation", [1, 2, 3, 4], ids=NAMES[1:])
@pytest.mark.parametrize(("rows", "N", "K"), [(1, 100, 33), (9, 64, 300)])
def test_activations_are_those_of_their_names(activation, rows, N, K):
    """Slopes are small here, and the polynomials add some units in the last place to what the sums have."""
    x, W, bias = sample(rows, N, K)
    x /= math.sqrt(K)
    wanted = exact(x, W, bias, activation)
    np.testing.assert_allclose(run(x, W, bias, activation), wanted, rtol=1e-5, atol=2e-6, equal_nan=False)


@pytest.mark.parametrize("activation", range(5), ids=NAMES)
def test_a_row_is_the_same_bits_alone_and_among_others(activation):
    x, W, bias = sample(23, 130, 517)
    together = run(x, W, bias, activation)
    for first, last in ((0, 1), (7, 8), (3, 9), (22, 23)):
        assert run(x[first:last], W, bias, activation).tobytes() == together[first:last].tobytes()


@pytest.mark.parametrize("K", [1, 88, 517])
def test_a_row_is_the_same_bits_beside_any_number_of_others(K):
    """Rows are cut into groups of like size, and each size has a tile of its own."""
    x, W, bias = sample(130, 200, K)
    together = run(x, W, bias)
    for rows in (*range(1, 15), 127):
        assert run(x[-rows:], W, bias).tobytes() == together[-rows:].tobytes()


@pytest.mark.parametrize("rows", [1, 6, 300])
def test_it_is_the_same_bits_on_any_number_of_threads(rows):
    x, W, bias = sample(rows, 1000, 600)
    before = kernels.set_threads(1)
    try:
        single = run(x, W, bias, 2)
        for threads in (2, 3, 7):
            kernels.set_threads(threads)
            assert run(x, W, bias, 2).tobytes() == single.tobytes()
    finally:
        kernels.set_threads(before)


@pytest.mark.parametrize("activation", range(5), ids=NAMES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_reaches_its_row_and_no_other(activation, value):
    x, W, bias = sample(8, 70, 40)
    x[5, 3] = value
    y = run(x, W, bias, activation)
    assert np.isfinite(np.delete(y, 5, axis=0)).all()
    assert not np.isfinite(y[5]).all()
    assert np.isnan(y[5]).all() or value == np.inf


def test_no_rows_and_no_columns_are_nothing_and_no_products_are_the_bias():
    assert run(np.zeros((0, 5), np.float32), np.ones((3, 5), np.float32)).size == 0
    bias = np.arange(5, dtype=np.float32)
    assert (
        run(np.zeros((2, 0), np.float32), np.zeros((5, 0), np.float32), bias).tolist() == [bias.tolist()] * 2
    )


@pytest.mark.no_kernel("it is about panel_rows, which is called and counted here")
@pytest.mark.parametrize(("V", "K"), [(1, 1), (64, 3), (65, 16), (200, 70)])
def test_rows_of_a_matrix_in_panels_are_found_and_others_refused(V, K):
    _, W, _ = sample(1, V, K)
    panels = np.ascontiguousarray(in_panels(W))
    ids = np.random.default_rng(1).integers(0, V, 33)
    y = np.full((33, K), CANARY)
    before = kernels.kernel_calls()["panel_rows"][kernels.isa()]
    assert kernels.panel_rows(address(ids), address(panels), address(y), 33, V, K) == -1
    assert kernels.kernel_calls()["panel_rows"][kernels.isa()] == before + 1
    assert y.tobytes() == W[ids].tobytes()
    for wrong in (-1, V, 2**62, -(2**63)):
        ids[7], y[:] = wrong, CANARY
        assert kernels.panel_rows(address(ids), address(panels), address(y), 33, V, K) == 7
        assert (y == CANARY).all()
