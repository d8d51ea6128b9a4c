"""experts against its float64 oracle, its gradients, the choice of experts, and its errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from portlm.ops.experts import (
    _fused,
    _fused_gradients,
    choose_experts,
    experts,
    experts_reference,
)
from portlm.ops.precision import products_in

MATRIX = {
    "Experts": {
        "shapes": {"x": "batch sequence C", "router": "E C", "gate": "N C", "up": "N C", "down": "C N"},
        "variants": [
            {"C": 33, "E": 5, "N": 45, "top_k": 2, "normalize": 1},
            {"C": 16, "E": 7, "N": 28, "top_k": 3, "normalize": 0},
            {"C": 8, "E": 6, "N": 18, "top_k": 3, "normalize": 1},
        ],
        "tvm_kernels": ("experts_fwd",),
    }
}

# (shape of x, experts, inner width, k): one token, tails, all experts, one expert, several chunks of 512 rows, no rows,
# no inner layer
SHAPES = [
    ((1, 5), 3, 7, 2),
    ((2, 7, 33), 6, 19, 2),
    ((40, 16), 4, 32, 4),
    ((9, 8), 1, 5, 1),
    ((1100, 4), 2, 4200, 1),
    ((0, 8), 4, 6, 2),
    ((3, 8), 4, 0, 2),
]


def _inputs(shape: tuple[int, ...], E: int, width: int) -> list[Tensor]:
    C = shape[-1]
    return [
        torch.randn(shape),
        torch.randn(E, C),
        torch.randn(E * width, C) * C**-0.5,
        torch.randn(E * width, C) * C**-0.5,
        torch.randn(C, E * width) * max(width, 1) ** -0.5,
    ]


def _loop(
    x: Tensor, router: Tensor, gate: Tensor, up: Tensor, down: Tensor, k: int, normalize: bool
) -> Tensor:
    """The definition token by token and expert by expert, as the papers write it."""
    E, y = len(router), torch.zeros_like(x)
    for row, token in enumerate(x):
        probabilities = torch.softmax(router @ token, 0)
        chosen = sorted(range(E), key=lambda e: (-probabilities[e], e))[:k]
        total = sum(probabilities[e] for e in chosen) if normalize else 1.0
        for e in chosen:
            part = slice(e * len(gate) // E, (e + 1) * len(gate) // E)
            hidden = F.silu(gate[part] @ token) * (up[part] @ token)
            y[row] += probabilities[e] / total * (down[:, part] @ hidden)
    return y


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("shape", "E", "width", "k"), SHAPES, ids=str)
def test_experts_and_gradients_are_as_accurate_as_pytorch(
    shape, E, width, k, normalize, gradients_as_accurate
):
    # Gradients of the router are differences of sums over C: their parts are larger than they are.
    gradients_as_accurate(
        lambda *tensors: experts(*tensors, k, normalize),
        lambda *tensors: experts_reference(*tensors, k, normalize),
        _inputs(shape, E, width),
        roundings=8,
    )


@pytest.mark.no_kernel("it is about the reference")
@pytest.mark.parametrize("normalize", [True, False])
def test_the_reference_is_the_sum_over_the_chosen_experts(normalize):
    inputs = [t.double() for t in _inputs((11, 6), 5, 4)]
    torch.testing.assert_close(experts_reference(*inputs, 2, normalize), _loop(*inputs, 2, normalize))


@pytest.mark.no_kernel("it is about the reference")
@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_of_the_reference_are_its_slopes(normalize):
    inputs = [t.double().requires_grad_() for t in _inputs((3, 4), 4, 3)]
    assert torch.autograd.gradcheck(lambda *tensors: experts_reference(*tensors, 2, normalize), inputs)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_of_experts_with_equal_logits_the_first_are_chosen(k):
    x, _, gate, up, down = _inputs((4, 6), 5, 8)
    router = torch.ones(5, 6)
    router[0] = -1.0
    x = x.abs()  # all logits but the first are equal, and larger
    expected = experts(
        x, router[1 : k + 1], gate[8 : 8 * (k + 1)], up[8 : 8 * (k + 1)], down[:, 8 : 8 * (k + 1)], k
    )
    torch.testing.assert_close(experts(x, router, gate, up, down, k), expected)
    order, weights = choose_experts(x @ router.t(), k, True)
    assert order.tolist() == [list(range(1, k + 1))] * 4
    torch.testing.assert_close(weights, torch.full((4, k), 1 / k))


@pytest.mark.runs_kernel("experts_fwd", "experts_bwd")
def test_an_expert_without_tokens_changes_nothing_and_gets_no_gradient():
    x, router, gate, up, down = _inputs((7, 6), 4, 5)
    x, router[2] = x.abs(), -5.0
    leaves = [t.requires_grad_() for t in (gate, up, down)]
    y = experts(x, router, *leaves, 2)
    y.sum().backward()
    part = slice(10, 15)
    assert torch.count_nonzero(gate.grad[part]) == 0
    assert torch.count_nonzero(up.grad[part]) == 0
    assert torch.count_nonzero(down.grad[:, part]) == 0
    with torch.no_grad():
        for t in (gate[part], up[part], down[:, part]):
            t.fill_(float("nan"))  # never read
        assert torch.equal(experts(x, router, gate, up, down, 2), y)


def test_a_token_has_the_same_answer_whatever_is_beside_it():
    # Products of few rows and of many add up in another order.
    inputs = _inputs((50, 16), 4, 24)
    together = experts(*inputs, 2)
    for row in (0, 17, 49):
        alone = experts(inputs[0][row : row + 1], *inputs[1:], 2)
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wanted", range(5))
def test_experts_computes_only_the_gradients_that_are_asked_for(wanted):
    inputs = _inputs((20, 9), 3, 6)
    inputs[wanted].requires_grad_()
    experts(*inputs, 2).square().sum().backward()
    assert [t.grad is not None for t in inputs] == [i == wanted for i in range(5)]


def test_experts_gradients_do_not_depend_on_the_number_of_threads(same_on_all_thread_counts):
    inputs = _inputs((300, 48), 4, 64)

    def gradients() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        return list(torch.autograd.grad(experts(*leaves, 2).square().sum(), leaves))

    assert same_on_all_thread_counts(gradients)


def test_experts_passes_opcheck():
    inputs = [t.requires_grad_() for t in _inputs((3, 6), 4, 5)]
    torch.library.opcheck(_fused.op, (*inputs, 2, True))
    x, router, gate, up, down = (t.detach() for t in inputs)
    _, *kept = _fused.op(x, router, gate, up, down, 2, True)
    needs = [True, False, True, True, False]
    torch.library.opcheck(
        _fused_gradients.op, (torch.randn(3, 6), x, router, gate, up, down, *kept, needs, True)
    )


def test_experts_accepts_strided_inputs():
    inputs = _inputs((10, 6), 3, 4)
    strided = [torch.stack((t, t), dim=-1)[..., 0] for t in inputs]
    assert torch.equal(experts(*strided, 2), experts(*inputs, 2))


def test_experts_hands_on_nan():
    inputs = _inputs((4, 6), 3, 4)
    inputs[0][1, 2] = float("nan")
    assert torch.equal(experts(*inputs, 2).isnan().all(1), torch.tensor([False, True, False, False]))


@pytest.mark.runs_kernel("experts_fwd", "linear_bf16_fwd", "linear_bf16_bwd")
def test_products_in_bf16_round_the_operands_of_the_experts_and_not_the_choice():
    inputs = [t.requires_grad_() for t in _inputs((30, 16), 4, 24)]
    exact = experts(*inputs, 2)
    with products_in("bf16"):
        rounded = experts(*inputs, 2)
        rounded.square().sum().backward()
    # Two products with operands of 8 bits each, of values of order one.
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in inputs)


@pytest.mark.no_kernel("refused before a kernel is called")
@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3), (4, 2), (8, 3), (8, 3), (3, 8)),
        ((2, 3), (4, 3), (8, 3), (4, 3), (3, 8)),
        ((2, 3), (4, 3), (8, 3), (8, 3), (8, 3)),
        ((2, 3), (4, 3), (9, 3), (9, 3), (3, 9)),
        ((2, 3), (0, 3), (0, 3), (0, 3), (3, 0)),
        ((), (4, 1), (4, 1), (4, 1), (1, 4)),
    ],
    ids=str,
)
def test_experts_names_wrong_shapes(shapes):
    with pytest.raises(ValueError, match=r"\[experts\] need x"):
        experts(*map(torch.zeros, shapes), 2)


@pytest.mark.no_kernel("refused before a kernel is called")
@pytest.mark.parametrize("k", [0, -1, 5])
def test_experts_refuses_to_choose_none_or_more_than_there_are(k):
    with pytest.raises(
        ValueError, match=rf"\[experts\] top_k must be from 1 to the number of experts, 4, got {k}"
    ):
        experts(*_inputs((2, 3), 4, 2), k)
