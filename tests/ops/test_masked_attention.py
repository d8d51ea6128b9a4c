"""masked_attention against its float64 oracle: padding, other lengths of queries and keys, a bias, and its errors."""

import numpy as np
import pytest
import torch

from portlm.ops.masked_attention import masked_attention, masked_attention_reference


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


def _inputs(B, T, S, H, K, D):
    return torch.randn(B, T, H, D), torch.randn(B, S, K, D), torch.randn(B, S, K, D)


def test_without_mask_and_bias_it_is_pytorchs():
    q, k, v = (t.double() for t in _inputs(2, 5, 7, 4, 4, 8))
    heads = (t.transpose(1, 2) for t in (q, k, v))
    ours = masked_attention_reference(q, k, v)
    theirs = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-14)  # a few roundings of values near 1


def test_a_row_that_sees_nothing_gives_zero_and_no_gradient():
    q, k, v = (t.requires_grad_() for t in _inputs(2, 3, 4, 4, 2, 8))
    mask = torch.tensor([[0] * 4, [1, 1, 0, 1]])
    out = masked_attention(q, k, v, mask)
    assert torch.equal(out[0], torch.zeros(3, 4, 8))
    assert out[1].abs().min() > 0
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert torch.equal(gradient[0], torch.zeros_like(gradient[0]))
        assert torch.isfinite(gradient).all()


def test_what_is_masked_does_not_matter():
    q, k, v = _inputs(1, 5, 6, 2, 2, 8)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1]])
    before = masked_attention(q, k, v, mask)
    k[:, [1, 4]], v[:, [1, 4]] = 1e4, -1e4
    assert torch.equal(before, masked_attention(q, k, v, mask))


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
