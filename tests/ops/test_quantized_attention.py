"""quantized_attention against its float64 oracle, the numbers it keeps, cuts of a text, and its errors."""

import numpy as np
import pytest
import torch
from cache_cases import SHAPES, padded_rows

from portlm.ops.byte_cache import kept, rounded_cache, to_bytes
from portlm.ops.cached_attention import cached_attention, cached_attention_reference
from portlm.ops.quantized_attention import quantized_attention, quantized_attention_reference


def _fill(sizes, rng):
    """Rows with padding, and a cache of any numbers."""
    given = padded_rows(sizes, rng)
    shape = sizes["batch"], sizes["num_kv_heads"], sizes["past"]
    for name in ("past_key", "past_value"):
        given[name] = rng.integers(-127, 128, (*shape, sizes["D"]), np.int8)
        given[f"{name}_scale"] = rng.random((*shape, 1), np.float32) / 50
    return given


MATRIX = {
    "QuantizedAttention": {
        "shapes": {
            "q": "batch sequence num_heads D",
            "k": "batch sequence num_kv_heads D",
            "v": "batch sequence num_kv_heads D",
            "past_key": "batch num_kv_heads past D",
            "past_key_scale": "batch num_kv_heads past one",
            "past_value": "batch num_kv_heads past D",
            "past_value_scale": "batch num_kv_heads past one",
            "mask": "batch total",
            "position_ids": "batch sequence",  # for the graph
        },
        "variants": [
            {"num_heads": 6, "num_kv_heads": 2, "D": 5, "scale": 0.3, "one": 1},
            {"num_heads": 4, "num_kv_heads": 4, "D": 8, "scale": 0.35, "one": 1},
            {"num_heads": 3, "num_kv_heads": 1, "D": 7, "scale": 0.4, "one": 1},
            {"num_heads": 4, "num_kv_heads": 4, "D": 8, "scale": 0.4, "one": 1, "window": 3, "softcap": 1.5},
        ],
        "fill": _fill,
    }
}


def _inputs(B, T, P, H, K, D):
    q, k, v = torch.randn(B, T, H, D), torch.randn(B, T, K, D), torch.randn(B, T, K, D)
    return q, k, v, *to_bytes(torch.randn(B, K, P, D)), *to_bytes(torch.randn(B, K, P, D))


def _double(tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


@pytest.mark.parametrize(
    "bounds", [{"window": 6}, {"window": 100, "softcap": 0.7}, {"softcap": 2.0}], ids=str
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantized_attention_keeps_to_its_bounds(shape, bounds, as_accurate):
    tensors = _inputs(*shape)
    mask = (torch.rand(shape[0], shape[2] + shape[1]) > 0.3).long()
    ours = quantized_attention(*tensors, mask, **bounds)
    eager = quantized_attention_reference(*tensors, mask, **bounds)
    oracle = quantized_attention_reference(*_double(tensors), mask, **bounds)
    as_accurate(ours[0], eager[0], oracle[0])


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantized_attention_is_as_accurate_as_pytorch(shape, padded, as_accurate):
    tensors = _inputs(*shape)
    B, T, P = shape[:3]
    mask = (torch.rand(B, P + T) > 0.3).long() if padded else None
    ours = quantized_attention(*tensors, mask)
    eager = quantized_attention_reference(*tensors, mask)
    oracle = quantized_attention_reference(*_double(tensors), mask)
    as_accurate(ours[0], eager[0], oracle[0])
    for mine, theirs in zip(ours[1:], eager[1:], strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.no_kernel("it is about the definition")
def test_what_is_kept_is_within_half_a_step_of_what_was_given():
    x = torch.randn(50, 33) * torch.logspace(-30, 30, 50)[:, None]
    q, scale = to_bytes(x)
    assert (q.abs().amax(-1) == 127).all()
    assert ((q * scale.double() - x).abs() <= scale.double() * 0.5001).all()


@pytest.mark.parametrize("D", [1, 3, 8, 31, 64])
def test_the_kernel_keeps_the_same_numbers_to_the_bit(D):
    """Ties, zeros, subnormal and largest numbers, whichever lanes they are in."""
    x = torch.randn(1, 400, 3, D)
    x[0, :100] *= torch.logspace(-44, 38, 100)[:, None, None].clamp_max(3e38) / 6
    x[0, 100] = 0.0
    x[0, 101] = -0.0
    x[0, 102:140] = torch.arange(-19, 19)[:, None, None] + torch.tensor(0.5)
    x[0, 102:140, :, 0] = 127.0  # scale 1: every other number of the row is a tie
    x[0, 140] = 1e-45
    x[0, 141] = torch.finfo(torch.float32).max
    empty = torch.empty(1, 3, 0, D, dtype=torch.int8), torch.empty(1, 3, 0, 1)
    _, keys, scales, values, _ = quantized_attention(x, x, x, *empty, *empty)
    q, scale = to_bytes(x.transpose(1, 2))
    assert torch.equal(keys, q)
    assert torch.equal(values, q)
    assert torch.equal(scales, scale)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("D", [1, 7, 33])
def test_a_vector_without_numbers_gives_none(D, value):
    """Wherever it stands in the vector; other heads are not touched."""
    q, k, v, *cache = _inputs(1, 3, 4, 2, 2, D)
    v[0, 1, 0, D // 2] = value
    out, _, _, _, scales = quantized_attention(q, k, v, *cache)
    assert not torch.isfinite(scales[0, 0, 5])
    assert not torch.isfinite(out[0, 1:, 0]).any()
    assert torch.isfinite(out[0, :, 1]).all()


@pytest.mark.parametrize("T", [2, 150], ids=["few", "tiles"])
def test_a_query_that_sees_nothing_gives_zero(T):
    out, *_ = quantized_attention(*_inputs(2, T, 3, 4, 2, 8), torch.tensor([[0] * (3 + T), [1] * (3 + T)]))
    assert torch.equal(out[0], torch.zeros(T, 4, 8))
    assert out[1].abs().min() > 0


@pytest.mark.parametrize("cuts", [[1] * 20, [20], [3, 16, 1], [18, 2]], ids=str)
def test_an_answer_does_not_depend_on_how_its_text_was_cut(cuts):
    """All new slots are read as they are kept: only sums are taken in another order. Outputs are of size 1."""
    q, k, v, *cache = _inputs(2, 20, 0, 4, 2, 16)
    whole = quantized_attention_reference(*_double((q, k, v, *cache)))[0]
    outs, begin = [], 0
    for cut in cuts:
        part = slice(begin, begin + cut)
        out, *cache = quantized_attention(q[:, part], k[:, part], v[:, part], *cache)
        outs.append(out)
        begin += cut
    assert (torch.cat(outs, 1) - whole).abs().max() < 1e-5


def test_it_is_cached_attention_over_what_is_kept(as_accurate):
    q, k, v, *_ = _inputs(2, 5, 0, 4, 2, 16)
    past = torch.randn(2, 2, 9, 16)
    ours = quantized_attention(q, k, v, *to_bytes(past), *to_bytes(past))[0]
    with rounded_cache():
        theirs = cached_attention(q, k, v, kept(past), kept(past))[0]
    wide = [t.double() for t in (q, kept(k), kept(v), kept(past), kept(past))]
    as_accurate(ours, theirs, cached_attention_reference(*wide)[0])


def test_the_result_does_not_depend_on_the_number_of_threads():
    tensors = _inputs(2, 9, 200, 8, 4, 64)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(quantized_attention(*tensors))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_strided_operands_are_read_right():
    q, k, v, *cache = _inputs(2, 3, 4, 2, 2, 8)
    strided = quantized_attention(
        *torch.stack((q, k, v), dim=2).unbind(2),
        *(t.transpose(0, 1).contiguous().transpose(0, 1) for t in cache),
    )
    assert torch.equal(strided[0], quantized_attention(q, k, v, *cache)[0])


@pytest.mark.no_kernel("refused before a kernel is called")
@pytest.mark.parametrize(
    "change",
    [
        {"q": (2, 3, 8)},
        {"k": (2, 3, 3, 8), "v": (2, 3, 3, 8)},
        {"v": (2, 3, 2, 4)},
        {"past_key": (2, 4, 5, 8)},
        {"past_key_scale": (2, 2, 5)},
        {"past_value": (2, 2, 6, 8)},
        {"past_value_scale": (2, 2, 5, 8)},
        {"mask": (2, 7)},
    ],
    ids=str,
)
def test_wrong_shapes_are_named(change):
    shapes = {"q": (2, 3, 4, 8), "k": (2, 3, 2, 8), "v": (2, 3, 2, 8), "past_key": (2, 2, 5, 8)}
    shapes |= {"past_key_scale": (2, 2, 5, 1), "past_value": (2, 2, 5, 8), "past_value_scale": (2, 2, 5, 1)}
    small = ("past_key", "past_value")
    tensors = {
        name: torch.zeros(change.get(name, shape), dtype=torch.int8 if name in small else torch.float32)
        for name, shape in shapes.items()
    }
    mask = torch.ones(change.get("mask", (2, 8)), dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\[quantized_attention\]"):
        quantized_attention(**tensors, mask=mask)


@pytest.mark.no_kernel("refused before a kernel is called")
def test_a_cache_of_floats_is_refused():
    q, k, v, *cache = _inputs(1, 1, 2, 1, 1, 4)
    with pytest.raises(ValueError, match=r"\[quantized_attention\] the cache must have torch.int8"):
        quantized_attention(q, k, v, cache[0].float(), *cache[1:])
