"""swiglu against its float64 oracle, its gradient, and its errors."""

import pytest
import torch

from portlm.ops.swiglu import _fused, swiglu, swiglu_reference

MATRIX = {
    "SwiGlu": {
        "shapes": {"gate": "batch sequence F", "up": "batch sequence F"},
        "variants": [{"F": 33}],
    }
}

SHAPES = [(1,), (7, 33), (2, 16, 1023), (0, 4), ()]  # odd sizes hit the tail


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_swiglu_and_its_gradients_are_as_accurate_as_pytorch(shape, scale, gradients_as_accurate):
    gate, up = torch.randn(2, *shape) * scale
    gradients_as_accurate(swiglu, swiglu_reference, [gate, up])


def test_swiglu_saturates_instead_of_overflowing():
    gate = torch.tensor([-1e30, -200.0, -100.0, 0.0, 100.0, 1e30], requires_grad=True)
    y = swiglu(gate, torch.ones(6))
    torch.testing.assert_close(y, torch.tensor([0.0, 0.0, 0.0, 0.0, 100.0, 1e30]))
    y.sum().backward()
    torch.testing.assert_close(gate.grad, torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0]))


def test_swiglu_hands_on_nan():
    assert bool(swiglu(torch.tensor([torch.nan]), torch.ones(1)).isnan())


def test_swiglu_does_not_depend_on_the_number_of_threads(same_on_all_thread_counts):
    gate, up = torch.randn(2, 300, 333)

    def run():
        leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
        y = swiglu(*leaves)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    assert same_on_all_thread_counts(run)


def test_swiglu_passes_opcheck():
    gate, up = torch.randn(2, 4, 24).requires_grad_().unbind()
    torch.library.opcheck(_fused.op, (gate.detach().requires_grad_(), up.detach().requires_grad_()))


def test_swiglu_accepts_strided_inputs():
    gate, up = torch.randn(5, 2, 24).unbind(1)
    assert torch.equal(swiglu(gate, up), swiglu(gate.contiguous(), up.contiguous()))


def test_swiglu_refuses_a_second_derivative():
    gate, up = (torch.randn(4).requires_grad_() for _ in range(2))
    (first,) = torch.autograd.grad(swiglu(gate, up).sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="backward"):
        first.sum().backward()


@pytest.mark.no_kernel("refused before a kernel is called")
def test_swiglu_names_wrong_shapes():
    with pytest.raises(ValueError, match=r"\[swiglu\] shapes must match, got \(2,\) and \(3,\)"):
        swiglu(torch.zeros(2), torch.zeros(3))
