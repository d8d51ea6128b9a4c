"""The matrix product against float64 and torch.mm, over its ways, orientations, tails and distances between rows."""

import itertools

import pytest
import torch
from torch import Tensor

kernels = pytest.importorskip("portlm._C", reason="the kernels are not built")

# Rows: none, the streaming and dot product ways (1, 5, 24), one tile, several, with a rest. Columns: a rest below and
# above one vector, several blocks of 512. Depth: none, tails of every register width, more than one block of 192.
SHAPES = [
    (0, 5, 3),
    (5, 0, 3),
    (3, 4, 0),
    (30, 4, 0),
    (1, 1, 1),
    (1, 257, 300),
    (5, 33, 65),
    (24, 130, 100),
    (25, 17, 31),
    (31, 3, 40),
    (97, 40, 193),
    (64, 1100, 20),
    (130, 96, 400),
]
ORIENTATIONS = list(itertools.product((0, 1), repeat=2))


def _matrix(rows: int, columns: int, gap: int) -> Tensor:
    """Return a (rows, columns) view whose rows lie `gap` floats further apart than they are wide."""
    return torch.randn(rows, columns + gap)[:, :columns]


def _gemm(
    a: Tensor, b: Tensor, c: Tensor, bias: Tensor | None, transposed: tuple[int, int], accumulate: bool
):
    K = a.shape[0 if transposed[0] else 1]
    kernels.gemm(
        a.data_ptr(), b.data_ptr(), 0 if bias is None else bias.data_ptr(), c.data_ptr(), *c.shape, K,
        a.stride(0), b.stride(0), c.stride(0), *transposed, int(accumulate),
    )  # fmt: skip


@pytest.mark.parametrize("transposed", ORIENTATIONS, ids=["NN", "NT", "TN", "TT"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gap", [0, 3])
def test_gemm_is_as_accurate_as_pytorch(shape, transposed, gap, as_accurate):
    M, N, K = shape
    a = _matrix(K, M, gap) if transposed[0] else _matrix(M, K, gap)
    b = _matrix(N, K, gap) if transposed[1] else _matrix(K, N, gap)
    left, right = a.t() if transposed[0] else a, b.t() if transposed[1] else b
    for bias, accumulate in itertools.product((None, torch.randn(N)), (False, True)):
        c = _matrix(M, N, gap)
        before = c.clone()

        def expected(dtype, bias=bias, accumulate=accumulate, before=before):
            product = torch.mm(left.to(dtype), right.to(dtype))
            product = product if bias is None else product + bias.to(dtype)
            return before.to(dtype) + product if accumulate else product

        whole = c.as_strided((M, N + gap), (N + gap, 1)) if c.numel() else c
        beyond = whole[:, N:].clone()
        _gemm(a, b, c, bias, transposed, accumulate)
        as_accurate(c, expected(torch.float32), expected(torch.float64))
        assert torch.equal(whole[:, N:], beyond)  # nothing outside C is written


@pytest.mark.parametrize("transposed", ORIENTATIONS, ids=["NN", "NT", "TN", "TT"])
@pytest.mark.parametrize("shape", [(3, 900, 300), (768, 128, 96), (96, 768, 400), (300, 2, 200)], ids=str)
def test_gemm_does_not_depend_on_the_number_of_threads(shape, transposed, same_on_all_thread_counts):
    M, N, K = shape
    a = torch.randn(K, M) if transposed[0] else torch.randn(M, K)
    b = torch.randn(N, K) if transposed[1] else torch.randn(K, N)

    def product() -> list[Tensor]:
        c = torch.empty(M, N)
        _gemm(a, b, c, None, transposed, False)
        return [c]

    assert same_on_all_thread_counts(product)


def test_gemm_hands_on_nan_and_infinity():
    for M, transposed in itertools.product((2, 40), ORIENTATIONS):
        a, b, c = torch.ones(M, 20), torch.ones(20, 33), torch.empty(M, 33)
        a[1, 3], b[4, 32] = float("nan"), float("inf")
        left, right = a.t().contiguous() if transposed[0] else a, b.t().contiguous() if transposed[1] else b
        _gemm(left, right, c, None, transposed, False)
        assert torch.equal(c.isnan(), (a @ b).isnan())
        assert torch.equal(c.isinf(), (a @ b).isinf())
