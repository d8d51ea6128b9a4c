"""quantized_linear against the matrix that its numbers mean, in float64, and its errors."""

import numpy as np
import pytest
import torch

pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

from portlm.compile.quantize import (
    Quantized,
    Scheme,
    dequantize,
    pack,
    pack_zeros,
)
from portlm.ops.kernel_op import without_kernels
from portlm.ops.narrow import ACTIVATIONS
from portlm.ops.quantized import pack as pack_for_kernels
from portlm.ops.quantized_linear import quantized_linear, quantized_linear_reference


def numbers(sizes, rng):
    """Random q, scales and zero points of a weight, as a graph has them."""
    rows, groups = sizes["N"], sizes["G"]
    return {
        "weight": rng.integers(0, 256, (rows, groups, sizes["b"])).astype(np.uint8),
        "scale": rng.uniform(-0.1, 0.1, (rows, groups)).astype(np.float16).astype(np.float32),
        "zero": rng.integers(0, 256, (rows, sizes["z"])).astype(np.uint8),
    }


MATRIX = {
    "QuantizedLinear": {
        "shapes": {
            "x": "batch sequence K",
            "weight": "N G b",
            "scale": "N G",
            "zero": "N z",
            "bias": "N",
        },
        "variants": [
            {"K": 96, "N": 17, "G": 3, "b": 16, "z": 2, "bits": 4},
            {"K": 96, "N": 17, "G": 3, "b": 16, "z": 2, "bits": 4, "absent": ("zero",), "activation": "gelu"},
            {"K": 128, "N": 33, "G": 2, "b": 32, "z": 1, "bits": 4, "absent": ("bias",)},
            {"K": 128, "N": 21, "G": 1, "b": 64, "z": 1, "bits": 4, "absent": ("zero", "bias")},
            {"K": 64, "N": 17, "G": 2, "b": 32, "z": 2, "bits": 8, "activation": "gelu_tanh"},
            {"K": 64, "N": 17, "G": 2, "b": 32, "z": 2, "bits": 8, "absent": ("zero",), "activation": "relu_squared"},
            {"K": 64, "N": 17, "G": 2, "b": 32, "z": 2, "bits": 8, "absent": ("bias",), "activation": "gelu"},
        ],
        "fill": numbers,
        "tvm_kernels": ("packed_linear",),
        # x is rounded to 15 bits: half a step of each is 1.6e-5 of the largest of its group, and 96 of them add up
        "rounding": 1e-4,
    }
}  # fmt: skip


def case(scheme, N=7, G=3, seed=0):
    """A weight's numbers, and their parts as tensors: weight, scale, zero."""
    rng = np.random.default_rng(seed)
    q = rng.integers(0, scheme.top + 1, (N, G * scheme.group)).astype(np.uint8)
    scale = rng.uniform(-1, 1, (N, G)).astype(np.float16).astype(np.float32)
    zero = None if scheme.symmetric else rng.integers(0, scheme.top + 1, (N, G)).astype(np.uint8)
    parts = pack(q, scheme), scale, None if zero is None else pack_zeros(zero, scheme)
    return Quantized(q, scale, zero), [None if p is None else torch.from_numpy(p) for p in parts]


@pytest.mark.no_kernel("about the reference: test_packed_linear.py is about the kernel")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "scheme",
    [Scheme(bits, group, symmetric) for bits, group in ((4, 32), (4, 128), (8, 64)) for symmetric in (True, False)],
    ids=str,
)  # fmt: skip
def test_quantized_linear_is_a_linear_map_of_what_the_exporter_means(scheme, activation, as_accurate):
    """The op and the exporter have each their own words for the same numbers."""
    matrix, (weight, scale, zero) = case(scheme)
    x, bias = torch.randn(2, 5, 3 * scheme.group), torch.randn(7)
    wide = torch.from_numpy(dequantize(matrix, scheme))
    after = {
        "none": lambda y: y,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
        "relu_squared": lambda y: y.clamp(min=0) ** 2,
        "relu": torch.relu,
    }[activation]
    eager = after(x @ wide.T + bias)
    oracle = after(x.double() @ wide.double().T + bias.double())
    with without_kernels():
        ours = quantized_linear(x, weight, scale, zero, bias, scheme.bits, activation)
    as_accurate(ours, eager, oracle)
    exact = quantized_linear_reference(
        x.double(), weight, scale.double(), zero, bias.double(), scheme.bits, activation
    )
    assert torch.allclose(exact, oracle, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_linear_is_as_accurate_as_activations_of_15_bits_allow(bits, symmetric):
    """The kernel is off by at most half a step of each activation, a 2^15th of the largest in its group."""
    scheme = Scheme(bits, 32, symmetric)
    matrix, (weight, scale, zero) = case(scheme, N=37)
    x, bias = torch.randn(3, 96), torch.randn(37)
    wide = torch.from_numpy(dequantize(matrix, scheme)).double()
    oracle = x.double() @ wide.T + bias.double()
    largest = x.double().abs().unflatten(-1, (3, 32)).amax(-1, keepdim=True).expand(3, 3, 32).flatten(1)
    allowed = (
        2.0**-14 * (largest @ wide.abs().T) + 1e-6 * oracle.abs()
    )  # twice that, and float32's own rounding
    ours = quantized_linear(x, weight, scale, zero, bias, bits)
    assert ((ours.double() - oracle).abs() <= allowed).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_linear_on_a_packed_weight_gives_the_bits_that_it_gives_without(
    bits, same_on_all_thread_counts
):
    """The plan of a graph packs once; x and bias may have any strides."""
    _, (weight, scale, zero) = case(Scheme(bits, 32, symmetric=False), N=37)
    x, bias = torch.randn(96, 5).T, torch.randn(74)[::2]
    packed = pack_for_kernels(weight, scale, zero, bits)
    alone = quantized_linear(x, weight, scale, zero, bias, bits, "gelu")
    assert torch.equal(quantized_linear(x, weight, scale, zero, bias, bits, "gelu", packed), alone)
    assert torch.equal(
        quantized_linear(x.contiguous(), weight, scale, zero, bias.contiguous(), bits, "gelu"), alone
    )
    assert same_on_all_thread_counts(
        lambda: [quantized_linear(x, weight, scale, zero, bias, bits, "gelu", packed)]
    )


@pytest.mark.no_kernel("refused before a kernel is called")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.zeros(2, 95)}, r"x must be \(\.\.\., 96\)"),
        ({"x": torch.zeros(())}, "x must be"),
        ({"weight": torch.zeros(7, 3, 16)}, "weight must be uint8"),
        ({"weight": torch.zeros(7, 48, dtype=torch.uint8)}, "weight must be uint8"),
        ({"scale": torch.zeros(7, 2)}, "scale"),
        ({"zero": torch.zeros(7, 3, dtype=torch.uint8)}, "zero must be"),
        ({"zero": torch.zeros(7, 2)}, "zero must be"),
        ({"bias": torch.zeros(6)}, r"bias must be \(7,\)"),
        ({"bits": 5}, "bits must be 4 or 8"),
        ({"activation": "silu"}, "activation must be one of none, gelu"),
        ({"packed": torch.zeros(64, dtype=torch.uint8)}, "packed must be uint8"),
    ],
    ids=range(11),
)
def test_quantized_linear_names_what_does_not_fit(change, said):
    _, (weight, scale, zero) = case(Scheme(4, 32, symmetric=False))
    right = {"x": torch.zeros(2, 96), "weight": weight, "scale": scale, "zero": zero, "bias": torch.zeros(7)}
    with pytest.raises(ValueError, match=rf"\[quantized_linear\] .*{said}"):
        quantized_linear(**{**right, **change})
