"""rotary against its float64 oracle, its gradient, and its errors."""

import numpy as np
import pytest
import torch
from torch import Tensor

from portlm.ops.rotary import _fused, rotary, rotary_reference


def _positions_and_tables(sizes, rng):
    angles = 100 * rng.random((sizes["context"], sizes["half"]), dtype=np.float32)
    positions = rng.integers(0, sizes["context"], (sizes["batch"], sizes["sequence"]))
    return {"position_ids": positions, "cos": np.cos(angles), "sin": np.sin(angles)}


MATRIX = {
    "Rotary": {
        "shapes": {
            "x": "batch sequence num_heads D",
            "position_ids": "batch sequence",
            "cos": "context half",
            "sin": "context half",
        },
        "variants": [{"num_heads": 3, "D": 34, "half": 17}],
        "fill": _positions_and_tables,
    }
}

SHAPES = [(1, 1, 1, 2), (2, 7, 3, 64), (3, 5, 2, 34), (1, 33, 4, 128), (0, 4, 2, 8), (2, 0, 2, 8)]


def _tables(shape: tuple[int, ...], batched: bool) -> tuple[Tensor, Tensor]:
    B, T, _, D = shape
    angles = torch.rand((B, T, D // 2) if batched else (T, D // 2)) * 100
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("batched", [False, True], ids=["shared", "per-row"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rotary_and_its_gradient_are_as_accurate_as_pytorch(shape, batched, gradients_as_accurate):
    cos, sin = _tables(shape, batched)
    gradients_as_accurate(
        lambda x: rotary(x, cos.to(x.dtype), sin.to(x.dtype)),
        lambda x: rotary_reference(x, cos.to(x.dtype), sin.to(x.dtype)),
        [torch.randn(shape)],
    )


def test_rotary_keeps_the_length_of_every_pair():
    x = torch.randn(2, 5, 3, 16)
    y = rotary(x, *_tables(x.shape, True))

    def lengths(t):
        return t.unflatten(-1, (2, 8)).norm(dim=-2)

    torch.testing.assert_close(lengths(x), lengths(y))


def test_rotary_reads_heads_inside_a_wider_projection_without_a_copy():
    qkv = torch.randn(2, 5, 3, 4, 16)
    for x in qkv.unbind(2):
        cos, sin = _tables(x.shape, False)
        assert not x.is_contiguous()
        assert torch.equal(rotary(x, cos, sin), rotary(x.contiguous(), cos, sin))


def test_rotary_accepts_any_strides():
    x = torch.randn(16, 4, 5, 2).permute(3, 2, 1, 0).requires_grad_()
    cos, sin = _tables(x.shape, False)
    y = rotary(x, cos.t().contiguous().t(), sin)
    assert torch.equal(y, rotary(x.contiguous(), cos, sin))
    upstream = torch.randn(5, 2, 4, 16).transpose(0, 1)
    torch.testing.assert_close(
        torch.autograd.grad(y, x, upstream), torch.autograd.grad(rotary_reference(x, cos, sin), x, upstream)
    )


@pytest.mark.no_kernel("it is about the reference")
def test_rotary_takes_the_reference_for_tables_that_require_a_gradient():
    x = torch.randn(1, 3, 2, 8)
    cos, sin = (t.requires_grad_() for t in _tables(x.shape, False))
    rotary(x, cos, sin).sum().backward()
    assert cos.grad is not None
    assert sin.grad is not None


def test_rotary_does_not_depend_on_the_number_of_threads(same_on_all_thread_counts):
    x = torch.randn(3, 50, 4, 66)
    tables = _tables(x.shape, True)
    assert same_on_all_thread_counts(lambda: [rotary(x, *tables)])


def test_rotary_passes_opcheck():
    x = torch.randn(2, 3, 2, 8, requires_grad=True)
    torch.library.opcheck(_fused.op, (x, *_tables(x.shape, False), False))
    torch.library.opcheck(_fused.op, (x, *_tables(x.shape, True), True))


@pytest.mark.no_kernel("refused before a kernel is called")
@pytest.mark.parametrize(
    ("x", "cos", "sin"),
    [
        ((2, 3, 4, 5), (3, 2), (3, 2)),
        ((2, 3, 4, 6), (4, 3), (4, 3)),
        ((2, 3, 4, 6), (3, 3), (2, 3, 3)),
        ((2, 3, 4, 6), (1, 3, 3), (1, 3, 3)),
        ((3, 4, 6), (3, 3), (3, 3)),
    ],
    ids=str,
)
def test_rotary_names_wrong_shapes(x, cos, sin):
    with pytest.raises(ValueError, match=r"\[rotary\]"):
        rotary(torch.zeros(x), torch.zeros(cos), torch.zeros(sin))
