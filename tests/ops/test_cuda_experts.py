"""The CUDA twin of the mixture of experts against its float64 oracle: see test_cuda.py."""

import pytest
import torch
from cuda_twins import DTYPES, assert_as_accurate, results, run_twice
from torch import Tensor

from portlm.ops import cuda
from portlm.ops.experts import choose_experts, experts, experts_reference
from portlm.ops.experts_cuda import _fused
from portlm.ops.kernel_op import address

FORWARD = ("experts_choose", "experts_gather", "experts_combine", "experts_hidden_fwd")
BACKWARD = ("experts_choose_bwd", "experts_hidden_bwd")
EXPERTS = pytest.mark.runs_kernel(*FORWARD, *BACKWARD, on="cuda")
# (shape of x, experts, inner width, k): one token, tails, all experts, one expert, wide enough for vectors, more
# experts than a warp has threads
SHAPES = [
    ((1, 5), 3, 7, 2),
    ((2, 7, 33), 6, 19, 2),
    ((40, 16), 4, 32, 4),
    ((9, 8), 1, 5, 1),
    ((30, 64), 8, 48, 2),
    ((12, 8), 70, 8, 9),
]


def inputs(shape, E, width, dtype, device) -> list[Tensor]:
    C = shape[-1]
    shapes = [shape, (E, C), (E * width, C), (E * width, C), (C, E * width)]
    scales = [1, 1, C**-0.5, C**-0.5, max(width, 1) ** -0.5]
    return [(s * torch.randn(size, device=device)).to(dtype) for size, s in zip(shapes, scales, strict=True)]


@EXPERTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False], ids=["chosen", "all"])
@pytest.mark.parametrize(("shape", "E", "width", "k"), SHAPES, ids=str)
def test_cuda_experts_and_gradients_are_as_accurate_as_pytorch(shape, E, width, k, normalize, dtype, device):
    tensors = inputs(shape, E, width, dtype, device)
    # Rounded logits may choose others than exact ones do, so a router of few bits makes logits that have no rounding.
    tensors[0] = (4 * tensors[0]).round().clamp(-4, 4) / 4
    tensors[1] = (4 * tensors[1]).round().clamp(-4, 4) / 8
    if dtype is torch.bfloat16 and shape[-1] > 16:
        tensors[1][:, 8:] = 0  # so that a sum has few bits, too

    def of(function):
        return lambda *given: function(*given, k, normalize)

    for o, e, r in zip(
        results(of(experts), tensors, dtype),
        results(of(experts_reference), tensors, dtype),
        results(of(experts_reference), tensors, torch.float64),
        strict=True,
    ):
        # gradients of the router are differences of sums over C: their parts are larger than they are
        assert_as_accurate(o, e, r, dtype, roundings=8)


@pytest.mark.runs_kernel("experts_choose", on="cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_experts_chooses_the_first_of_equal_logits_and_any_number_that_is_none(dtype, device):
    logits = torch.tensor(
        [[1.0, 2, 2, 1, 2], [0, -0.0, 0, -1, -1], [-torch.inf] * 4 + [0.0]], device=device
    ).to(dtype)
    for k in (1, 3, 5):
        chosen = torch.empty(3, k, dtype=torch.int64, device=device)
        weights = torch.empty(3, k, device=device)
        arguments = logits.data_ptr(), address(chosen), address(weights), 3, 5, k
        for normalize in (False, True):
            cuda.launch("experts_choose", logits.device, *arguments, normalize, dtype is torch.bfloat16)
            order, expected = choose_experts(logits.float(), k, normalize)
            assert torch.equal(chosen, order)
            assert torch.allclose(weights, expected)
        nothing = torch.full_like(logits, torch.nan)
        cuda.launch(
            "experts_choose", logits.device, nothing.data_ptr(), *arguments[1:], True, dtype is torch.bfloat16
        )
        assert chosen.tolist() == [list(range(k))] * 3
        assert weights.isnan().all()


@EXPERTS
def test_cuda_experts_gives_the_same_bits_every_time(device, request):
    tensors = inputs((40, 16), 5, 24, torch.float32, device)
    first, second = (
        results(lambda *given: experts(*given, 2), tensors, torch.float32) for _ in run_twice(device, request)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_cuda_experts_differentiates_only_what_it_is_asked_for(device):
    tensors = inputs((6, 8), 4, 6, torch.float32, device)
    for chosen in range(5):
        found = []
        for function in (experts, experts_reference):
            given = [t.clone().requires_grad_(i == chosen) for i, t in enumerate(tensors)]
            found.append(torch.autograd.grad(function(*given, 2).square().sum(), given[chosen])[0])
        assert torch.allclose(*found, rtol=1e-4, atol=1e-5)


def test_cuda_experts_that_nobody_chose_have_no_gradient(device):
    tensors = inputs((6, 8), 4, 6, torch.float32, device)
    tensors[0] = tensors[0].abs()
    tensors[1][2] = -100.0
    _, _, _, *grads = results(lambda *given: experts(*given, 1), tensors, torch.float32)
    rows = slice(12, 18)
    assert all((grad[rows] == 0).all() for grad in (grads[0], grads[1], grads[2].t()))


@pytest.mark.parametrize(("shape", "width"), [((0, 8), 6), ((3, 8), 0)], ids=["no rows", "no inner layer"])
def test_cuda_experts_of_nothing_give_nothing(shape, width, device):
    tensors = inputs(shape, 4, width, torch.float32, device)
    y, *grads = results(lambda *given: experts(*given, 2), tensors, torch.float32)
    assert torch.equal(y, torch.zeros(shape, device=device))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@EXPERTS
def test_cuda_experts_passes_opcheck(device):
    tensors = [t.requires_grad_() for t in inputs((6, 8), 4, 6, torch.float32, device)]
    torch.library.opcheck(_fused.op, (*tensors, 2, True))
