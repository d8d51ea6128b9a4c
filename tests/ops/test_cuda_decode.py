"""The CUDA kernels of decoding, products of a few rows and a cache of bytes: on a GPU, and compiled for the CPU."""

import math

import pytest
import torch
from cuda_twins import assert_as_accurate, run_twice
from torch import Tensor

from portlm.ops import cuda, few_rows
from portlm.ops.byte_cache import to_bytes
from portlm.ops.half import pack as pack_half
from portlm.ops.half_linear import half_linear, half_linear_reference
from portlm.ops.kernel_op import kernels
from portlm.ops.linear import linear, linear_reference
from portlm.ops.narrow import ACTIVATIONS
from portlm.ops.quantized import dequantized, pack
from portlm.ops.quantized_attention import quantized_attention, quantized_attention_reference
from portlm.ops.quantized_embedding import quantized_embedding, quantized_embedding_reference
from portlm.ops.quantized_linear import quantized_linear, quantized_linear_reference
from portlm.runtimes.torch_operators import operators

if kernels is None:
    pytest.skip("portlm._C was not built", allow_module_level=True)

# (bits, group, zeros, N, K): one group; an odd number of groups, whose zero points end in half a byte; rows for more
# than one block, the last of them not whole; more columns than are staged at once
WEIGHTS = [(4, 32, False, 5, 32), (4, 32, True, 9, 96), (8, 64, True, 19, 192), (8, 128, False, 8, 256),
           (4, 128, True, 3, 4224), (8, 32, True, 2, 4128)]  # fmt: skip


def quantized(
    bits: int, group: int, zeros: bool, N: int, K: int, device: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Numbers, scales of half precision, and zero points, at random."""
    G = K // group
    weight = torch.randint(256, (N, G, group * bits // 8), dtype=torch.uint8, device=device)
    zero = torch.randint(256, (N, -(-G * bits // 8)), dtype=torch.uint8, device=device) if zeros else None
    return weight, (torch.rand(N, G, device=device) + 0.1).half().float(), zero


def exact(
    x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, bits: int, how: str
) -> Tensor:
    return quantized_linear_reference(
        x.double(), weight, scale.double(), zero, None if bias is None else bias.double(), bits, how
    )


@pytest.mark.runs_kernel("packed_linear", on="cuda")
@pytest.mark.parametrize("rows", [0, 1, 3, 8, 11])
@pytest.mark.parametrize("sizes", WEIGHTS, ids=str)
def test_cuda_quantized_linear_is_as_accurate_as_pytorch_on_what_the_weight_means(sizes, rows, device):
    if rows not in (1, 8) and sizes[4] > 4096:
        rows = 8  # the tiles are the same, and emulated slowly
    bits = sizes[0]
    weight, scale, zero = quantized(*sizes, device)
    x, bias = torch.randn(rows, sizes[4], device=device), torch.randn(sizes[3], device=device)
    x = x if rows else x.expand(2, 0, -1)
    ours = quantized_linear(x, weight, scale, zero, bias, bits)
    if not rows:
        quantized_linear(
            x.new_ones(1, sizes[4]), weight, scale, zero, bias, bits
        )  # the marker wants a call with work
    eager = linear_reference(x, dequantized(weight, scale, zero, bits), bias)
    assert_as_accurate(ours, eager, exact(x, weight, scale, zero, bias, bits, "none"), torch.float32)


@pytest.mark.runs_kernel("packed_linear", on="cuda")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bits", [4, 8])
def test_cuda_quantized_linear_applies_what_follows_it_and_takes_bfloat16(bits, activation, device):
    """In bfloat16 one rounding of the result is all that is lost: what comes before is float32."""
    weight, scale, zero = quantized(bits, 32, True, 13, 64, device)
    x = torch.randn(2, 2, 64, device=device) / 20
    for bias in (torch.randn(13, device=device), None):
        oracle = exact(x, weight, scale, zero, bias, bits, activation)
        eager = quantized_linear_reference(x, weight, scale, zero, bias, bits, activation)
        assert_as_accurate(
            quantized_linear(x, weight, scale, zero, bias, bits, activation), eager, oracle, torch.float32
        )
        half, half_bias = x.bfloat16(), None if bias is None else bias.bfloat16()
        ours = quantized_linear(half, weight, scale, zero, half_bias, bits, activation)
        assert ours.dtype is torch.bfloat16
        oracle = exact(half, weight, scale, zero, half_bias, bits, activation)
        assert torch.allclose(ours.double(), oracle, rtol=2**-8, atol=1e-5)


@pytest.mark.runs_kernel("packed_linear", on="cuda")
@pytest.mark.parametrize("bits", [4, 8])
def test_cuda_quantized_linear_gives_a_row_the_same_bits_in_any_company_and_order(bits, device, request):
    weight, scale, zero = quantized(bits, 64, True, 21, 1152, device)
    x = torch.randn(9, 1152, device=device)
    first, second = (quantized_linear(x, weight, scale, zero, None, bits) for _ in run_twice(device, request))
    assert torch.equal(first, second)
    for begin, end in ((0, 1), (3, 6), (8, 9)):
        assert torch.equal(quantized_linear(x[begin:end], weight, scale, zero, None, bits), first[begin:end])


@pytest.mark.runs_kernel("packed_rows", on="cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_quantized_linear_of_many_rows_is_a_product_of_what_the_weight_means(dtype, device):
    weight, scale, zero = quantized(4, 32, True, 7, 96, device)
    x = torch.randn(few_rows.MOST_ROWS + 1, 96, device=device, dtype=dtype)
    wide = dequantized(weight, scale, zero, 4).to(dtype)
    assert torch.equal(quantized_linear(x, weight, scale, zero), linear_reference(x, wide))


@pytest.mark.runs_kernel("packed_linear", on="cuda")
def test_cuda_quantized_linear_shows_a_row_that_is_no_number_to_its_results_alone(device):
    weight, scale, zero = quantized(8, 32, False, 5, 64, device)
    x = torch.randn(3, 64, device=device)
    x[1, 7], x[2, 9] = math.nan, math.inf
    y = quantized_linear(x, weight, scale, zero, None, 8)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    assert not y[2].isfinite().any()


def test_cuda_quantized_ops_take_of_a_packed_weight_its_scales_in_half_precision(device):
    weight, scale, zero = quantized(4, 32, True, 9, 96, device)
    x = torch.randn(2, 96, device=device)
    packed = pack(weight, scale, zero, 4)
    assert torch.equal(packed, scale.half())
    assert torch.equal(
        quantized_linear(x, weight, scale, zero, packed=packed), quantized_linear(x, weight, scale, zero)
    )
    for wrong in (scale, packed[:, 1:], packed.t().contiguous().t()):
        with pytest.raises(ValueError, match=r"\[quantized_linear\] packed must be float16 \(9, 3\) on CUDA"):
            quantized_linear(x, weight, scale, zero, packed=wrong)


def test_cuda_quantized_linear_leaves_groups_and_places_that_it_cannot_read_to_the_reference(device):
    x = torch.randn(2, 32, device=device)
    narrow = torch.randint(256, (5, 2, 8), dtype=torch.uint8, device=device), torch.ones(5, 2, device=device)
    shifted = torch.randint(256, (5 * 16 + 1,), dtype=torch.uint8, device=device)[1:].view(5, 1, 16)
    for weight, scale in (narrow, (shifted, torch.ones(5, 1, device=device))):
        assert not few_rows.takes_packed(weight, 4)
        if device == "cuda":  # on the CPU it would be that one's kernel
            assert torch.equal(
                quantized_linear(x, weight, scale), quantized_linear_reference(x, weight, scale)
            )


@pytest.mark.runs_kernel("packed_linear", "dense_linear", on="cuda")
def test_cuda_kernels_are_what_the_nodes_of_a_plan_run_on_weights_as_they_are(device):
    """A plan makes the kernels' form of a weight once: of a quantized one its scales, of one of 16 bits itself."""
    weight, scale, zero = quantized(4, 32, True, 9, 96, device)
    x = torch.randn(1, 96, device=device)
    for operator, attributes, parts, wanted in (
        (
            "ai.portlm.QuantizedLinear",
            {"bits": 4},
            (weight, scale, zero),
            dequantized(weight, scale, zero, 4),
        ),
        ("ai.portlm.HalfLinear", {}, (scale.half(),), scale.half().float()),
    ):
        known = operators()[operator]
        call = known.call(attributes, {}, 1 + len(parts), 1)
        ((place, (function, _, sources)),) = known.derive(call).items()
        assert place == known.most
        given = [x[:, : wanted.shape[1]], *parts]
        form = function(*(given[i] if i < len(given) else None for i in sources))
        assert form.dtype is torch.float16
        missing = [None] * (known.most - len(given))
        y = known.bind(call)(*given, *missing, form)
        assert torch.allclose(y, linear_reference(given[0], wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.runs_kernel("packed_rows", on="cuda")
@pytest.mark.parametrize("sizes", WEIGHTS[:4], ids=str)
def test_cuda_rows_of_a_quantized_table_are_exactly_what_it_means(sizes, device):
    weight, scale, zero = quantized(*sizes, device)
    ids = torch.randint(sizes[3], (2, 3), device=device)
    ours = quantized_embedding(ids, weight, scale, zero, sizes[0])
    assert torch.equal(ours, quantized_embedding_reference(ids, weight, scale, zero, sizes[0]))
    assert quantized_embedding(ids[:, :0], weight, scale, zero, sizes[0]).shape == (2, 0, sizes[4])


@pytest.mark.runs_kernel("packed_rows", on="cuda")
def test_cuda_rows_outside_of_a_quantized_table_are_no_numbers(device):
    weight, scale, zero = quantized(4, 32, True, 9, 96, device)
    rows = quantized_embedding(torch.tensor([9, 8, -1], device=device), weight, scale, zero)
    assert rows[[0, 2]].isnan().all()
    assert rows[1].isfinite().all()


# (N, K): 16-byte accesses and single ones, more columns than are staged at once
@pytest.mark.runs_kernel("dense_linear", on="cuda")
@pytest.mark.parametrize("rows", [1, 4, 7])
@pytest.mark.parametrize("sizes", [(1, 1), (9, 33), (5, 64), (3, 4120)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cuda_half_linear_is_as_accurate_as_pytorch_on_the_matrix_in_float32(dtype, sizes, rows, device):
    N, K = sizes
    weight = torch.randn(N, K, device=device).to(dtype)
    x, bias = torch.randn(rows, K, device=device), torch.randn(N, device=device)
    assert pack_half(weight) is weight  # no copy of twice the size
    ours = half_linear(x, weight, bias, "relu", packed=pack_half(weight))
    eager = half_linear_reference(x, weight, bias, "relu")
    oracle = half_linear_reference(x.double(), weight, bias.double(), "relu")
    assert_as_accurate(ours, eager, oracle, torch.float32)


@pytest.mark.runs_kernel("dense_linear", on="cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(9, 33), (6, 64)], ids=str)
def test_cuda_linear_of_few_rows_without_gradient_is_as_accurate_as_pytorch(sizes, dtype, device):
    N, K = sizes
    x, weight, bias = (torch.randn(s, device=device).to(dtype) for s in ((3, K), (N, K), (N,)))
    oracle = linear_reference(x.double(), weight.double(), bias.double())
    assert_as_accurate(linear(x, weight, bias), linear_reference(x, weight, bias), oracle, dtype)
    weight = torch.cat((weight.flatten()[:1], weight.flatten()))[1:].view(
        N, K
    )  # not at a multiple of 16 bytes
    assert_as_accurate(
        linear(x, weight), linear_reference(x, weight), x.double() @ weight.double().t(), dtype
    )


def test_cuda_linear_leaves_gradients_many_rows_and_mixed_types_to_pytorch(device):
    weight = torch.randn(5, 8, device=device)
    assert few_rows.takes_few(torch.ones(8, 8, device=device), weight, None)
    assert not few_rows.takes_few(torch.ones(9, 8, device=device), weight, None)
    assert not few_rows.takes_few(torch.ones(0, 8, device=device), weight, None)
    assert not few_rows.takes_few(torch.ones(1, 8, device=device, dtype=torch.bfloat16), weight, None)
    assert not few_rows.takes_few(torch.ones(1, 8, device=device), weight.requires_grad_(), None)


# (B, T, H, K, P, D, window, softcap): nothing before; a width that no access of 16 bytes fits; several queries that
# share a head and several parts, the last of them not whole; each number of lanes to a slot
CACHES = [(1, 1, 1, 1, 0, 1, None, None), (2, 3, 4, 2, 6, 33, None, None), (1, 2, 8, 2, 170, 64, None, 5.0),
          (2, 1, 2, 2, 139, 80, 20, None), (1, 1, 2, 2, 40, 144, None, None), (1, 5, 3, 1, 60, 272, 7, 3.0),
          (1, 1, 1, 1, 300, 16, 100, None)]  # fmt: skip
BYTES = pytest.mark.runs_kernel("append_bytes", "quantized_attention", on="cuda")


def cache_of(B: int, T: int, H: int, K: int, P: int, D: int, device: str) -> list[Tensor]:
    """q, k, v and a cache of P slots."""
    tensors = [torch.randn(B, T, heads, D, device=device) for heads in (H, K, K)]
    for _ in range(2):
        tensors += to_bytes(torch.randn(B, K, P, D, device=device))
    return tensors


@BYTES
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
@pytest.mark.parametrize("sizes", CACHES, ids=str)
def test_cuda_attention_over_bytes_is_as_accurate_as_pytorch_and_keeps_the_same(sizes, masked, device):
    *shape, window, softcap = sizes
    B, T, P = shape[0], shape[1], shape[4]
    tensors = cache_of(*shape, device)
    mask = None
    if masked:
        mask = (torch.rand(B, P + T, device=device) > 0.4).long()
        mask[-1] = 0  # one row sees nothing at all
        mask[0, -1] = 1
    options = {"mask": mask, "window": window, "softcap": softcap}
    out, *kept = quantized_attention(*tensors, **options)
    eager, *wanted = quantized_attention_reference(*tensors, **options)
    wide = [t.double() if t.dtype is torch.float32 else t for t in tensors]
    oracle = quantized_attention_reference(*wide, **options)[0]
    assert all(torch.equal(a, b) for a, b in zip(kept, wanted, strict=True))
    # a softmax over a few hundred scores, whose exponentials each round
    assert_as_accurate(out, eager, oracle, torch.float32, roundings=4)
    if masked and B > 1:
        assert torch.equal(out[-1], torch.zeros_like(out[-1]))


@BYTES
def test_cuda_attention_over_bytes_gives_the_same_bits_every_time(device, request):
    tensors = cache_of(1, 1, 4, 2, 290, 64, device)
    first, second = (quantized_attention(*tensors)[0] for _ in run_twice(device, request))
    assert torch.equal(first, second)


@BYTES
def test_cuda_cache_of_bytes_keeps_what_is_no_number_and_shows_it_to_those_who_see_it(device):
    tensors = cache_of(2, 1, 2, 2, 130, 32, device)
    tensors[1][0, 0, 0, 3], tensors[2][1, 0, 1, 5], tensors[1][1, 0, 0] = math.nan, math.inf, 0.0
    out, keys, key_scales, values, value_scales = quantized_attention(*tensors)
    assert key_scales[0, 0, -1].isnan()
    assert not value_scales[1, 1, -1].isfinite()
    assert key_scales[1, 0, -1] == 0
    for numbers in (keys[0, 0, -1], values[1, 1, -1], keys[1, 0, -1]):
        assert torch.equal(numbers, torch.zeros_like(numbers))
    assert out[0, :, 0].isnan().all()
    assert out[1, :, 1].isnan().all()
    assert out[0, :, 1].isfinite().all()
    hidden = torch.ones(2, 131, dtype=torch.int64, device=device)
    hidden[:, -1] = 0
    assert quantized_attention(*tensors, mask=hidden)[0].isfinite().all()


def test_cuda_attention_over_bytes_of_many_queries_is_left_to_products(device):
    tensors = cache_of(1, 17, 2, 1, 3, 16, device)
    out, wanted = quantized_attention(*tensors)[0], quantized_attention_reference(*tensors)[0]
    assert torch.equal(out, wanted)


@pytest.mark.no_kernel("it is refused before anything runs")
def test_cuda_attention_over_bytes_refuses_heads_and_parts_that_it_was_not_made_for(device):
    at = torch.device(device)
    for width, parts, problem in ((513, 1, "wider than 512"), (16, 65, "1 to 64 parts")):
        with pytest.raises(RuntimeError, match=problem):
            cuda.launch(
                "quantized_attention", at, *[0] * 5, 16, 16, 1, 1, 0, 1.0, 0, 0, parts, 1, 1, 1, 1, 1, width, 0, 0.0
            )  # fmt: skip
