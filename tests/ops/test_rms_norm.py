"""rms_norm against its float64 oracle, its gradient, and its errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from portlm.ops.rms_norm import _fused, _fused_add, rms_norm, rms_norm_reference

MATRIX = {
    "RmsNorm": {
        "shapes": {"x": "batch sequence C", "weight": "C"},
        "variants": [{"C": 33, "epsilon": 1e-3}],
    },
    "AddRmsNorm": {
        "shapes": {"x": "batch sequence C", "residual": "batch sequence C", "weight": "C"},
        "variants": [{"C": 33, "epsilon": 1e-3}],
    },
}

SHAPES = [(1, 1), (7, 33), (2, 5, 128), (3, 768), (130, 31), (0, 16)]  # odd sizes hit the tail


def _inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    x, residual = torch.randn(2, *shape) * 3 + 1
    return x, residual, torch.randn(shape[-1])


def _add(function):
    return lambda x, residual, weight: function(x, weight, residual=residual)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_and_its_gradients_are_as_accurate_as_pytorch(shape, gradients_as_accurate):
    x, residual, weight = _inputs(shape)
    gradients_as_accurate(rms_norm, rms_norm_reference, [x, weight])
    gradients_as_accurate(_add(rms_norm), _add(rms_norm_reference), [x, residual, weight])


@pytest.mark.no_kernel("it is about the reference")
def test_rms_norm_reference_is_pytorchs():
    x, _, weight = _inputs((5, 48))
    ours = rms_norm_reference(x.double(), weight.double(), 1e-5)
    torch.testing.assert_close(
        ours, F.rms_norm(x.double(), (48,), weight.double(), 1e-5), rtol=1e-14, atol=1e-14
    )


def test_rms_norm_gradients_do_not_depend_on_the_number_of_threads(same_on_all_thread_counts):
    x, _, weight = _inputs((1000, 96))

    def gradients():
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        return torch.autograd.grad(rms_norm(*leaves).square().sum(), leaves)

    assert same_on_all_thread_counts(gradients)


def test_rms_norm_gradient_through_one_output_alone():
    x, residual, weight = (t.requires_grad_() for t in _inputs((4, 24)))
    y, h = rms_norm(x, weight, residual=residual)
    (dx,) = torch.autograd.grad(h.sum(), [x], retain_graph=True)
    assert torch.equal(dx, torch.ones_like(x))
    ours = torch.autograd.grad(y.sum(), [residual])
    y, _ = rms_norm_reference(x, weight, residual=residual)
    torch.testing.assert_close(ours, torch.autograd.grad(y.sum(), [residual]))


def test_rms_norm_of_zeros_is_zero():
    x = torch.zeros(2, 8, requires_grad=True)
    y = rms_norm(x, torch.ones(8))
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 8))
    assert bool(torch.isfinite(x.grad).all())


def test_rms_norm_passes_opcheck():
    x, residual, weight = (t.requires_grad_() for t in _inputs((4, 24)))
    torch.library.opcheck(_fused.op, (x, weight, 1e-5))
    torch.library.opcheck(_fused_add.op, (x, residual, weight, 1e-5))


def test_rms_norm_accepts_strided_inputs():
    x, weight = torch.randn(6, 4).t(), torch.randn(6)
    assert torch.equal(rms_norm(x, weight), rms_norm(x.contiguous(), weight))


@pytest.mark.no_kernel("refused before a kernel is called")
@pytest.mark.parametrize(
    ("x", "weight", "residual"), [((2, 3), (4,), None), ((2, 3), (3,), (3, 2)), ((), (1,), None)], ids=str
)
def test_rms_norm_names_wrong_shapes(x, weight, residual):
    extra = None if residual is None else torch.zeros(residual)
    with pytest.raises(ValueError, match=r"\[rms_norm\]"):
        rms_norm(torch.zeros(x), torch.zeros(weight), residual=extra)
