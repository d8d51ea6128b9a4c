"""The product of matrices rounded to bfloat16 against float64 on the rounded operands, by each instruction for it."""

import itertools

import pytest
import torch
from torch import Tensor

from portlm.agreement import within

kernels = pytest.importorskip("portlm._C", reason="the kernels are not built")

pytestmark = pytest.mark.runs_kernel("gemm_bf16")

# Rows and columns: none, one, less than a tile of any instruction set, several with a rest. Depth: none, odd (a pair
# that is half there), less than a register, more than one block of 1024.
SHAPES = [(0, 5, 3), (5, 0, 3), (3, 4, 0), (1, 1, 1), (5, 33, 65), (7, 65, 31), (31, 3, 40), (97, 40, 193),
          (20, 1100, 33), (40, 70, 1201), (64, 48, 64)]  # fmt: skip
ORIENTATIONS = list(itertools.product((0, 1), repeat=2))


# What native_bf16 calls them, and what a processor without the instruction lacks.
WAYS = {"tiles": (2, "AMX"), "pairs": (1, "AVX512_BF16"), "widened": (0, "")}


@pytest.fixture(params=list(WAYS))
def way(request):
    """Run a test on tile registers and on pairs, where the processor has instructions for them, and on float32's."""
    number, name = WAYS[request.param]
    found = kernels.native_bf16(number)
    if found < number:
        kernels.native_bf16(2)
        pytest.skip(f"this processor, or PORTLM_ISA, has no {name}")
    assert found == number
    yield request.param
    kernels.native_bf16(2)


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    bias: Tensor | None,
    transposed: tuple[int, int],
    accumulate: bool = False,
) -> None:
    half = [int(x.dtype is torch.bfloat16) for x in (a, b)]
    kernels.gemm_bf16(
        a.data_ptr(), b.data_ptr(), 0 if bias is None else bias.data_ptr(), c.data_ptr(), *c.shape,
        a.shape[0 if transposed[0] else 1], a.stride(0), b.stride(0), c.stride(0), *transposed, *half, int(accumulate),
    )  # fmt: skip


def operands(M: int, N: int, K: int, transposed: tuple[int, int], gap: int = 0) -> tuple[Tensor, Tensor]:
    """Return views whose rows lie `gap` elements further apart than they are wide."""
    shapes = (K, M) if transposed[0] else (M, K), (N, K) if transposed[1] else (K, N)
    a, b = (torch.randn(rows, columns + gap)[:, :columns] for rows, columns in shapes)
    return a, b


def exact(a: Tensor, b: Tensor, transposed: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the product of the rounded operands in float64, and of their magnitudes."""
    a, b = (x.bfloat16().double() for x in (a, b))
    a, b = a.t() if transposed[0] else a, b.t() if transposed[1] else b
    return a @ b, a.abs() @ b.abs()


@pytest.mark.parametrize("half", ORIENTATIONS, ids=["floats", "half B", "half A", "halves"])
@pytest.mark.parametrize("transposed", ORIENTATIONS, ids=["NN", "NT", "TN", "TT"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_rounded_operands_are_those_of_float64(shape, transposed, half, way):
    """A sum of K products in any order errs by at most K 2^-24 sum |a b|; the bias and what is there add a rounding."""
    M, N, K = shape
    a, b = operands(M, N, K, transposed, gap=3)
    a, b = a.bfloat16() if half[0] else a, b.bfloat16() if half[1] else b
    for bias, accumulate in itertools.product((None, torch.randn(N)), (False, True)):
        c = torch.randn(M, N + 3)[:, :N]
        whole = c.as_strided((M, N + 3), (N + 3, 1)) if c.numel() else c
        before, beyond = c.clone(), whole[:, N:].clone()
        product, magnitude = exact(a, b, transposed)
        if bias is not None:
            product, magnitude = product + bias.double(), magnitude + bias.double().abs()
        if accumulate:
            product, magnitude = product + before.double(), magnitude + before.double().abs()
        gemm(a, b, c, bias, transposed, accumulate)
        assert bool(((c.double() - product).abs() <= (K + 2) * 2.0**-24 * magnitude + K * 2.0**-126).all())
        assert torch.equal(whole[:, N:], beyond)  # nothing outside C is written


@pytest.mark.parametrize("transposed", ORIENTATIONS, ids=["NN", "NT", "TN", "TT"])
@pytest.mark.parametrize("shape", [(3, 900, 300), (768, 128, 96), (96, 768, 1100)], ids=str)
def test_products_do_not_depend_on_the_number_of_threads(shape, transposed, way, same_on_all_thread_counts):
    M, N, K = shape
    a, b = operands(M, N, K, transposed)

    def product() -> list[Tensor]:
        c = torch.empty(M, N)
        gemm(a, b, c, None, transposed)
        return [c]

    assert same_on_all_thread_counts(product)


def test_pointers_need_no_alignment(way):
    """Operands, bias and C begin 4 bytes after a vector's boundary, or 2 where they are halves."""
    for half in ORIENTATIONS:
        whole = [torch.randn(size + 1) for size in (48 * 64, 64 * 48, 48, 48 * 48)]
        a, b = (x[1:].bfloat16() if h else x[1:] for x, h in zip(whole, half, strict=False))
        a, b = (torch.cat((x[:1], x))[1:] if h else x for x, h in zip((a, b), half, strict=True))
        a, b, bias, c = a.view(48, 64), b.view(64, 48), whole[2][1:], whole[3][1:].view(48, 48)
        assert all(x.data_ptr() % 64 in (2, 4) for x in (a, b, bias, c))
        gemm(a, b, c, bias, (0, 0))
        product, magnitude = exact(a, b, (0, 0))
        bound = (64 + 2) * 2.0**-24 * (magnitude + bias.double().abs()) + 64 * 2.0**-126
        assert bool(((c.double() - product - bias.double()).abs() <= bound).all())


def test_products_and_sums_below_the_normal_numbers_may_become_zeros_and_nothing_else(way):
    """Sums around 2^-126, exact but for a flush of less than 2^-126 for each product."""
    a, b = torch.full((33, 66), 2.0**-63), torch.full((66, 33), 2.0**-64)
    c = torch.full((33, 33), 2.0**-127)
    gemm(a, b, c, None, (0, 0), accumulate=True)
    assert within(float((c.double() - 67 * 2.0**-127).abs().max()), 67 * 2.0**-126)
    assert bool((c >= 0).all())


def test_nan_and_infinity_are_handed_on(way):
    """What rounds beyond bfloat16's largest number is infinite as well."""
    for transposed in ORIENTATIONS:
        a, b = torch.ones(20, 20), torch.ones(20, 70)
        a[1, 3], a[2, 5], b[4, 69] = float("nan"), 3.4e38, float("inf")
        left, right = a.t().contiguous() if transposed[0] else a, b.t().contiguous() if transposed[1] else b
        c = torch.empty(20, 70)
        gemm(left, right, c, None, transposed)
        expected = a.bfloat16().float() @ b
        assert torch.equal(c.isnan(), expected.isnan())
        assert torch.equal(c.isinf(), expected.isinf())


@pytest.mark.runs_kernel("round_bf16")
def test_numbers_are_rounded_to_the_nearest_and_what_is_subnormal_to_zero(way):
    """Every upper half with lower halves around the middle between two: PyTorch's bits, except below 2^-126."""
    upper = torch.arange(1 << 16, dtype=torch.int64)
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        x = ((upper << 16) + lower - (upper >= 1 << 15).long() * (1 << 32)).int().view(torch.float32)
        y = torch.empty(x.shape, dtype=torch.bfloat16)
        kernels.round_bf16(x.data_ptr(), y.data_ptr(), x.numel())
        tiny = x.abs() < 2.0**-126
        expected = torch.where(tiny, torch.copysign(torch.zeros(()), x), x).bfloat16()
        assert torch.equal(y.isnan(), x.isnan())
        kept = ~x.isnan()
        assert torch.equal(y[kept].view(torch.int16), expected[kept].view(torch.int16))


def test_all_ways_agree_on_a_long_sum_as_closely_as_float32_can(way):
    """A dot product of 4000 positive numbers: rounding errors of the sum do not cancel, and stay below 4000 2^-24."""
    a, b = torch.rand(6, 4000), torch.rand(4000, 64)
    c = torch.empty(6, 64)
    gemm(a, b, c, None, (0, 0))
    product, _ = exact(a, b, (0, 0))
    assert within(float((c.double() / product - 1).abs().max()), 4000 * 2.0**-24)


def test_the_probe_of_bfloat16_reaches_more_than_nothing_and_uses_the_same_tiles(way):
    c = torch.empty(1, 1)
    gemm(torch.ones(1, 1), torch.ones(1, 1), c, None, (0, 0))
    assert kernels.probe_bf16(4000) > 0
    assert float(c) == 1.0
