"""cached_attention against its float64 oracle, padding, and its errors."""

import pytest
import torch
from cache_cases import SHAPES, padded_rows

from portlm.ops.attention import attention_reference
from portlm.ops.cached_attention import _fused, cached_attention, cached_attention_reference

MATRIX = {
    "CachedAttention": {
        "shapes": {
            "q": "batch sequence num_heads D",
            "k": "batch sequence num_kv_heads D",
            "v": "batch sequence num_kv_heads D",
            "past_key": "batch num_kv_heads past D",
            "past_value": "batch num_kv_heads past D",
            "mask": "batch total",
            "position_ids": "batch sequence",  # for the graph
        },
        "variants": [
            {"num_heads": 6, "num_kv_heads": 2, "D": 5, "scale": 0.3},
            {"num_heads": 4, "num_kv_heads": 4, "D": 8, "scale": 0.35},
            {"num_heads": 3, "num_kv_heads": 1, "D": 7, "scale": 0.4},
            {"num_heads": 4, "num_kv_heads": 4, "D": 5, "scale": 0.4, "window": 4},
            {"num_heads": 4, "num_kv_heads": 4, "D": 8, "scale": 0.4, "window": 3, "softcap": 1.5},
            {"num_heads": 6, "num_kv_heads": 2, "D": 16, "scale": 0.4, "softcap": 0.5},
        ],
        "fill": padded_rows,
    }
}


def _inputs(B, T, P, H, K, D):
    q, k, v = torch.randn(B, T, H, D), torch.randn(B, T, K, D), torch.randn(B, T, K, D)
    return q, k, v, torch.randn(B, K, P, D), torch.randn(B, K, P, D)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cached_attention_is_as_accurate_as_pytorch(shape, padded, as_accurate):
    tensors = _inputs(*shape)
    B, T, P = shape[:3]
    mask = (torch.rand(B, P + T) > 0.3).long() if padded else None
    ours = cached_attention(*tensors, mask)
    eager = cached_attention_reference(*tensors, mask)
    oracle = cached_attention_reference(*(t.double() for t in tensors), mask)
    as_accurate(ours[0], eager[0], oracle[0])
    assert torch.equal(ours[1], eager[1])
    assert torch.equal(ours[2], eager[2])


@pytest.mark.parametrize("T", [2, 150], ids=["few", "tiles"])
def test_a_query_that_sees_nothing_gives_zero(T):
    tensors = _inputs(2, T, 3, 4, 2, 8)
    out, _, _ = cached_attention(*tensors, torch.tensor([[0] * (3 + T), [1] * (3 + T)]))
    assert torch.equal(out[0], torch.zeros(T, 4, 8))
    assert out[1].abs().min() > 0


@pytest.mark.parametrize("T", [2, 20], ids=["few", "tiles"])
def test_what_is_masked_does_not_matter(T):
    q, k, v, past_key, past_value = _inputs(1, T, 4, 2, 2, 8)
    mask = torch.tensor([[0, 0, 1, 1] + [1] * T])
    before, _, _ = cached_attention(q, k, v, past_key, past_value, mask)
    past_key[:, :, :2] = 1e4
    past_value[:, :, :2] = 1e4
    after, _, _ = cached_attention(q, k, v, past_key, past_value, mask)
    assert torch.equal(before, after)


BOUNDS = [{"window": 1}, {"window": 6}, {"window": 100, "softcap": 0.7}, {"softcap": 2.0}]


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cached_attention_keeps_to_its_bounds(shape, bounds, as_accurate):
    tensors = _inputs(*shape)
    B, T, P = shape[:3]
    mask = (torch.rand(B, P + T) > 0.3).long()
    ours = cached_attention(*tensors, mask, **bounds)
    eager = cached_attention_reference(*tensors, mask, **bounds)
    oracle = cached_attention_reference(*(t.double() for t in tensors), mask, **bounds)
    as_accurate(ours[0], eager[0], oracle[0])


@pytest.mark.no_kernel("refused before a kernel is called")
@pytest.mark.parametrize("bounds", [{"window": 0}, {"softcap": -1.0}], ids=str)
def test_bounds_that_cannot_be_are_refused(bounds):
    with pytest.raises(ValueError, match=r"\[cached_attention\] (a window needs|softcap must be)"):
        cached_attention(*_inputs(1, 2, 3, 2, 2, 4), **bounds)


def test_an_empty_cache_gives_causal_attention(as_accurate):
    q, k, v, past_key, past_value = _inputs(2, 19, 0, 4, 2, 16)
    out, _, _ = cached_attention(q, k, v, past_key, past_value)
    oracle = attention_reference(q.double(), k.double(), v.double())
    as_accurate(out, attention_reference(q, k, v), oracle)


def test_the_result_does_not_depend_on_the_number_of_threads():
    tensors = _inputs(2, 9, 200, 8, 4, 64)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(cached_attention(*tensors)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.no_kernel("it is about the reference")
def test_a_gradient_is_taken_through_the_reference():
    tensors = [t.requires_grad_() for t in _inputs(1, 2, 3, 2, 1, 4)]
    out, _, _ = cached_attention(*tensors)
    gradients = torch.autograd.grad(out.sum(), tensors)
    assert all(torch.isfinite(g).all() for g in gradients)


def test_cached_attention_passes_opcheck():
    torch.library.opcheck(_fused.op, (*_inputs(2, 3, 5, 4, 2, 8), torch.ones(2, 8, dtype=torch.int64), 0.25))


def test_strided_queries_are_read_right():
    q, k, v, past_key, past_value = _inputs(2, 3, 4, 2, 2, 8)
    qkv = torch.stack((q, k, v), dim=2)  # (B, T, 3, H, D)
    strided = cached_attention(*qkv.unbind(2), past_key, past_value)
    assert torch.equal(strided[0], cached_attention(q, k, v, past_key, past_value)[0])


@pytest.mark.no_kernel("refused before a kernel is called")
@pytest.mark.parametrize(
    "change",
    [
        {"q": (2, 3, 8)},
        {"k": (2, 3, 3, 8), "v": (2, 3, 3, 8)},
        {"v": (2, 3, 2, 4)},
        {"past_key": (2, 4, 5, 8), "past_value": (2, 4, 5, 8)},
        {"past_value": (2, 2, 6, 8)},
        {"mask": (2, 7)},
    ],
    ids=str,
)
def test_wrong_shapes_are_named(change):
    shapes = {
        "q": (2, 3, 4, 8),
        "k": (2, 3, 2, 8),
        "v": (2, 3, 2, 8),
        "past_key": (2, 2, 5, 8),
        "past_value": (2, 2, 5, 8),
    }
    tensors = {name: torch.zeros(change.get(name, shape)) for name, shape in shapes.items()}
    mask = torch.ones(change.get("mask", (2, 8)), dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\[cached_attention\]"):
        cached_attention(**tensors, mask=mask)
