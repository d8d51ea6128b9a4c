"""The CUDA kernels of attention against the same oracles as the CPU's: on a GPU, and compiled for the CPU."""

import math

import pytest
import torch
from cuda_twins import DTYPES, assert_as_accurate, results, run_twice
from torch import Tensor

from portlm.ops.attention import attention, attention_qkv, attention_qkv_reference, attention_reference
from portlm.ops.cached_attention import _parts, cached_attention, cached_attention_reference
from portlm.ops.kernel_op import kernels
from portlm.ops.masked_attention import masked_attention, masked_attention_reference
from portlm.ops.precision import products_in

if kernels is None:
    pytest.skip("portlm._C was not built", allow_module_level=True)

# delta is the sum over dout times out, which eager has as a sum over weights and their gradients: where few keys are
# seen and those nearly cancel, roundings remain that eager loses (tests/ops/test_attention.py). In bfloat16, out is
# rounded before.
ROUNDINGS = 4

FORWARD = pytest.mark.runs_kernel("attention_fwd", on="cuda")
BOTH = pytest.mark.runs_kernel("attention_fwd", "attention_bwd", on="cuda")
MASKED = pytest.mark.runs_kernel("masked_attention_fwd", "masked_attention_bwd", on="cuda")
CACHED = pytest.mark.runs_kernel("append_cache", "cached_attention", on="cuda")
EVERY_TYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# (B, T, H, K, D): one of everything; grouped heads that no vector fits; a tile and one query more; heads of each width
# that tiles have, the widest odd; two tiles of tensor cores; sequences that share a launch; nothing at all.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 7, 6, 2, 5),
    (1, 65, 2, 1, 64),
    (1, 70, 2, 2, 128),
    (1, 140, 1, 1, 40),
    (1, 19, 2, 1, 201),
    (9, 9, 1, 1, 8),
    (0, 4, 2, 2, 8),
    (2, 0, 2, 2, 8),
]
# Windows of one key, of some, and of more than a tile; a cap that bends most scores; all keys.
BOUNDS = [{}, {"window": 1}, {"window": 40, "softcap": 0.7}, {"softcap": 2.0}, {"causal": False}]


def heads(B: int, T: int, H: int, K: int, D: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(B, T, n, D, device=device).to(dtype) for n in (H, K, K)]


def assert_twins(
    ours, reference, tensors: list[Tensor], dtype: torch.dtype, roundings: int = ROUNDINGS
) -> None:
    for o, e, r in zip(
        results(ours, tensors, dtype),
        results(reference, tensors, dtype),
        results(reference, tensors, torch.float64),
        strict=True,
    ):
        assert_as_accurate(o, e, r, dtype, roundings)


@BOTH
@EVERY_TYPE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cuda_attention_and_its_gradients_are_as_accurate_as_pytorch(shape, dtype, device):
    assert_twins(attention, attention_reference, heads(*shape, device, dtype), dtype)


@BOTH
@EVERY_TYPE
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_cuda_attention_and_its_gradients_keep_to_their_bounds(bounds, dtype, device):
    """To a query that sees one key its score is nothing: two sums, up to 15 here, leave their roundings."""
    assert_twins(
        lambda *t: attention(*t, scale=0.3, **bounds),
        lambda *t: attention_reference(*t, scale=0.3, **bounds),
        heads(1, 75, 4, 2, 24, device, dtype),
        dtype,
        40 if bounds.get("window") == 1 else ROUNDINGS,
    )


@BOTH
@EVERY_TYPE
def test_cuda_attention_reads_and_writes_heads_where_they_lie(dtype, device):
    """Side by side, as one linear map yields them, and as a view that begins off any vector."""
    qkv = torch.randn(2, 35, 8 * 16, device=device).to(dtype)
    assert_twins(lambda x: attention_qkv(x, 4, 2), lambda x: attention_qkv_reference(x, 4, 2), [qkv], dtype)
    wide = torch.randn(2, 35, 6 * 16 + 1, device=device).to(dtype)

    def of(function):
        return lambda x: function(*x[..., 1:].unflatten(-1, (6, 16)).split(2, dim=2))

    assert_twins(of(attention), of(attention_reference), [wide], dtype)


@BOTH
@EVERY_TYPE
@pytest.mark.parametrize(("T", "D"), [(140, 16), (70, 72), (35, 200)])
def test_cuda_attention_gives_the_same_bits_every_time(T, D, dtype, device, request):
    tensors = heads(1, T, 2, 1, D, device, dtype)
    first, second = (results(attention, tensors, dtype) for _ in run_twice(device, request))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@FORWARD
@pytest.mark.parametrize("D", [40, 128])
def test_cuda_attention_of_many_heads_is_as_accurate_as_pytorch(D, device):
    """From 256 tiles of queries on, warps of tensor cores take twice as many."""
    q, k, v = heads(4, 20, 64, 64, D, device, torch.bfloat16)
    eager = attention_reference(q, k, v)
    oracle = attention_reference(*(t.double() for t in (q, k, v)))
    assert_as_accurate(attention(q, k, v), eager, oracle, torch.bfloat16)


@FORWARD
@EVERY_TYPE
def test_cuda_attention_shows_a_key_that_is_no_number_to_later_queries_alone(dtype, device):
    q, k, v = heads(1, 70, 1, 1, 8, device, dtype)
    k[0, 66] = math.nan
    y = attention(q, k, v)
    assert y[0, :66].isfinite().all()
    assert y[0, 66:].isnan().all()


@pytest.mark.no_kernel("it is about what the kernels leave to the reference")
def test_cuda_attention_leaves_wider_heads_to_the_reference(device):
    wide = heads(1, 3, 1, 1, 257, device, torch.bfloat16)
    assert torch.equal(attention(*wide), attention_reference(*wide))
    assert torch.equal(masked_attention(*wide), masked_attention_reference(*wide))


@BOTH
@pytest.mark.parametrize("side_by_side", [False, True], ids=["apart", "side by side"])
def test_cuda_attention_rounds_its_products_where_the_precision_says_so(side_by_side, device):
    """As accurate as products of rounded operands, and one rounding to bfloat16 of what comes out."""
    tensors = heads(1, 40, 4, 2, 16, device, torch.float32)
    ours, reference = attention, attention_reference
    if side_by_side:
        tensors = [torch.cat([t.flatten(2) for t in tensors], 2)]

        def ours(qkv):
            return attention_qkv(qkv, 4, 2)

        def reference(qkv):
            return attention_qkv_reference(qkv, 4, 2)

    oracle = results(reference, tensors, torch.float64)
    with products_in("bf16"):
        found, eager = (results(function, tensors, torch.float32) for function in (ours, reference))
    for o, e, r in zip(found, eager, oracle, strict=True):
        assert o.dtype is torch.float32
        assert_as_accurate(o, e, r, torch.bfloat16)
        assert not torch.allclose(o.double(), r, atol=1e-4)  # it has rounded


# (B, T, S, H, K, D): one of everything; a decoder's queries, few and many, against more keys; no key.
CROSSED = [(1, 1, 1, 1, 1, 1), (2, 5, 35, 4, 2, 12), (2, 40, 66, 2, 2, 64), (1, 3, 40, 2, 1, 160)]


def masks(B: int, S: int, device: str) -> Tensor:
    """Some keys of each row hidden, and of the last all."""
    mask = (torch.rand(B, S, device=device) > 0.4).long()
    mask[-1] = 0
    return mask


@MASKED
@EVERY_TYPE
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("bias", ["none", "heads", "one head", "rows"])
@pytest.mark.parametrize("shape", CROSSED, ids=str)
def test_cuda_masked_attention_and_its_gradients_are_as_accurate_as_pytorch(
    shape, bias, masked, dtype, device
):
    B, T, S, H, K, D = shape
    tensors = [torch.randn(B, n, h, D, device=device).to(dtype) for n, h in ((T, H), (S, K), (S, K))]
    sizes = {"none": None, "heads": (H, T, S), "one head": (1, 1, T, S), "rows": (B, H, T, S)}[bias]
    if sizes:
        tensors.append(torch.randn(sizes, device=device).to(dtype))
    mask = masks(B, S, device) if masked else None

    def of(function):
        return lambda q, k, v, b=None: function(q, k, v, mask, b)

    # a bias that rows share has a gradient that adds up their roundings, one that heads share, too
    assert_twins(of(masked_attention), of(masked_attention_reference), tensors, dtype, ROUNDINGS * B)


@MASKED
def test_cuda_masked_attention_gives_the_same_bits_every_time(device, request):
    tensors = [torch.randn(2, n, h, 16, device=device) for n, h in ((40, 4), (70, 2), (70, 2))]
    tensors.append(torch.randn(4, 40, 70, device=device))
    mask = masks(2, 70, device)

    def run(q, k, v, bias):
        return masked_attention(q, k, v, mask, bias)

    first, second = (results(run, tensors, torch.float32) for _ in run_twice(device, request))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.runs_kernel("masked_attention_fwd", on="cuda")
@EVERY_TYPE
@pytest.mark.parametrize("S", [0, 1, 77])
@pytest.mark.parametrize("T", [0, 2, 17])
def test_cuda_masked_attention_without_a_gradient_is_as_accurate_as_pytorch(T, S, dtype, device):
    """Few queries take another kernel then."""
    q, k, v = (torch.randn(2, n, h, 24, device=device).to(dtype) for n, h in ((T, 4), (S, 2), (S, 2)))
    bias, mask = torch.randn(4, T, S, device=device).to(dtype), masks(2, S, device) if S else None
    ours, eager = masked_attention(q, k, v, mask, bias), masked_attention_reference(q, k, v, mask, bias)
    oracle = masked_attention_reference(*(t.double() for t in (q, k, v)), mask, bias.double())
    assert_as_accurate(ours, eager, oracle, dtype)


def cache(B: int, T: int, P: int, H: int, K: int, D: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    shapes = [(B, T, H, D), (B, T, K, D), (B, T, K, D), (B, K, P, D), (B, K, P, D)]
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


# (B, T, P, H, K, D): nothing before; rows of each number that a block holds, and more; heads that vectors fit in one
# piece and in two, and that none fits; more new tokens than parts are made for; a cache of several parts.
STEPS = [
    (1, 1, 0, 1, 1, 1),
    (2, 1, 9, 6, 2, 64),
    (1, 2, 150, 4, 2, 128),
    (1, 3, 40, 4, 1, 200),
    (3, 1, 31, 2, 2, 33),
    (1, 5, 3, 2, 1, 250),
    (2, 17, 30, 4, 2, 32),
    (1, 1, 700, 2, 1, 40),
]


@CACHED
@EVERY_TYPE
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize(
    "bounds", [{}, {"window": 33}, {"window": 1, "softcap": 0.7}, {"softcap": 2.0}], ids=str
)
@pytest.mark.parametrize("step", STEPS, ids=str)
def test_cuda_cached_attention_is_as_accurate_as_pytorch(step, bounds, masked, dtype, device):
    B, T, P, *_ = step
    tensors = cache(*step, device, dtype)
    mask = masks(B, P + T, device) if masked else None
    ours = cached_attention(*tensors, mask, **bounds)
    eager = cached_attention_reference(*tensors, mask, **bounds)
    oracle = cached_attention_reference(*(t.double() for t in tensors), mask, **bounds)
    assert_as_accurate(ours[0], eager[0], oracle[0], dtype)
    assert torch.equal(ours[1], eager[1])
    assert torch.equal(ours[2], eager[2])


@CACHED
@EVERY_TYPE
@pytest.mark.parametrize("T", [1, 20])
def test_cuda_cached_attention_knows_padding_in_front(T, dtype, device):
    """Of a whole tile and some of the next, with tiles behind them that the mask shows whole."""
    tensors = cache(1, T, 230, 2, 1, 32, device, dtype)
    mask = (torch.arange(230 + T, device=device) >= 70).long()[None]
    ours, eager = (f(*tensors, mask)[0] for f in (cached_attention, cached_attention_reference))
    oracle = cached_attention_reference(*(t.double() for t in tensors), mask)[0]
    assert_as_accurate(ours, eager, oracle, dtype)


@CACHED
def test_cuda_cached_attention_gives_the_same_bits_every_time(device, request):
    tensors = cache(1, 3, 400, 4, 2, 48, device, torch.float32)
    first, second = (cached_attention(*tensors)[0] for _ in run_twice(device, request))
    assert torch.equal(first, second)


@CACHED
def test_cuda_cached_attention_reads_bfloat16_rows_that_no_vector_fits(device):
    """They begin one element behind an aligned address."""
    tensors = [
        torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)
        for t in cache(1, 1, 9, 2, 1, 64, device, torch.bfloat16)
    ]
    eager = cached_attention_reference(*tensors)[0]
    oracle = cached_attention_reference(*(t.double() for t in tensors))[0]
    assert_as_accurate(cached_attention(*tensors)[0], eager, oracle, torch.bfloat16)


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ((1, 1, 4096, 32, 8), 32),  # as many as there are
        ((1, 1, 100_000, 32, 8), 64),  # 512 blocks
        ((64, 1, 4096, 32, 8), 1),
        ((1, 1, 100, 12, 12), 1),
        ((1, 17, 4096, 12, 12), 1),  # tiles
        ((1, 1, 0, 12, 12), 1),
        ((0, 1, 1000, 0, 1), 8),
    ],
)
def test_the_parts_of_a_cache_depend_on_sizes_alone(sizes, parts):
    assert _parts(*sizes) == parts
