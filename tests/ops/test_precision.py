"""Ops inside products_in("bf16"): what their kernels compute, what backward keeps, and that nothing else changes.

The oracle is float64 with the same operands rounded. Where a number is rounded that was computed, float32 and float64
may have it on different sides of the middle between two neighbours: one term of a sum then differs by a bfloat16 step.
`CLOSE` bounds that, as a share of the largest value.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from portlm.agreement import within
from portlm.ops.attention import attention, attention_qkv, attention_reference
from portlm.ops.gelu_mlp import gelu_mlp, gelu_mlp_reference
from portlm.ops.gelu_mlp_bf16 import _fused as fused_mlp
from portlm.ops.gelu_mlp_bf16 import _fused_gradients as fused_mlp_gradients
from portlm.ops.kernel_op import without_kernels
from portlm.ops.linear import linear
from portlm.ops.linear_bf16 import _fused as fused_linear
from portlm.ops.linear_bf16 import _fused_gradients as fused_linear_gradients
from portlm.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from portlm.ops.precision import products_in, rounded_linear_reference, rounds_products
from portlm.ops.relu_squared_mlp import relu_squared_mlp, relu_squared_mlp_reference

LINEAR = ("linear_bf16_fwd", "linear_bf16_bwd")
ATTENTION = ("attention_bf16_fwd", "attention_bf16_bwd")
MLP = ("gelu_mlp_bf16_fwd", "gelu_mlp_bf16_bwd")
# One step of bfloat16 is 2^-8 of a number; a sum of a few dozen products of like size moves by a twentieth of that.
CLOSE = 2.0**-12


def gradients(function, inputs: list[Tensor], upstream: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """Return the value, and the gradient of every floating input."""
    leaves = [t.detach().to(dtype).requires_grad_() if t.is_floating_point() else t for t in inputs]
    with products_in("bf16"):
        y = function(*leaves)
    wanted = [t for t in leaves if t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, None if upstream is None else upstream.to(dtype))]


def assert_close(ours: list[Tensor], oracle: list[Tensor], bound: float = CLOSE) -> None:
    for o, r in zip(ours, oracle, strict=True):
        assert o.dtype is torch.float32
        if o.numel():
            assert within(float((o.double() - r).abs().max()), bound * max(float(r.abs().max()), 1e-3)), (
                o.shape
            )


SHAPES = [((1, 1), 1), ((7, 33), 5), ((2, 5, 128), 130), ((200, 65), 3), ((70, 300), 257), ((0, 16), 3)]


@pytest.mark.runs_kernel(*LINEAR)
@pytest.mark.parametrize(("shape", "N"), SHAPES, ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_linear_rounds_the_operands_of_every_product(shape, N, biased):
    inputs = [torch.randn(shape), torch.randn(N, shape[-1])] + ([torch.randn(N)] if biased else [])
    upstream = torch.randn(*shape[:-1], N)
    # rounding float32 inputs is the same in float64, so here sums alone differ
    expected = gradients(rounded_linear_reference, inputs, upstream, torch.float64)
    assert_close(gradients(linear, inputs, upstream, torch.float32), expected, (shape[-1] + 400) * 2.0**-24)


@pytest.mark.runs_kernel(*MLP)
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize(
    "sizes", [(5, 8, 32, 8), (70, 33, 130, 20), (1400, 24, 1601, 9), (40, 1100, 64, 1030)], ids=str
)
def test_gelu_mlp_is_its_definition_with_rounded_products(sizes, approximate):
    """GELU's argument u is kept rounded for backward: its slope moves by |u| 2^-9, |u| up to 4; 5 rows average few."""
    rows, C, F_, N = sizes
    inputs = [
        torch.randn(rows, C),
        torch.randn(F_, C) / C**0.5,
        torch.randn(F_),
        torch.randn(N, F_) / F_**0.5,
    ]
    inputs.append(torch.randn(N))
    upstream = torch.randn(rows, N)

    def ours(*arguments: Tensor) -> Tensor:
        return gelu_mlp(*arguments, approximate=approximate)

    def oracle(*arguments: Tensor) -> Tensor:
        return gelu_mlp_reference(*arguments, approximate=approximate)

    mine = gradients(ours, inputs, upstream, torch.float32)
    reference = gradients(oracle, inputs, upstream, torch.float64)
    assert_close(mine[:1], reference[:1])
    assert_close(mine[1:], reference[1:], 2.0**-7)


@pytest.mark.runs_kernel(*ATTENTION)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1, 8), (2, 33, 4, 2, 20), (1, 200, 2, 1, 64), (1, 131, 1, 1, 70)], ids=str
)
def test_attention_is_its_definition_with_rounded_products(sizes, causal):
    """Weights are rounded before the softmax divides them by their sum, and after it in the oracle: 2^-8 each."""
    B, T, H, K, D = sizes
    q, k, v = torch.randn(B, T, H, D), torch.randn(B, T, K, D), torch.randn(B, T, K, D)
    upstream = torch.randn(B, T, H, D)
    qkv = torch.cat([t.flatten(2) for t in (q, k, v)], dim=2)

    def apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, causal)

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_reference(q, k, v, causal)

    mine = gradients(apart, [q, k, v], upstream, torch.float32)
    assert_close(mine, gradients(oracle, [q, k, v], upstream, torch.float64), 2.0**-7)
    joined = gradients(lambda x: attention_qkv(x, H, K, causal), [qkv], upstream, torch.float32)
    assert torch.equal(joined[0], mine[0])
    assert torch.equal(joined[1], torch.cat([t.flatten(2) for t in mine[1:]], dim=2))


@pytest.mark.runs_kernel(*ATTENTION)
@pytest.mark.parametrize("bounds", [{"window": 5}, {"window": 70, "softcap": 0.7}, {"softcap": 2.0}], ids=str)
def test_attention_in_bounds_is_its_definition_with_rounded_products(bounds):
    q, k, v, upstream = (torch.randn(1, 131, heads, 20) for heads in (2, 1, 1, 2))
    mine = gradients(lambda *t: attention(*t, **bounds), [q, k, v], upstream, torch.float32)
    wide = gradients(lambda *t: attention_reference(*t, **bounds), [q, k, v], upstream, torch.float64)
    assert_close(mine, wide, 2.0**-7)


@pytest.mark.runs_kernel("linear_cross_entropy_bf16")
@pytest.mark.parametrize(
    ("N", "C", "V"), [(1, 3, 2), (33, 40, 70), (300, 32, 1000), (1100, 16, 257)], ids=str
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy_is_its_definition_with_rounded_products(N, C, V, reduction):
    """Exponentials are kept rounded, so each term of a gradient is off by up to 2^-9 beside the oracle's rounding."""
    targets = torch.randint(V, (N,))
    targets[::7] = -100 if N > 1 else targets[0]
    inputs = [torch.randn(N, C), torch.randn(V, C)]

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, targets, reduction=reduction)

    def oracle(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy_reference(x, weight, targets, reduction=reduction)

    mine = gradients(ours, inputs, None, torch.float32)
    reference = gradients(oracle, inputs, None, torch.float64)
    assert within(abs(float(mine[0]) / float(reference[0]) - 1), 1e-6)
    assert_close(mine[1:], reference[1:], 2.0**-8)


@pytest.mark.runs_kernel("linear_cross_entropy_bf16")
def test_the_gradient_of_a_nearly_certain_target_keeps_its_digits():
    """1 - p of a target with p = 0.9999 comes from the loss, not from a rounded p, which would give 0."""
    x, weight = torch.ones(64, 1), torch.tensor([[9.0], [0.0]])
    x.requires_grad_()
    with products_in("bf16"):
        linear_cross_entropy(x, weight, torch.zeros(64, dtype=torch.long), reduction="sum").backward()
    exact = -9.0 / (1 + torch.tensor(9.0).double().exp())
    assert within(
        float((x.grad.double() / exact - 1).abs().max()), 2.0**-7
    )  # two roundings: of it, and of p of the other


@pytest.mark.runs_kernel("linear_cross_entropy_bf16")
def test_targets_outside_the_head_are_refused_in_bf16_too():
    with products_in("bf16"), pytest.raises(IndexError, match=r"target 9 at position 1 is outside \[0, 4\)"):
        linear_cross_entropy(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 9]))


@pytest.mark.runs_kernel(*LINEAR)
def test_relu_squared_mlp_rounds_both_its_products():
    inputs = [torch.randn(30, 8), torch.randn(32, 8), torch.randn(32), torch.randn(5, 32), torch.randn(5)]

    def oracle(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return rounded_linear_reference(F.relu(rounded_linear_reference(x, w1, b1)).square(), w2, b2)

    upstream = torch.randn(30, 5)
    mine = gradients(relu_squared_mlp, inputs, upstream, torch.float32)
    assert_close(mine, gradients(oracle, inputs, upstream, torch.float64), 2.0**-10)
    assert not torch.equal(mine[0], relu_squared_mlp_reference(*inputs))


@pytest.mark.runs_kernel(*LINEAR, *ATTENTION, *MLP, "linear_cross_entropy_bf16")
def test_results_and_gradients_do_not_depend_on_the_number_of_threads(same_on_all_thread_counts):
    x, weight, bias = torch.randn(500, 96), torch.randn(130, 96), torch.randn(130)
    w1, b1, w2, b2 = torch.randn(200, 96), torch.randn(200), torch.randn(96, 200), torch.randn(96)
    head, targets = torch.randn(700, 96), torch.randint(700, (500,))

    qkv = torch.randn(1, 300, 12 * 10)

    def everything() -> list[Tensor]:
        upstream = torch.ones(500, 130), torch.ones(500, 96)
        return [
            *gradients(linear, [x, weight, bias], upstream[0], torch.float32),
            *gradients(gelu_mlp, [x, w1, b1, w2, b2], upstream[1], torch.float32),
            *gradients(lambda x: attention_qkv(x, 6, 1), [qkv], torch.ones(1, 300, 6, 15), torch.float32),
            *gradients(lambda x, h: linear_cross_entropy(x, h, targets), [x, head], None, torch.float32),
        ]

    assert same_on_all_thread_counts(everything)


@pytest.mark.runs_kernel("linear_bf16_fwd", "linear_bf16_bwd", "gelu_mlp_bf16_fwd", "gelu_mlp_bf16_bwd")
def test_rounding_ops_pass_opcheck():
    x, weight, bias = (t.requires_grad_() for t in (torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5)))
    torch.library.opcheck(fused_linear.op, (x, weight, bias))
    torch.library.opcheck(fused_linear.op, (x, weight, None))
    kept = x.detach().bfloat16()
    torch.library.opcheck(
        fused_linear_gradients.op, (torch.randn(2, 3, 5), kept, weight.detach(), [True, False, True])
    )
    w1, b1, w2, b2 = torch.randn(9, 8), torch.randn(9), torch.randn(4, 9), torch.randn(4)
    torch.library.opcheck(fused_mlp.op, (x, *(t.requires_grad_() for t in (w1, b1, w2, b2)), True))
    pre = torch.randn(2, 3, 9).bfloat16()
    torch.library.opcheck(
        fused_mlp_gradients.op, (torch.randn(2, 3, 4), kept, pre, w1.detach(), w2.detach(), [True] * 5, False)
    )


@pytest.mark.runs_kernel("linear_bf16_bwd")
def test_backward_goes_as_its_forward_went():
    """A graph made in bf16 is differentiated in bf16 outside of the block, and what backward keeps is half as large."""
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    kept = []
    with (
        products_in("bf16"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.dtype), t)[1], lambda t: t),
    ):
        y = linear(x, weight)
    assert kept == [torch.bfloat16, torch.float32]  # x rounded, and the weight itself
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(6, 5) @ weight.detach().bfloat16().float())


@pytest.mark.no_kernel("the references alone")
def test_without_kernels_products_are_rounded_as_well():
    x, weight = torch.randn(6, 8), torch.randn(5, 8)
    with without_kernels(), products_in("bf16"):
        assert torch.equal(linear(x, weight), x.bfloat16().float() @ weight.bfloat16().float().t())
        assert rounds_products()
    assert not rounds_products()
    with pytest.raises(RuntimeError), products_in("bf16"):
        raise RuntimeError
    assert not rounds_products()
