"""linear against its float64 oracle, its gradients, and its errors."""

import pytest
import torch

from portlm.ops.linear import _fused, _fused_gradients, linear, linear_reference

MATRIX = {
    "Linear": {
        "shapes": {"x": "batch sequence K", "weight": "N K", "bias": "N"},
        "variants": [
            {"K": 33, "N": 17},
            {"K": 33, "N": 17, "transposed": 1},
            {"K": 33, "N": 17, "absent": ("bias",)},
        ],
        "tvm_kernels": ("panel_linear",),
    }
}

# (shape of x, N): odd sizes hit tails, 1 row the way of a single token, 3 columns that of a small head
SHAPES = [((1, 1), 1), ((1, 48), 100), ((7, 33), 5), ((2, 5, 128), 130), ((200, 65), 3), ((70, 300), 257), ((0, 16), 3),
          ((3, 0), 4), ((4, 6), 0)]  # fmt: skip


@pytest.mark.parametrize(("shape", "N"), SHAPES, ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_linear_and_its_gradients_are_as_accurate_as_pytorch(shape, N, biased, gradients_as_accurate):
    inputs = [torch.randn(shape), torch.randn(N, shape[-1])] + ([torch.randn(N)] if biased else [])
    gradients_as_accurate(linear, linear_reference, inputs)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_linear_computes_only_the_gradients_that_are_asked_for(wanted):
    inputs = [torch.randn(30, 9), torch.randn(7, 9), torch.randn(7)]
    for i in wanted:
        inputs[i].requires_grad_()
    linear(*inputs).square().sum().backward()
    assert [t.grad is not None for t in inputs] == [i in wanted for i in range(3)]


def test_linear_gradients_do_not_depend_on_the_number_of_threads(same_on_all_thread_counts):
    x, weight, bias = torch.randn(500, 96), torch.randn(130, 96), torch.randn(130)

    def gradients():
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        return list(torch.autograd.grad(linear(*leaves).square().sum(), leaves))

    assert same_on_all_thread_counts(gradients)


def test_linear_passes_opcheck():
    x, weight, bias = (t.requires_grad_() for t in (torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5)))
    torch.library.opcheck(_fused.op, (x, weight, bias))
    torch.library.opcheck(_fused.op, (x, weight, None))
    grads = torch.randn(2, 3, 5), x.detach(), weight.detach()
    torch.library.opcheck(_fused_gradients.op, (*grads, True, False, True))


def test_linear_compiles_to_the_same_values():
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)

    def loss(x, weight):
        return linear(x, weight).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(loss(x, weight), (x, weight))
    assert all(map(torch.equal, torch.autograd.grad(compiled(x, weight), (x, weight)), expected))


def test_linear_accepts_strided_inputs():
    x, weight = torch.randn(6, 40).t(), torch.randn(6, 9).t()
    assert torch.equal(linear(x, weight), linear(x.contiguous(), weight.contiguous()))
    middle = torch.randn(4, 5, 6)[:, 2]
    assert torch.equal(linear(middle, weight), linear(middle.contiguous(), weight.contiguous()))


@pytest.mark.no_kernel("refused before a kernel is called")
@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [((2, 3), (4, 2), None), ((2, 3), (4, 3), (3,)), ((), (1, 1), None), ((2, 3), (3,), None)],
    ids=str,
)
def test_linear_names_wrong_shapes(x, weight, bias):
    with pytest.raises(ValueError, match=r"\[linear\]"):
        linear(torch.zeros(x), torch.zeros(weight), None if bias is None else torch.zeros(bias))
