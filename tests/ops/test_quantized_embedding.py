"""quantized_embedding against the table that its numbers mean, and its errors."""

import numpy as np
import pytest
import torch

pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

from portlm.compile.quantize import Quantized, Scheme, dequantize, pack, pack_zeros
from portlm.ops.quantized_embedding import quantized_embedding


def numbers(sizes, rng):
    """Random ids, q, scales and zero points of a table, as a graph has them."""
    rows, groups = sizes["V"], sizes["G"]
    parts = {
        "weight": rng.integers(0, 256, (rows, groups, sizes["b"])).astype(np.uint8),
        "scale": rng.uniform(-0.1, 0.1, (rows, groups)).astype(np.float16).astype(np.float32),
        "zero": rng.integers(0, 256, (rows, sizes["z"])).astype(np.uint8),
    }
    return parts | {"ids": rng.integers(0, rows, (sizes["batch"], sizes["sequence"]))}


MATRIX = {
    "QuantizedEmbedding": {
        "shapes": {"ids": "batch sequence", "weight": "V G b", "scale": "V G", "zero": "V z"},
        "variants": [
            {"V": 61, "G": 3, "b": 16, "z": 2, "bits": 4},
            {"V": 61, "G": 2, "b": 16, "z": 1, "bits": 4},
            {"V": 61, "G": 1, "b": 64, "z": 1, "bits": 4, "absent": ("zero",)},
            {"V": 61, "G": 2, "b": 32, "z": 2, "bits": 8},
            {"V": 61, "G": 3, "b": 32, "z": 3, "bits": 8, "absent": ("zero",)},
        ],
        "fill": numbers,
        "tvm_kernels": ("packed_rows",),
    }
}


@pytest.mark.parametrize("ids", [(), (1,), (3, 4), (0, 2), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_embedding_adds_up_to_rows_of_what_the_exporter_means(bits, symmetric, ids):
    """To the bit: a product of a whole number and a scale is not rounded."""
    scheme, rng = Scheme(bits, 32, symmetric), np.random.default_rng(1)
    q = rng.integers(0, scheme.top + 1, (9, 96)).astype(np.uint8)
    scale = rng.uniform(-1, 1, (9, 3)).astype(np.float16).astype(np.float32)
    zero = None if symmetric else rng.integers(0, scheme.top + 1, (9, 3)).astype(np.uint8)
    wide = torch.from_numpy(dequantize(Quantized(q, scale, zero), scheme))
    parts = pack(q, scheme), scale, None if zero is None else pack_zeros(zero, scheme)
    tokens = torch.randint(9, ids)
    tensors = [None if p is None else torch.from_numpy(p) for p in parts]
    assert torch.equal(quantized_embedding(tokens, *tensors, bits=bits), wide[tokens])


@pytest.mark.parametrize("bad", [-1, 9, 2**62, -(2**62)])
def test_quantized_embedding_names_the_id_that_is_out_of_range(bad):
    ids = torch.tensor([[0, 8], [bad, 3]])
    with pytest.raises(IndexError, match=rf"\[quantized_embedding\] id {bad} is outside \[0, 9\)"):
        quantized_embedding(ids, torch.zeros(9, 2, 16, dtype=torch.uint8), torch.zeros(9, 2))


@pytest.mark.no_kernel("refused before a kernel is called")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ids": torch.zeros(2, dtype=torch.int32)}, "ids must be int64"),
        ({"weight": torch.zeros(9, 32, dtype=torch.uint8)}, "weight must be uint8"),
        ({"zero": torch.zeros(9, 2, dtype=torch.uint8)}, "zero must be"),
        ({"bits": 2}, "bits must be 4 or 8"),
    ],
    ids=range(4),
)
def test_quantized_embedding_names_what_does_not_fit(change, said):
    ids, weight = torch.zeros(2, dtype=torch.int64), torch.zeros(9, 2, 16, dtype=torch.uint8)
    right = {"ids": ids, "weight": weight, "scale": torch.zeros(9, 2)}
    with pytest.raises(ValueError, match=rf"\[quantized_embedding\] .*{said}"):
        quantized_embedding(**{**right, **change})
