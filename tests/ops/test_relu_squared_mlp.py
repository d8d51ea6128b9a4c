"""relu_squared_mlp against its float64 oracle, its gradients, and its errors."""

import pytest
import torch
from torch import Tensor

from portlm.ops.relu_squared_mlp import (
    _fused,
    _fused_gradients,
    relu_squared_mlp,
    relu_squared_mlp_reference,
)

MATRIX = {
    "ReluSquaredMlp": {
        "shapes": {"x": "batch sequence C", "w1": "F C", "b1": "F", "w2": "N F", "b2": "N"},
        "variants": [{"C": 33, "F": 65, "N": 17}],
        "tvm_kernels": ("panel_linear",),
    }
}

# (shape of x, F, N): one row, tails, several tiles, no rows, no hidden layer; 600 rows of 4100 are two chunks
SHAPES = [
    ((1, 5), 3, 5),
    ((7, 33), 65, 17),
    ((2, 20, 32), 128, 32),
    ((600, 4), 4100, 3),
    ((0, 8), 16, 8),
    ((3, 8), 0, 4),
]


def _inputs(shape: tuple[int, ...], F: int, N: int) -> list[Tensor]:
    C = shape[-1]
    return [
        torch.randn(shape),
        torch.randn(F, C),
        torch.randn(F),
        torch.randn(N, F) * max(F, 1) ** -0.5,
        torch.randn(N),
    ]


@pytest.mark.parametrize(("shape", "F", "N"), SHAPES, ids=str)
def test_relu_squared_mlp_and_its_gradients_are_as_accurate_as_pytorch(shape, F, N, gradients_as_accurate):
    gradients_as_accurate(relu_squared_mlp, relu_squared_mlp_reference, _inputs(shape, F, N))


def test_relu_squared_mlp_needs_no_biases(gradients_as_accurate):
    x, w1, _, w2, _ = _inputs((30, 12), 40, 12)
    gradients_as_accurate(
        lambda x, w1, w2: relu_squared_mlp(x, w1, None, w2, None),
        lambda x, w1, w2: relu_squared_mlp_reference(x, w1, None, w2, None),
        [x, w1, w2],
    )


@pytest.mark.parametrize("wanted", range(5))
def test_relu_squared_mlp_computes_only_the_gradients_that_are_asked_for(wanted):
    inputs = _inputs((20, 9), 30, 9)
    inputs[wanted].requires_grad_()
    relu_squared_mlp(*inputs).square().sum().backward()
    assert [t.grad is not None for t in inputs] == [i == wanted for i in range(5)]


def test_relu_squared_mlp_gradients_do_not_depend_on_the_number_of_threads(same_on_all_thread_counts):
    inputs = _inputs((400, 64), 256, 64)

    def gradients() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        return list(torch.autograd.grad(relu_squared_mlp(*leaves).square().sum(), leaves))

    assert same_on_all_thread_counts(gradients)


def test_relu_squared_mlp_passes_opcheck():
    inputs = [t.requires_grad_() for t in _inputs((3, 6), 10, 5)]
    torch.library.opcheck(_fused.op, inputs)
    x, w1, b1, w2, b2 = (t.detach() for t in inputs)
    _, positive = _fused.op(x, w1, b1, w2, b2)
    needs = [True, False, True, True, False]
    torch.library.opcheck(_fused_gradients.op, (torch.randn(3, 5), x, positive, w1, w2, needs))


def test_relu_squared_mlp_accepts_strided_inputs():
    inputs = _inputs((10, 6), 20, 6)
    strided = [torch.stack((t, t), dim=-1)[..., 0] for t in inputs]
    assert torch.equal(relu_squared_mlp(*strided), relu_squared_mlp(*inputs))


def test_relu_squared_mlp_hands_on_nan():
    inputs = _inputs((4, 6), 20, 6)
    inputs[0][1, 2] = float("nan")
    assert torch.equal(relu_squared_mlp(*inputs).isnan().all(1), torch.tensor([False, True, False, False]))


@pytest.mark.no_kernel("refused before a kernel is called")
@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3), (4, 2), (4,), (3, 4), (3,)),
        ((2, 3), (4, 3), (3,), (3, 4), (3,)),
        ((2, 3), (4, 3), (4,), (3, 5), (3,)),
        ((2, 3), (4, 3), (4,), (3, 4), (4,)),
        ((), (4, 1), (4,), (1, 4), (1,)),
    ],
    ids=str,
)
def test_relu_squared_mlp_names_wrong_shapes(shapes):
    with pytest.raises(ValueError, match=r"\[relu_squared_mlp\] need"):
        relu_squared_mlp(*map(torch.zeros, shapes))
