"""attention and attention_qkv against their float64 oracle, their gradients, and their errors."""

import pytest
import torch
from torch import Tensor

from portlm.ops.attention import (
    _fused,
    _fused_gradient_qkv,
    _fused_gradients,
    _fused_qkv,
    attention,
    attention_qkv,
    attention_qkv_reference,
    attention_reference,
)

MATRIX = {
    "attention": {
        "shapes": {"q": "batch sequence H D", "k": "batch sequence K D", "v": "batch sequence K D"},
        "variants": [{"H": 6, "K": 2, "D": 5, "causal": True}, {"H": 3, "K": 3, "D": 16, "causal": False}],
    }
}

# (B, T, H, K, D): one key; tails of every width; grouped and single key/value heads; a whole tile and one key more;
# 300 keys need three blocks of the online softmax; 70 sequences take another cut into tasks; nothing at all
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 7, 2, 1, 5),
    (1, 33, 4, 2, 17),
    (2, 64, 3, 3, 32),
    (1, 65, 2, 2, 64),
    (1, 300, 2, 1, 20),
    (70, 9, 1, 1, 8),
    (0, 4, 2, 2, 8),
    (2, 0, 2, 2, 8),
]

# The kernel takes the mean of a row's dP, weighted by P, as dO . O (Dao et al. 2022), so in rows of few keys, where dP
# and that mean nearly cancel, roundings remain that eager's sum over the same dP loses. How many depends on eager's
# product, which is another one on each make of processor: of 200 draws at (70, 9, 1, 1, 8) one needed 2.4.
ROUNDINGS = 3


def _inputs(shape: tuple[int, ...]) -> list[Tensor]:
    B, T, H, K, D = shape
    return [torch.randn(B, T, heads, D) for heads in (H, K, K)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_attention_and_its_gradients_are_as_accurate_as_pytorch(shape, causal, gradients_as_accurate):
    gradients_as_accurate(
        lambda *t: attention(*t, causal=causal),
        lambda *t: attention_reference(*t, causal=causal),
        _inputs(shape),
        ROUNDINGS,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_qkv_and_its_gradient_are_as_accurate_as_pytorch(shape, gradients_as_accurate):
    B, T, H, K, D = shape
    gradients_as_accurate(
        lambda qkv: attention_qkv(qkv, H, K),
        lambda qkv: attention_qkv_reference(qkv, H, K),
        [torch.randn(B, T, (H + 2 * K) * D)],
        ROUNDINGS,
    )


def test_attention_takes_another_scale(gradients_as_accurate):
    gradients_as_accurate(
        lambda *t: attention(*t, scale=0.3),
        lambda *t: attention_reference(*t, scale=0.3),
        _inputs((1, 20, 2, 2, 9)),
        ROUNDINGS,
    )


# A window of one key, of some, as wide as a block of keys, and wider than all; a cap that bends most scores; both.
BOUNDS = [{"window": 1}, {"window": 5}, {"window": 64}, {"window": 200, "softcap": 0.7}, {"softcap": 2.0}]


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1), (2, 33, 4, 2, 17), (1, 130, 2, 1, 20), (70, 9, 1, 1, 8)], ids=str
)
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_attention_and_its_gradients_keep_to_their_bounds(shape, bounds, gradients_as_accurate):
    """To a query that sees one key its score is nothing: what is left of two equal sums are their roundings."""
    gradients_as_accurate(
        lambda *t: attention(*t, **bounds),
        lambda *t: attention_reference(*t, **bounds),
        _inputs(shape),
        12 if bounds.get("window") == 1 else ROUNDINGS,
    )


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_attention_qkv_and_its_gradient_keep_to_their_bounds(bounds, gradients_as_accurate):
    gradients_as_accurate(
        lambda qkv: attention_qkv(qkv, 4, 2, **bounds),
        lambda qkv: attention_qkv_reference(qkv, 4, 2, **bounds),
        [torch.randn(1, 300, 8 * 9)],
        ROUNDINGS,
    )


@pytest.mark.no_kernel("it is about the reference")
def test_a_window_shows_the_last_keys_and_a_cap_bounds_scores():
    q, k, v = (t.double() for t in _inputs((1, 9, 2, 2, 4)))
    windowed, capped = (
        attention_reference(q, k, v, window=3),
        attention_reference(q, k, v, scale=1e6, softcap=5.0),
    )
    last = attention_reference(q[:, 6:], k[:, 6:], v[:, 6:], causal=True)
    assert torch.allclose(windowed[:, 8], last[:, 2], rtol=0, atol=1e-14)  # a few roundings of values near 1
    scores = 5.0 * torch.tanh(1e6 * torch.einsum("bthd,bshd->bhts", q, k))  # all of them 5 or -5
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1)
    assert torch.allclose(capped, torch.einsum("bhts,bshd->bthd", weights, v), rtol=0, atol=1e-14)


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_gradients_in_bounds_do_not_depend_on_the_number_of_threads(bounds, same_on_all_thread_counts):
    inputs = _inputs((1, 333, 2, 1, 20))

    def gradients() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        return list(torch.autograd.grad(attention(*leaves, **bounds).square().sum(), leaves))

    assert same_on_all_thread_counts(gradients)


@pytest.mark.no_kernel("refused before a kernel is called")
@pytest.mark.parametrize(
    "bounds",
    [{"window": 0}, {"window": -1}, {"window": 3, "causal": False}, {"softcap": 0.0}, {"softcap": -1.0}],
    ids=str,
)
def test_bounds_that_cannot_be_are_refused(bounds):
    with pytest.raises(ValueError, match=r"\[attention\] (a window needs|softcap must be)"):
        attention(*_inputs((1, 4, 2, 2, 4)), **bounds)


def test_attention_reads_views_where_they_lie():
    """Views of one fused projection, and heads in front of positions: same bits as their contiguous copies."""
    fused = torch.randn(2, 30, 8, 12).split((4, 2, 2), dim=2)
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in _inputs((2, 30, 4, 2, 12))]
    every_second = [t[..., ::2] for t in _inputs((2, 30, 4, 2, 24))]  # not side by side: copied
    for views in (fused, heads_first, every_second):
        copies = [t.contiguous() for t in views]
        upstream = torch.randn(2, 30, 4, 12)
        results = []
        for tensors in (views, copies):
            leaves = [t.detach().requires_grad_() for t in tensors]
            y = attention(*leaves)
            results.append([y, *torch.autograd.grad(y, leaves, upstream)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_attention_qkv_equals_attention_of_its_parts():
    qkv = torch.randn(2, 40, (4 + 2 * 2) * 16)
    q, k, v = qkv.view(2, 40, 8, 16).split((4, 2, 2), dim=2)
    assert torch.equal(attention_qkv(qkv, 4, 2), attention(q, k, v))


def test_attention_survives_large_scores(as_accurate):
    """Scores around 1000 would overflow an exponential that is not taken relative to the largest."""
    q, k, v = (40.0 * t for t in _inputs((1, 280, 1, 1, 16)))
    oracle = attention_reference(q.double(), k.double(), v.double())
    as_accurate(attention(q, k, v), attention_reference(q, k, v), oracle)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sizes", [(2, 150, 4, 2, 16), (1, 333, 2, 1, 20), (1, 50, 1, 1, 8)], ids=str)
def test_attention_gradients_do_not_depend_on_the_number_of_threads(sizes, causal, same_on_all_thread_counts):
    """With fewer heads than threads the tasks are chunks of queries and of keys: the sums are still the same."""
    inputs = _inputs(sizes)

    def gradients() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        return list(torch.autograd.grad(attention(*leaves, causal=causal).square().sum(), leaves))

    assert same_on_all_thread_counts(gradients)


def test_attention_passes_opcheck():
    q, k, v = (t.requires_grad_() for t in _inputs((1, 6, 2, 1, 4)))
    torch.library.opcheck(_fused.op, (q, k, v, True, 0.5))
    out, stats = (t.detach() for t in _fused.op(q, k, v, True, 0.5))
    grads = torch.randn_like(out), q.detach(), k.detach(), v.detach(), out, stats
    torch.library.opcheck(_fused_gradients.op, (*grads, True, 0.5))
    qkv = torch.randn(1, 6, 16, requires_grad=True)
    torch.library.opcheck(_fused_qkv.op, (qkv, 2, 1, True, 0.5))
    out, stats = (t.detach() for t in _fused_qkv.op(qkv, 2, 1, True, 0.5))
    torch.library.opcheck(
        _fused_gradient_qkv.op, (torch.randn_like(out), qkv.detach(), out, stats, 2, 1, True, 0.5)
    )


@pytest.mark.no_kernel("refused before a kernel is called")
@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((1, 2, 3, 4), (1, 2, 2, 4), (1, 2, 2, 4)),
        ((1, 2, 2, 4), (1, 3, 2, 4), (1, 3, 2, 4)),
        ((1, 2, 2, 4), (1, 2, 2, 4), (1, 2, 1, 4)),
        ((1, 2, 2, 4), (1, 2, 2, 5), (1, 2, 2, 5)),
        ((1, 2, 2, 4), (1, 2, 0, 4), (1, 2, 0, 4)),
        ((2, 2, 4), (2, 2, 4), (2, 2, 4)),
    ],
    ids=str,
)
def test_attention_names_wrong_shapes(q, k, v):
    with pytest.raises(ValueError, match=r"\[attention\]"):
        attention(torch.zeros(q), torch.zeros(k), torch.zeros(v))


@pytest.mark.no_kernel("refused before a kernel is called")
@pytest.mark.parametrize(
    ("shape", "H", "K"), [((1, 2, 13), 2, 2), ((1, 2, 24), 4, 3), ((2, 24), 2, 2)], ids=str
)
def test_attention_qkv_names_wrong_shapes(shape, H, K):
    with pytest.raises(ValueError, match=r"\[attention_qkv\]"):
        attention_qkv(torch.zeros(shape), H, K)
