"""Newton-Schulz iteration against its definition in float64, and against what it is for: singular values near 1."""

import math

import pytest
import torch

from portlm.ops.newton_schulz import newton_schulz, newton_schulz_reference
from portlm.ops.precision import products_in

# Each of five sums has terms up to five times as large as itself, rounded one by one: this much by luck alone.
LUCK = 16 * torch.finfo(torch.float32).eps

# (n, M, N): one number; wide, tall, square; tails of every width; more than one tile of the products; nothing at all
SHAPES = [(1, 1, 1), (3, 5, 33), (2, 129, 17), (4, 24, 24), (1, 64, 300), (0, 3, 4), (2, 0, 3), (2, 3, 0)]


@pytest.mark.parametrize("shape", [s for s in SHAPES if math.prod(s)], ids=str)
def test_newton_schulz_is_as_accurate_as_pytorch(shape):
    """Directions of small singular values grow 488 times on the way, and so do roundings, in either implementation."""
    x = torch.randn(shape)
    oracle = newton_schulz_reference(x.double())
    ours, eager = (float((y - oracle).abs().max()) for y in (newton_schulz(x), newton_schulz_reference(x)))
    assert ours <= 2 * eager + LUCK


@pytest.mark.parametrize("shape", [(3, 5, 33), (2, 129, 17), (1, 64, 300)], ids=str)
def test_singular_vectors_stay_and_singular_values_come_near_one(shape):
    """Of matrices whose smallest singular value is above 0.003 of the norm, as that of these is."""
    x = torch.randn(shape)
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    assert (s.amin(1) > 0.003 * s.norm(dim=1)).all()
    inside = u.mT @ newton_schulz(x).double() @ vh.mT  # (n, m, m)
    near = inside.diagonal(dim1=1, dim2=2)
    assert near.min() > 0.68
    assert near.max() < 1.21
    # What is not on the diagonal is rounding in float32, grown at most 488 times.
    assert (inside - torch.diag_embed(near)).abs().max() < 488 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("scale", [1e-5, 1e18])
def test_the_scale_of_a_matrix_does_not_matter(scale):
    """Above a norm of 1e-7, which is what the definition divides smaller ones by."""
    x = torch.randn(2, 7, 12)
    torch.testing.assert_close(newton_schulz(scale * x), newton_schulz(x), rtol=1e-4, atol=1e-5)


def test_a_matrix_of_zeros_stays_one():
    assert torch.equal(newton_schulz(torch.zeros(1, 5, 9)), torch.zeros(1, 5, 9))


@pytest.mark.no_kernel("there is nothing to multiply")
@pytest.mark.parametrize("shape", [s for s in SHAPES if not math.prod(s)], ids=str)
def test_nothing_gives_nothing(shape):
    assert newton_schulz(torch.empty(shape)).shape == shape


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_own_matrix(bad):
    x = torch.randn(3, 6, 10)
    clean = newton_schulz(x)
    x[1, 2, 3] = bad
    y = newton_schulz(x)
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    assert y[1].isnan().any()


def test_views_give_what_copies_give():
    """Transposed, strided and misaligned memory."""
    x = torch.randn(3, 40, 21)
    for view in (x.mT, x[:, ::2], x[:, 1:, 1:], x.transpose(0, 1)):
        assert torch.equal(
            newton_schulz(view), newton_schulz(view.clone(memory_format=torch.contiguous_format))
        )


def test_newton_schulz_does_not_depend_on_the_number_of_threads(same_on_all_thread_counts):
    x = torch.randn(3, 100, 150)
    assert same_on_all_thread_counts(lambda: [newton_schulz(x)])


@pytest.mark.runs_kernel("gemm_bf16")
@pytest.mark.parametrize("shape", [(3, 5, 33), (2, 129, 17), (1, 64, 300)], ids=str)
def test_rounded_products_move_the_result_by_rounding(shape):
    """Operands lose 2^-9 of their size in each of 15 products, which no direction of these matrices adds up to 0.1."""
    x = torch.randn(shape)
    oracle = newton_schulz_reference(x.double())
    with products_in("bf16"):
        ours, plain = newton_schulz(x), newton_schulz(x.double())
    assert not torch.equal(ours, newton_schulz(x))
    for y in (ours, plain):
        assert torch.linalg.matrix_norm(y - oracle, 2).max() < 0.1


@pytest.mark.no_kernel("refused before anything is computed")
def test_one_matrix_alone_is_refused():
    with pytest.raises(ValueError, match=r"\[newton_schulz\] x must be \(n, M, N\), got \(3, 4\)"):
        newton_schulz(torch.zeros(3, 4))
