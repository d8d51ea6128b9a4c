"""additive_attention against its float64 oracle, its gradients, masks and errors."""

import numpy as np
import pytest
import torch

from portlm.ops.additive_attention import (
    _fused,
    _fused_gradients,
    additive_attention,
    additive_attention_reference,
)


def ragged(sizes, rng):
    """Rows of sources that are padded on the left by different lengths, none of them wholly."""
    B, S = sizes["batch"], sizes["source"]
    return {"mask": (np.arange(S) >= np.arange(B)[:, None] % S).astype(np.int64)}


MATRIX = {
    "AdditiveAttention": {
        "shapes": {
            "query": "batch sequence A",
            "keys": "batch source A",
            "values": "batch source C",
            "v": "A",
            "mask": "batch source",
        },
        "variants": [{"A": 19, "C": 22}, {"A": 4, "C": 33, "absent": ("mask",)}],
        "fill": ragged,
    }
}


def arguments(B=3, T=2, S=7, A=21, C=18):
    torch.manual_seed(0)
    return [torch.randn(B, T, A), torch.randn(B, S, A), torch.randn(B, S, C), torch.randn(A)]


def left_mask(B, S):
    """(B, S), the first b keys of row b hidden."""
    return (torch.arange(S) >= torch.arange(B)[:, None]).long()


@pytest.mark.parametrize(
    "sizes",
    [(3, 2, 7, 21, 18), (1, 1, 1, 1, 1), (2, 5, 33, 130, 65), (0, 1, 3, 4, 5), (2, 0, 3, 4, 5)],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_additive_attention_is_as_accurate_as_pytorch(sizes, masked, as_accurate):
    given = arguments(*sizes)
    mask = left_mask(sizes[0], sizes[2]) if masked else None
    oracle = additive_attention_reference(*(t.double() for t in given), mask)
    eager = additive_attention_reference(*given, mask)
    for ours, theirs, exact in zip(additive_attention(*given, mask), eager, oracle, strict=True):
        as_accurate(ours, theirs, exact)


@pytest.mark.no_kernel("the reference itself")
def test_the_definition_is_the_paper_s_sum():
    """Written out key by key, in float64, where only the order of summation may differ."""
    query, keys, values, v = (t.double() for t in arguments())
    context, weights = additive_attention_reference(query, keys, values, v)
    for b in range(3):
        for t in range(2):
            scores = torch.stack([(v * torch.tanh(query[b, t] + keys[b, s])).sum() for s in range(7)])
            share = scores.exp() / scores.exp().sum()
            torch.testing.assert_close(weights[b, t], share, atol=1e-13, rtol=1e-13)
            expected = sum(share[s] * values[b, s] for s in range(7))
            torch.testing.assert_close(context[b, t], expected, atol=1e-13, rtol=1e-13)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_gradients_are_as_accurate_as_pytorch(masked, gradients_as_accurate):
    mask = left_mask(3, 7) if masked else None
    gradients_as_accurate(
        lambda *given: additive_attention(*given, mask),
        lambda *given: additive_attention_reference(*given, mask),
        arguments(),
    )


@pytest.mark.parametrize("place", [0, 1], ids=["context", "weights"])
def test_the_gradient_of_one_result_alone_is_that_of_the_reference(place):
    given = [t.requires_grad_() for t in arguments()]
    exact = [t.detach().double().requires_grad_() for t in given]
    wanted = [0, 1, 2, 3] if place == 0 else [0, 1, 3]
    ours = torch.autograd.grad(additive_attention(*given)[place].square().sum(), [given[i] for i in wanted])
    theirs = torch.autograd.grad(
        additive_attention_reference(*exact)[place].square().sum(), [exact[i] for i in wanted]
    )
    for a, b in zip(
        ours, theirs, strict=True
    ):  # float32 against float64: sums of some hundred terms of order 1
        torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=2e-5)


def test_hidden_keys_change_nothing_to_the_bit_and_have_no_gradient():
    query, keys, values, v = arguments()
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[:, 5:] = 0
    context, weights = additive_attention(query, keys, values, v, mask)
    for share in (keys, values):
        share[:, 5:] = 1e4
    keys.requires_grad_(), values.requires_grad_()
    other, shares = additive_attention(query, keys, values, v, mask)
    assert torch.equal(other, context)
    assert torch.equal(shares, weights)
    assert not weights[:, :, 5:].any()
    (other.sum() + shares.square().sum()).backward()
    assert not keys.grad[:, 5:].any()
    assert not values.grad[:, 5:].any()


def test_a_query_that_sees_nothing_gives_zeros():
    given, mask = arguments(), torch.ones(3, 7, dtype=torch.int64)
    mask[1] = 0
    for found in (additive_attention(*given, mask), additive_attention_reference(*given, mask)):
        assert not any(part[1].any() for part in found)
        assert all(torch.isfinite(part).all() for part in found)


def test_nan_in_a_key_reaches_the_answer():
    given = arguments()
    given[1][0, 3, 2] = torch.nan
    context, weights = additive_attention(*given)
    assert torch.isnan(context[0]).all()
    assert torch.isnan(weights[0]).all()
    assert torch.isfinite(context[1:]).all()


def test_the_result_and_its_gradients_are_the_same_bits_on_any_number_of_threads():
    given, before, found = arguments(4, 3, 40, 64, 64), torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in given]
            context, weights = additive_attention(*leaves)
            (context.sum() + weights.square().sum()).backward()
            found.append([context.detach(), weights.detach(), *(t.grad for t in leaves)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_gradients_pass_opcheck():
    given, mask = arguments(), left_mask(3, 7)
    torch.library.opcheck(_fused.op, (*[t.requires_grad_() for t in given], mask))
    query, keys, values, v = (t.detach() for t in given)
    context, weights = additive_attention(query, keys, values, v, mask)
    torch.library.opcheck(_fused_gradients.op, (context, weights, query, keys, values, v, mask, weights))


@pytest.mark.no_kernel("refused before a kernel is called")
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(3, 21), r"query must be \(B, T, A\), got \(3, 21\)"),
        (1, torch.zeros(3, 21), r"keys must be \(B, S, A\) and values"),
        (1, torch.zeros(3, 7, 20), r"keys must be \(3, 7, 21\) for query \(3, 2, 21\), got \(3, 7, 20\)"),
        (2, torch.zeros(3, 6, 18), r"values must be \(3, 7, 18\)"),
        (3, torch.zeros(20), r"v must be \(21,\)"),
        (4, torch.ones(3, 6, dtype=torch.int64), r"mask must be \(3, 7\)"),
        (4, torch.ones(3, 7), "mask must be int64"),
    ],
    ids=str,
)
def test_additive_attention_names_what_does_not_fit(place, value, message):
    given = [*arguments(), None]
    given[place] = value
    with pytest.raises(ValueError, match=r"^\[additive_attention\] " + message):
        additive_attention(*given)
