"""embedding against its definition, its gradient, and its errors."""

import pytest
import torch

from portlm.ops.embedding import _fused, embedding, embedding_reference

MATRIX = {
    "Embedding": {
        "shapes": {"ids": "batch sequence", "weight": "V C"},
        "variants": [{"V": 61, "C": 33}],
        "fill": lambda sizes, rng: {"ids": rng.integers(0, sizes["V"], (sizes["batch"], sizes["sequence"]))},
    }
}

SIZES = [((1,), 1, 1), ((7, 3), 5, 33), ((2, 128), 50, 96), ((0,), 4, 8), ((), 3, 5), ((600,), 3, 17)]


@pytest.mark.parametrize(("ids", "V", "C"), SIZES, ids=str)
def test_embedding_copies_rows_and_adds_up_their_gradients(ids, V, C, gradients_as_accurate):
    tokens, weight = torch.randint(V, ids), torch.randn(V, C)
    assert torch.equal(embedding(tokens, weight), embedding_reference(tokens, weight))
    gradients_as_accurate(lambda w: embedding(tokens, w), lambda w: embedding_reference(tokens, w), [weight])


def test_embedding_gradient_of_unused_rows_is_zero():
    weight = torch.randn(6, 9, requires_grad=True)
    embedding(torch.tensor([2, 2]), weight).sum().backward()
    expected = torch.zeros(6, 9)
    expected[2] = 2
    assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize("C", [5, 96, 384])
def test_embedding_gradient_does_not_depend_on_the_number_of_threads(C, same_on_all_thread_counts):
    ids, weight, upstream = torch.randint(7, (2000,)), torch.randn(7, C), torch.randn(2000, C)

    def gradient():
        leaf = weight.clone().requires_grad_()
        return torch.autograd.grad(embedding(ids, leaf), leaf, upstream)

    assert same_on_all_thread_counts(gradient)


@pytest.mark.parametrize(("bad", "where"), [(-1, 0), (10, 3), (2**62, 5), (-(2**62), 2)])
def test_embedding_names_the_id_that_is_out_of_range(bad, where):
    ids = torch.zeros(2, 3, dtype=torch.int64)
    ids.view(-1)[where] = bad
    with pytest.raises(IndexError, match=rf"\[embedding\] id {bad} at position {where} is outside \[0, 10\)"):
        embedding(ids, torch.zeros(10, 4))


def test_embedding_of_an_empty_table_names_the_id():
    with pytest.raises(IndexError, match=r"id 0 at position 0"):
        embedding(torch.zeros(1, dtype=torch.int64), torch.zeros(0, 4))


def test_embedding_accepts_strided_inputs():
    ids, weight = torch.randint(6, (4, 5)).t(), torch.randn(9, 6).t()
    assert torch.equal(embedding(ids, weight), weight[ids])


def test_embedding_passes_opcheck():
    torch.library.opcheck(_fused.op, (torch.randint(5, (2, 3)), torch.randn(5, 8, requires_grad=True)))


@pytest.mark.no_kernel("refused before a kernel is called")
@pytest.mark.parametrize(
    ("ids", "weight"),
    [(torch.zeros(2, dtype=torch.int32), (3, 4)), (torch.zeros(2, dtype=torch.int64), (3,))],
    ids=["int32", "vector"],
)
def test_embedding_names_wrong_types_and_shapes(ids, weight):
    with pytest.raises(ValueError, match=r"\[embedding\]"):
        embedding(ids, torch.zeros(weight))
