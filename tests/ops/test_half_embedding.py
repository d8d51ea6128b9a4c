"""half_embedding against rows of the table that its numbers mean, and its errors."""

import numpy as np
import pytest
import torch

kernels = pytest.importorskip("portlm._C", reason="portlm._C was not built")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

from onnx import TensorProto, helper  # noqa: E402

from portlm.ops.compiled import without_kernels  # noqa: E402
from portlm.ops.half import pack  # noqa: E402
from portlm.ops.half_embedding import half_embedding  # noqa: E402

pytestmark = pytest.mark.runs_kernel("half_rows", "half_panels")
KINDS = {"float16": np.dtype(np.float16), "bfloat16": helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)}
DTYPES = [torch.float16, torch.bfloat16]


def numbers(sizes, rng):
    """A table of 16 bits, and ids of its rows."""
    table = rng.standard_normal((sizes["V"], sizes["K"])).astype(KINDS[sizes["kind"]])
    return {"weight": table, "ids": rng.integers(0, sizes["V"], (sizes["batch"], sizes["sequence"]))}


MATRIX = {
    "HalfEmbedding": {
        "shapes": {"ids": "batch sequence", "weight": "V K"},
        "variants": [{"V": 61, "K": 48, "kind": "bfloat16"}, {"V": 130, "K": 7, "kind": "float16"}],
        "fill": numbers,
        "tvm_kernels": ("half_rows",),
    }
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("V", "K"), [(1, 1), (64, 3), (65, 16), (200, 70)])
def test_rows_are_as_accurate_as_16_bits_widened_exactly(V, K, dtype):
    table = torch.randn(V, K).to(dtype)
    table[0, 0], table[V - 1, K - 1] = float("inf"), float("nan")
    ids = torch.randint(V, (3, 11))
    found = half_embedding(ids, table)
    assert found.dtype == torch.float32
    assert torch.equal(torch.nan_to_num(found), torch.nan_to_num(table[ids].float()))
    assert torch.equal(found.isnan(), table[ids].isnan())
    assert torch.equal(torch.nan_to_num(found), torch.nan_to_num(half_embedding(ids, table, pack(table))))
    with without_kernels():
        assert torch.equal(torch.nan_to_num(found), torch.nan_to_num(half_embedding(ids, table)))


@pytest.mark.parametrize("bad", [-1, 9, 2**62, -(2**62)])
def test_an_id_that_is_out_of_range_is_named(bad):
    ids = torch.tensor([[0, 8], [bad, 3]])
    with pytest.raises(IndexError, match=rf"\[half_embedding\] id {bad} is outside \[0, 9\)"):
        half_embedding(ids, torch.zeros(9, 32, dtype=torch.bfloat16))


@pytest.mark.no_kernel("nothing is computed")
def test_what_does_not_fit_is_named():
    table = torch.zeros(9, 32, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"ids must be int64, got torch\.int32"):
        half_embedding(torch.zeros(2, dtype=torch.int32), table)
    with pytest.raises(ValueError, match=r"weight must be float16 or bfloat16"):
        half_embedding(torch.zeros(2, dtype=torch.int64), table.float())
