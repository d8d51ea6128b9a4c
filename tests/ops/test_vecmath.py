"""The elementary functions under every kernel against float64, over the whole range of float32."""

import math

import numpy as np
import pytest
import torch

from portlm.ops.kernel_op import kernels

if kernels is None:
    pytest.skip("portlm._C was not built", allow_module_level=True)

FUNCTIONS = {
    "exp": (0, torch.exp),
    "log": (1, torch.log),
    "tanh": (2, torch.tanh),
    "erf": (3, torch.erf),
    "sigmoid": (4, torch.sigmoid),
    "silu": (5, torch.nn.functional.silu),
}
MOST_ULP = {
    "exp": 1.0,
    "log": 1.0,
    "tanh": 1.5,
    "erf": 1.6,
    "sigmoid": 2.5,
    "silu": 2.5,
}  # what vecmath.h says
TINIEST = float(np.finfo(np.float32).tiny)


def apply(name: str, x: np.ndarray) -> np.ndarray:
    x, y = np.ascontiguousarray(x, np.float32), np.empty(x.shape, np.float32)
    assert kernels.elementary(FUNCTIONS[name][0], x.ctypes.data, y.ctypes.data, x.size) == 0
    return y


def arguments(name: str) -> np.ndarray:
    """Return 2^20 floats of every magnitude, and as many evenly spread where the function is not yet constant."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 2**20, dtype=np.uint32).view(np.float32)
    x = np.concatenate([bits[np.isfinite(bits)], rng.uniform(-20, 20, 2**20).astype(np.float32)])
    return np.abs(x) if name == "log" else x


@pytest.mark.parametrize("name", FUNCTIONS)
def test_error_in_ulp_is_as_documented(name):
    x = arguments(name)
    y = apply(name, x)
    exact = FUNCTIONS[name][1](torch.from_numpy(x.astype(np.float64))).numpy()
    # Compared where float32 holds the result with full precision: subnormal results may flush to zero.
    normal = (np.abs(exact) > TINIEST * 4) & (np.abs(exact) < np.finfo(np.float32).max)
    if name in ("sigmoid", "silu"):
        normal &= x > -87  # beyond, e^-x overflows
    ulp = np.spacing(np.abs(exact[normal]).astype(np.float32)).astype(np.float64)
    worst = float((np.abs(y[normal] - exact[normal]) / ulp).max())
    assert worst <= MOST_ULP[name], worst
    assert (
        np.abs(y[~normal & np.isfinite(exact) & (np.abs(exact) <= TINIEST * 4)]).max(initial=0) <= 5 * TINIEST
    )


@pytest.mark.parametrize("name", ["tanh", "erf"])
def test_odd_functions_keep_the_sign_of_zero_and_small_arguments(name):
    x = np.array([0.0, -0.0, 1e-30, -1e-30, 1e-38, 1e-45], np.float32)
    y = apply(name, x)
    slope = 1.0 if name == "tanh" else 2 / math.sqrt(math.pi)
    np.testing.assert_allclose(y, x * np.float64(slope), rtol=2e-7, atol=1e-45, equal_nan=False)
    assert np.array_equal(np.signbit(y), np.signbit(x))


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("exp", {math.inf: math.inf, -math.inf: 0.0, 0.0: 1.0, 1e30: math.inf, -1e30: 0.0}),
        ("log", {math.inf: math.inf, 0.0: -math.inf, 1.0: 0.0, -1.0: math.nan, -math.inf: math.nan}),
        ("tanh", {math.inf: 1.0, -math.inf: -1.0, 1e30: 1.0, -1e30: -1.0}),
        ("erf", {math.inf: 1.0, -math.inf: -1.0, 1e30: 1.0, -1e30: -1.0}),
        ("sigmoid", {math.inf: 1.0, -math.inf: 0.0, 0.0: 0.5, 1e30: 1.0, -1e30: 0.0}),
        ("silu", {math.inf: math.inf, 0.0: 0.0, 1e30: 1e30, -1e30: 0.0}),
    ],
)
def test_limits(name, at):
    x = np.array([*at, math.nan], np.float32)
    np.testing.assert_array_equal(apply(name, x), np.array([*at.values(), math.nan], np.float32))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_tails_equal_whole_vectors(name):
    x = np.abs(np.random.default_rng(1).normal(size=67)).astype(np.float32)
    whole = apply(name, np.resize(x, 67 * 16))[:67]
    for n in (0, 1, 15, 17, 31, 33, 67):
        np.testing.assert_array_equal(apply(name, x[:n]), whole[:n])


def test_an_unknown_function_is_refused():
    assert kernels.elementary(99, 0, 0, 0) == -1
