"""The GELU kernels behind gelu_mlp, against float64: both forms, with and without bias, and the bias gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from portlm.ops.kernel_op import kernels

if kernels is None:
    pytest.skip("portlm._C was not built", allow_module_level=True)

SHAPES = [
    (1, 1),
    (7, 33),
    (3, 768),
    (200, 31),
    (0, 8),
    (4, 0),
]  # 200 rows make several blocks of the bias gradient
FORMS = ["tanh", "none"]


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _forward(x: Tensor, bias: Tensor | None, form: str) -> Tensor:
    y = torch.empty_like(x)
    kernels.gelu_bias_fwd(x.data_ptr(), _address(bias), y.data_ptr(), *x.shape, form == "tanh")
    return y


def _backward(dy: Tensor, x: Tensor, bias: Tensor | None, form: str) -> tuple[Tensor, ...]:
    dx, dbias = torch.empty_like(x), None if bias is None else torch.empty_like(bias)
    kernels.gelu_bias_bwd(
        dy.data_ptr(), x.data_ptr(), _address(bias), dx.data_ptr(), _address(dbias), *x.shape, form == "tanh"
    )
    return (dx,) if dbias is None else (dx, dbias)


def _eager(dy: Tensor, x: Tensor, bias: Tensor | None, form: str) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, bias) if t is not None]
    y = F.gelu(sum(leaves), approximate=form)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gelu_and_its_gradients_are_as_accurate_as_pytorch(shape, with_bias, form, as_accurate):
    dy, x = torch.randn(2, *shape) * 2
    bias = torch.randn(shape[1]) if with_bias else None
    ours = [_forward(x, bias, form), *_backward(dy, x, bias, form)]
    eager = _eager(dy, x, bias, form)
    oracle = _eager(dy.double(), x.double(), None if bias is None else bias.double(), form)
    for o, e, r in zip(ours, eager, oracle, strict=True):
        as_accurate(o, e, r)


@pytest.mark.parametrize("form", FORMS)
def test_gelu_keeps_its_relative_accuracy_where_one_plus_erf_cancels(form):
    x = torch.linspace(-5, 5, 10001).view(1, -1)
    exact = x * torch.special.ndtr(x.double())
    if form == "tanh":
        u = (2 / torch.pi) ** 0.5 * (x.double() + 0.044715 * x.double() ** 3)
        exact = x * torch.sigmoid(2 * u)
    # At x = -5 the exponent's argument is -17, and each of its roundings is one of 17 units of the result.
    torch.testing.assert_close(_forward(x, None, form).double(), exact, rtol=40 * 2**-24, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_gelu_limits(form):
    x = torch.tensor([[-1e30, -1e4, -50.0, 0.0, 50.0, 1e4, 1e30, torch.inf, torch.nan]])
    expected = torch.tensor([[0.0, 0.0, 0.0, 0.0, 50.0, 1e4, 1e30, torch.inf, torch.nan]])
    torch.testing.assert_close(_forward(x, None, form), expected, rtol=0, atol=1e-37, equal_nan=True)
    finite = x[:, :7].contiguous()
    slopes = torch.tensor([[0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(_backward(torch.ones(1, 7), finite, None, form)[0], slopes, rtol=0, atol=1e-30)


@pytest.mark.parametrize("form", FORMS)
def test_gelu_works_in_place(form):
    dy, x = torch.randn(2, 5, 37)
    bias = torch.randn(37)
    y, (dx, _) = _forward(x, bias, form), _backward(dy, x, bias, form)
    kernels.gelu_bias_bwd(
        dy.data_ptr(), x.data_ptr(), bias.data_ptr(), dy.data_ptr(), 0, 5, 37, form == "tanh"
    )
    kernels.gelu_bias_fwd(x.data_ptr(), bias.data_ptr(), x.data_ptr(), 5, 37, form == "tanh")
    assert torch.equal(x, y)
    assert torch.equal(dy, dx)


def test_gelu_does_not_depend_on_the_number_of_threads(same_on_all_thread_counts):
    dy, x = torch.randn(2, 301, 129)
    bias = torch.randn(129)
    assert same_on_all_thread_counts(
        lambda: [_forward(x, bias, "tanh"), _forward(x, None, "none"), *_backward(dy, x, bias, "tanh"),
                 *_backward(dy, x, None, "none")]
    )  # fmt: skip
