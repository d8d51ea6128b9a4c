"""layer_norm against its float64 oracle, its gradient, and its errors."""

import pytest
import torch
from torch import Tensor

from portlm.ops.layer_norm import _fused, _fused_add, layer_norm, layer_norm_reference

MATRIX = {
    "LayerNorm": {
        "shapes": {"x": "batch sequence C", "weight": "C", "bias": "C"},
        "variants": [{"C": 33, "epsilon": 1e-3}],
    },
    "AddLayerNorm": {
        "shapes": {"x": "batch sequence C", "residual": "batch sequence C", "weight": "C", "bias": "C"},
        "variants": [{"C": 33, "epsilon": 1e-3}],
    },
}

SHAPES = [
    (1, 1),
    (7, 33),
    (2, 5, 128),
    (3, 768),
    (130, 31),
    (0, 16),
]  # odd sizes hit the tail, 130 rows two blocks


def _inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, residual = torch.randn(2, *shape) * 3 + 1
    return x, residual, torch.randn(shape[-1]), torch.randn(shape[-1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("add", [False, True], ids=["plain", "residual"])
def test_layer_norm_is_as_accurate_as_pytorch(shape, add, as_accurate):
    x, residual, weight, bias = _inputs(shape)
    extra = residual if add else None

    def flat(result):
        return result if isinstance(result, tuple) else (result,)

    ours = flat(layer_norm(x, weight, bias, residual=extra))
    eager = flat(layer_norm_reference(x, weight, bias, residual=extra))
    oracle = flat(
        layer_norm_reference(
            x.double(), weight.double(), bias.double(), residual=None if extra is None else extra.double()
        )
    )
    for o, e, r in zip(ours, eager, oracle, strict=True):
        as_accurate(o, e, r)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("add", [False, True], ids=["plain", "residual"])
def test_layer_norm_gradients_are_as_accurate_as_pytorch(shape, add, as_accurate):
    x, residual, weight, bias = _inputs(shape)
    dy, dh = torch.randn(2, *shape)

    def gradients(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias, residual)]
        if add:
            y, h = function(*leaves[:3], residual=leaves[3])
            loss = (y * dy.to(dtype)).sum() + (h * dh.to(dtype)).sum()
        else:
            leaves = leaves[:3]
            loss = (function(*leaves) * dy.to(dtype)).sum()
        return torch.autograd.grad(loss, leaves)

    for ours, eager, oracle in zip(
        gradients(layer_norm, torch.float32),
        gradients(layer_norm_reference, torch.float32),
        gradients(layer_norm_reference, torch.float64),
        strict=True,
    ):
        as_accurate(ours, eager, oracle)


def test_layer_norm_gradients_do_not_depend_on_the_number_of_threads():
    x, _, weight, bias = _inputs((1000, 96))
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
            results.append(torch.autograd.grad(layer_norm(*leaves).square().sum(), leaves))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_layer_norm_passes_opcheck():
    x, residual, weight, bias = (t.requires_grad_() for t in _inputs((4, 24)))
    torch.library.opcheck(_fused.op, (x, weight, bias, 1e-5))
    torch.library.opcheck(_fused_add.op, (x, residual, weight, bias, 1e-5))


def test_layer_norm_accepts_strided_inputs():
    x = torch.randn(6, 4).t()
    weight, bias = torch.randn(6), torch.randn(6)
    assert torch.equal(layer_norm(x, weight, bias), layer_norm(x.contiguous(), weight, bias))


@pytest.mark.no_kernel("refused before a kernel is called")
@pytest.mark.parametrize(
    ("x", "weight", "residual"), [((2, 3), (4,), None), ((2, 3), (3,), (3, 2)), ((), (1,), None)], ids=str
)
def test_layer_norm_names_wrong_shapes(x, weight, residual):
    extra = None if residual is None else torch.zeros(residual)
    with pytest.raises(ValueError, match=r"\[layer_norm\]"):
        layer_norm(torch.zeros(x), torch.zeros(weight), torch.zeros(weight), residual=extra)


def test_layer_norm_of_wide_rows_sums_accurately(as_accurate):
    """One accumulator would err by thousands of roundings on a row this wide; the tree of sums does not."""
    x, weight, bias = torch.rand(2, 20_000) + 1, torch.ones(20_000), torch.zeros(20_000)
    args = [t.double() for t in (x, weight, bias)]
    as_accurate(
        layer_norm(x, weight, bias), layer_norm_reference(x, weight, bias), layer_norm_reference(*args)
    )
