"""half_linear: the linear map of weights of 16 bits against float64, in all its forms, and its errors."""

import math

import numpy as np
import pytest

kernels = pytest.importorskip("portlm._C", reason="portlm._C was not built")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

import torch  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402

from portlm.ops.compiled import without_kernels  # noqa: E402
from portlm.ops.half import pack, pack_array  # noqa: E402
from portlm.ops.half_linear import half_linear, half_linear_reference  # noqa: E402

pytestmark = pytest.mark.runs_kernel("half_linear", "half_panels")
BFLOAT16 = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
KINDS = {"float16": np.dtype(np.float16), "bfloat16": BFLOAT16}
TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16}
DEPTH = 256  # products in one sum before it joins the total
EPSILON = 2.0**-24
CANARY = np.float32(12345.0)


def numbers(sizes, rng):
    """A weight of 16 bits."""
    return {"weight": rng.standard_normal((sizes["N"], sizes["K"])).astype(KINDS[sizes["kind"]])}


MATRIX = {
    "HalfLinear": {
        "shapes": {"x": "batch sequence K", "weight": "N K", "bias": "N"},
        "variants": [
            {"K": 67, "N": 133, "kind": "bfloat16"},
            {"K": 67, "N": 64, "kind": "float16", "absent": ("bias",)},
            {"K": 33, "N": 70, "kind": "bfloat16", "activation": "gelu"},
            {"K": 33, "N": 70, "kind": "float16", "activation": "gelu_tanh"},
            {"K": 33, "N": 70, "kind": "bfloat16", "activation": "relu_squared", "absent": ("bias",)},
        ],
        "fill": numbers,
        "tvm_kernels": ("half_linear",),
    }
}


def shifted(array, by):
    """A copy that begins `by` elements behind where it is aligned."""
    room = np.empty(array.size + by, array.dtype)
    room[by:] = array.reshape(-1)
    return room[by:].reshape(array.shape)


def run(x, W, bias=None, activation=0, shift=0):
    """What the kernel makes of x (rows, K) and W (N, K) of 16 bits; memory behind y must stay as it was."""
    rows, N = len(x), len(W)
    x, panels = shifted(np.ascontiguousarray(x), shift), shifted(pack_array(W), shift)
    bias = None if bias is None else shifted(bias, shift)
    y = np.full(rows * N + 64 + shift, CANARY)[shift:]
    kernels.half_linear(
        x.ctypes.data, panels.ctypes.data, 0 if bias is None else bias.ctypes.data, y.ctypes.data, rows, N,
        W.shape[1], int(W.dtype == BFLOAT16), activation,
    )  # fmt: skip
    assert (y[rows * N :] == CANARY).all()
    return y[: rows * N].reshape(rows, N)


def sample(rows, N, K, kind, seed=0):
    rng = np.random.default_rng(seed)
    x, W, bias = (rng.standard_normal(shape, np.float32) for shape in ((rows, K), (N, K), (N,)))
    return x, W.astype(KINDS[kind]), bias


def exact(x, W, bias=None):
    z = x.astype(np.float64) @ W.astype(np.float64).T
    return z if bias is None else z + bias


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2, 6, 7, 130])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (15, 7), (63, 256), (64, 257), (65, 64), (200, 600)])
def test_the_kernel_is_as_near_to_float64_as_sums_of_this_length_can_be(N, K, rows, kind, shift):
    """Widening is exact; each product and each addition rounds once: K in chains of DEPTH, and the chains' sums."""
    x, W, bias = sample(rows, N, K, kind)
    bias = bias if shift else None
    steps = min(K, DEPTH) + math.ceil(K / DEPTH) + 1
    sizes = exact(np.abs(x), np.abs(W), None if bias is None else np.abs(bias))
    assert (np.abs(run(x, W, bias, shift=shift) - exact(x, W, bias)) <= 1.01 * steps * EPSILON * sizes).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 9])
def test_the_op_is_as_accurate_as_its_kernel(rows, kind):
    x, W, bias = sample(rows, 65, 64, kind)
    weight = torch.from_numpy(W.view(np.int16)).view(TORCH[kind])
    found = half_linear(torch.from_numpy(x), weight, torch.from_numpy(bias)).numpy()
    sizes = exact(np.abs(x), np.abs(W), np.abs(bias))
    assert (np.abs(found - exact(x, W, bias)) <= 1.01 * (64 + 2) * EPSILON * sizes).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 9])
def test_it_is_the_float32_kernel_on_the_same_numbers_to_the_bit(rows, kind):
    from portlm.compile.packed_file import in_panels

    x, W, bias = sample(rows, 130, 517, kind)
    panels = np.ascontiguousarray(in_panels(W.astype(np.float32)))
    y = np.empty((rows, 130), np.float32)
    kernels.panel_linear(
        x.ctypes.data, panels.ctypes.data, bias.ctypes.data, y.ctypes.data, rows, 130, 517, 2
    )
    assert run(x, W, bias, 2).tobytes() == y.tobytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 6])
def test_every_number_of_16_bits_is_widened_exactly_nan_and_infinity_too(rows, kind):
    """All 65,536 of them, each the only weight of its output."""
    W = np.arange(2**16, dtype=np.uint16).view(KINDS[kind])[:, None]
    with np.errstate(invalid="ignore"):  # numpy says so where it widens a NaN that signals
        wanted = W.astype(np.float32)[:, 0]
    found = run(np.ones((rows, 1), np.float32), W)
    assert np.array_equal(found, np.tile(wanted, (rows, 1)), equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_reaches_its_output_and_no_other(value, kind):
    x, W, _ = sample(8, 70, 40, kind)
    W[33, 5] = value
    y = run(x, W)
    assert np.isfinite(np.delete(y, 33, axis=1)).all()
    assert not np.isfinite(y[:, 33]).any()


@pytest.mark.parametrize("rows", [1, 6, 300])
def test_it_is_the_same_bits_on_any_number_of_threads_and_beside_any_rows(rows):
    x, W, bias = sample(rows, 1000, 300, "bfloat16")
    before = kernels.set_threads(1)
    try:
        single = run(x, W, bias, 2)
        assert run(x[-1:], W, bias, 2).tobytes() == single[-1:].tobytes()
        for threads in (2, 7):
            kernels.set_threads(threads)
            assert run(x, W, bias, 2).tobytes() == single.tobytes()
    finally:
        kernels.set_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_before_or_not_and_without_kernels_it_is_the_same_map(kind):
    weight = torch.randn(70, 33).to(TORCH[kind])
    x, bias = torch.randn(2, 3, 33), torch.randn(70)
    panels = pack(weight)
    assert panels.shape == (2, 33, 64)
    assert panels.dtype == weight.dtype
    found = half_linear(x, weight, bias, "gelu")
    assert torch.equal(found, half_linear(x, weight, bias, "gelu", panels))
    torch.testing.assert_close(found, half_linear_reference(x, weight, bias, "gelu"))
    with without_kernels():
        assert torch.equal(half_linear(x, weight, bias), torch.nn.functional.linear(x, weight.float(), bias))


@pytest.mark.no_kernel("nothing is computed")
def test_what_does_not_fit_is_named():
    x, weight = torch.zeros(2, 33), torch.zeros(70, 33, dtype=torch.bfloat16)
    for wrong, message in (
        ({"weight": weight.float()}, "float16 or bfloat16 of two dimensions, got torch.float32"),
        ({"weight": weight[0]}, r"two dimensions, got torch.bfloat16 \(33,\)"),
        ({"x": x[:, 1:]}, r"x must be \(\.\.\., 33\) for a weight of \(70, 33\), got \(2, 32\)"),
        ({"bias": torch.zeros(33)}, r"bias must be \(70,\)"),
        ({"activation": "tanh"}, "activation must be one of none, gelu"),
        ({"packed": weight}, r"packed must be what portlm.ops.half.pack gives of weight \(70, 33\)"),
    ):
        with pytest.raises(ValueError, match=message):
            half_linear(**{"x": x, "weight": weight, **wrong})
