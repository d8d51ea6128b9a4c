"""masked_attention against its float64 oracle: padding, other lengths of queries and keys, a bias, and its errors."""

import numpy as np
import pytest
import torch

from portlm.ops.masked_attention import (
    _fused,
    _fused_gradients,
    masked_attention,
    masked_attention_reference,
)


def shown_keys(sizes, rng):
    """Masks with a hole in the middle and padding on the right; one key is always there."""
    mask = (rng.random((sizes["batch"], sizes["source"])) > 0.3).astype(np.int64)
    mask[:, -1:] = 1
    return {"mask": mask}


MATRIX = {
    "MaskedAttention": {
        "shapes": {
            "q": "batch sequence num_heads head_dim",
            "k": "batch source num_kv_heads head_dim",
            "v": "batch source num_kv_heads head_dim",
            "mask": "batch source",
            "bias": "bias_heads sequence source",
        },
        "variants": [
            {"num_heads": 6, "num_kv_heads": 2, "head_dim": 5, "scale": 0.3, "bias_heads": 6},
            {"num_heads": 4, "num_kv_heads": 4, "head_dim": 8, "scale": 1.0, "bias_heads": 4},
            {"num_heads": 2, "num_kv_heads": 2, "head_dim": 7, "scale": 0.4, "bias_heads": 1, "absent": ("mask",)},
            {"num_heads": 3, "num_kv_heads": 1, "head_dim": 7, "scale": 0.4, "absent": ("bias",)},
            {"num_heads": 3, "num_kv_heads": 3, "head_dim": 16, "scale": 0.4, "absent": ("mask", "bias")},
        ],
        "fill": shown_keys,
    }
}  # fmt: skip


# (B, T, S, H, K, D): one key; tails of every width; grouped heads; whole tiles and one more; more keys than a block of
# the online softmax has, and more queries than keys; 70 sequences take another cut into tasks; nothing at all
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 7, 5, 2, 1, 5),
    (1, 33, 40, 4, 2, 17),
    (2, 64, 64, 3, 3, 32),
    (1, 3, 300, 2, 1, 20),
    (2, 200, 65, 2, 2, 64),
    (70, 9, 4, 1, 1, 8),
    (0, 4, 3, 2, 2, 8),
    (2, 0, 3, 2, 2, 8),
    (2, 3, 0, 2, 2, 8),
]
# See tests/ops/test_attention.py; the bias has its part of the same difference.
ROUNDINGS = 3
BIASES = {"none": None, "heads": "H", "one": "1", "rows": "BH", "shared rows": "B1"}


def _inputs(B, T, S, H, K, D):
    return torch.randn(B, T, H, D), torch.randn(B, S, K, D), torch.randn(B, S, K, D)


def _mask(B, S):
    mask = (torch.rand(B, S) > 0.3).long()
    mask[:1] = 1
    return mask


def _bias(kind, B, T, S, H):
    if kind is None:
        return []
    return [torch.randn(*(B,) * ("B" in kind), H if "H" in kind else 1, T, S)]


def _called(function, mask, **options):
    return lambda q, k, v, *bias: function(q, k, v, mask, *bias, **options)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_and_its_gradients_are_as_accurate_as_pytorch(shape, bias, masked, gradients_as_accurate):
    B, T, S, H, _, _ = shape
    mask = _mask(B, S) if masked else None
    gradients_as_accurate(
        _called(masked_attention, mask),
        _called(masked_attention_reference, mask),
        [*_inputs(*shape), *_bias(bias, B, T, S, H)],
        ROUNDINGS,
    )


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
@pytest.mark.parametrize("shape", [(2, 1, 70, 4, 2, 33), (3, 5, 7, 6, 1, 64), (2, 40, 9, 2, 2, 8)], ids=str)
def test_in_inference_it_is_as_accurate_as_pytorch(shape, bias, as_accurate):
    """A few queries alone are not worth tiles: they take another way, whose scalar build adds D products in turn."""
    B, T, S, H, _, _ = shape
    inputs, mask = [*_inputs(*shape), *_bias(bias, B, T, S, H)], _mask(B, S)
    oracle = _called(masked_attention_reference, mask, scale=0.7)(*(t.double() for t in inputs))
    eager = _called(masked_attention_reference, mask, scale=0.7)(*inputs)
    as_accurate(_called(masked_attention, mask, scale=0.7)(*inputs), eager, oracle, 8)


@pytest.mark.parametrize("T", [3, 20], ids=["few", "tiles"])
def test_views_are_read_where_they_lie(T):
    """A cache with its heads in front, parts of one product, and addresses that no vector is aligned to."""
    B, S, H, K, D = 2, 21, 4, 2, 12
    q = torch.randn(B * T * H * D + 1)[1:].view(B, T, H, D)
    k, v = torch.randn(B, S, 2 * K, D).split(K, dim=2)
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v)]
    upstream, mask = torch.randn(B, T, H, D), _mask(B, S)
    results = []
    for tensors in ((q, k, v), (q.clone(), *heads_first), (q.clone(), k.contiguous(), v)):
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = masked_attention(*leaves, mask)
        with torch.no_grad():
            results.append([masked_attention(*leaves, mask), y, *torch.autograd.grad(y, leaves, upstream)])
    assert all(torch.equal(*pair) for other in results[1:2] for pair in zip(results[0], other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(results[0][1:], results[2][1:], strict=True))
    assert torch.allclose(
        results[0][0], results[0][1], rtol=0, atol=1e-5
    )  # few queries, another order of sums


@pytest.mark.parametrize("sizes", [(2, 150, 90, 4, 2, 16), (1, 333, 333, 2, 1, 20)], ids=str)
def test_gradients_do_not_depend_on_the_number_of_threads(sizes, same_on_all_thread_counts):
    B, T, S, H, _, _ = sizes
    inputs, mask = [*_inputs(*sizes), torch.randn(H, T, S)], _mask(B, S)

    def gradients():
        leaves = [t.clone().requires_grad_() for t in inputs]
        return list(torch.autograd.grad(_called(masked_attention, mask)(*leaves).square().sum(), leaves))

    assert same_on_all_thread_counts(gradients)


def test_it_passes_opcheck():
    q, k, v = (t.requires_grad_() for t in _inputs(2, 4, 5, 2, 1, 4))
    mask, bias = torch.ones(2, 5, dtype=torch.int64), torch.randn(2, 4, 5, requires_grad=True)
    torch.library.opcheck(_fused.op, (q, k, v, mask, bias, 0.5, True))
    torch.library.opcheck(_fused.op, (q, k, v, None, None, 0.5, True))
    tensors = [t.detach() for t in (q, k, v, *_fused.op(q, k, v, mask, bias, 0.5, True))]
    upstream = torch.randn_like(tensors[3])
    torch.library.opcheck(_fused_gradients.op, (upstream, *tensors, mask, bias.detach(), 0.5, True))


@pytest.mark.parametrize("T", [3, 20], ids=["few", "tiles"])
def test_what_is_not_a_number_reaches_the_queries_that_see_it_alone(T):
    q, k, v = _inputs(2, T, 70, 2, 2, 8)
    k[0, 69, 1, 3] = float("nan")
    out = masked_attention(q, k, v)
    assert torch.isnan(out[0, :, 1]).all()
    assert torch.isfinite(out[0, :, 0]).all()
    assert torch.isfinite(out[1]).all()


def test_a_bias_may_hide_keys(as_accurate):
    """Of -inf, and so may a number far below any score, as causal attention with a bias of its own has it."""
    q, k, v = _inputs(2, 30, 30, 2, 2, 8)
    ahead = torch.ones(30, 30).triu(1)
    causal = masked_attention_reference(*(t.double() for t in (q, k, v)), None, -1e30 * ahead.double())
    for far in (-1e30, float("-inf")):
        bias = torch.zeros(1, 30, 30).masked_fill(ahead != 0, far)
        as_accurate(masked_attention(q, k, v, None, bias), causal.float(), causal, 4)
        as_accurate(
            masked_attention(q[:, :3], k, v, None, bias[:, :3]), causal[:, :3].float(), causal[:, :3], 4
        )


@pytest.mark.no_kernel("it is about the reference")
def test_without_mask_and_bias_it_is_pytorchs():
    q, k, v = (t.double() for t in _inputs(2, 5, 7, 4, 4, 8))
    heads = (t.transpose(1, 2) for t in (q, k, v))
    ours = masked_attention_reference(q, k, v)
    theirs = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-14)  # a few roundings of values near 1


@pytest.mark.parametrize("T", [3, 40], ids=["few", "tiles"])
def test_a_row_that_sees_nothing_gives_zero_and_no_gradient(T):
    q, k, v = (t.requires_grad_() for t in _inputs(2, T, 4, 4, 2, 8))
    mask = torch.tensor([[0] * 4, [1, 1, 0, 1]])
    out = masked_attention(q, k, v, mask)
    assert torch.equal(out[0], torch.zeros(T, 4, 8))
    assert torch.equal(masked_attention(q.detach(), k.detach(), v.detach(), mask)[0], torch.zeros(T, 4, 8))
    assert out[1].abs().min() > 0
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert torch.equal(gradient[0], torch.zeros_like(gradient[0]))
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("T", [5, 20], ids=["few", "tiles"])
def test_what_is_masked_does_not_matter(T):
    q, k, v = _inputs(1, T, 6, 2, 2, 8)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1]])
    before = masked_attention(q, k, v, mask)
    k[:, [1, 4]], v[:, [1, 4]] = 1e4, -1e4
    assert torch.equal(before, masked_attention(q, k, v, mask))


@pytest.mark.no_kernel("refused before a kernel is called")
@pytest.mark.parametrize(
    "change",
    [
        {"q": (2, 3, 8)},
        {"k": (2, 5, 3, 8), "v": (2, 5, 3, 8)},
        {"v": (2, 4, 2, 8)},
        {"mask": (2, 3)},
        {"bias": (3, 3, 5)},
        {"bias": (4, 5, 3)},
        {"bias": (3, 4, 3, 5)},
        {"bias": (3, 5)},
    ],
    ids=str,
)
def test_wrong_shapes_are_named(change):
    shapes = {"q": (2, 3, 4, 8), "k": (2, 5, 2, 8), "v": (2, 5, 2, 8), "bias": (4, 3, 5)}
    tensors = {name: torch.zeros(change.get(name, shape)) for name, shape in shapes.items()}
    mask = torch.ones(change.get("mask", (2, 5)), dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\[masked_attention\]"):
        masked_attention(**tensors, mask=mask)
