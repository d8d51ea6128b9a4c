import numpy as np
import pytest
import torch

from portlm.ops.relative_bias import _ranges, buckets_of, relative_bias, relative_bias_reference

SIZES = {"width": 3, "buckets": 32, "heads": 3, "max_distance": 128}
MATRIX = {
    "RelativeBias": {
        # more keys than queries, which came later
        "shapes": {"x": "batch sequence width", "keys": "batch source", "table": "buckets heads"},
        "variants": [
            {**SIZES, "bidirectional": 1},
            # so few buckets that all of their ends are among the distances of a test
            {**SIZES, "bidirectional": 1, "buckets": 8, "max_distance": 6},
            {**SIZES, "bidirectional": 0, "buckets": 8, "max_distance": 6},
        ],
        "fill": lambda sizes, rng: {"keys": np.ones((sizes["batch"], sizes["source"]), np.int64)},
    }
}

pytestmark = pytest.mark.no_kernel("the op has none: it is written in standard operators everywhere")


def given(T, S, buckets=32, heads=2):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(buckets, heads, generator=generator, dtype=torch.float64)
    return torch.zeros(2, T, 3, dtype=torch.float64), torch.ones(2, S, dtype=torch.int64), table


@pytest.mark.parametrize(
    ("count", "bidirectional", "longest"), [(32, True, 128), (32, False, 128), (8, True, 20), (6, False, 50)]
)
def test_buckets_are_those_of_transformers(count, bidirectional, longest):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distances = torch.arange(-3 * longest, 3 * longest + 1)
    theirs = t5.T5Attention._relative_position_bucket(distances, bidirectional, count, longest)
    places = distances.clamp(-longest, longest) + longest
    assert buckets_of(count, bidirectional, longest)[places].tolist() == theirs.tolist()


@pytest.mark.parametrize("bidirectional", [True, False])
def test_every_distance_is_in_the_range_of_its_bucket_alone(bidirectional):
    low, high = (np.array(ends) for ends in _ranges(32, bidirectional, 128))
    found = buckets_of(32, bidirectional, 128)
    for distance in range(-300, 301 if bidirectional else 1):
        inside = np.flatnonzero((low <= distance) & (distance <= high))
        assert inside.tolist() == [found[min(max(distance, -128), 128) + 128]], distance


def test_a_query_that_came_later_has_the_biases_of_its_slot():
    """T queries behind P slots have the last T rows of all S, to the last bit: the same numbers are looked up."""
    for bidirectional in (True, False):
        x, keys, table = given(9, 9)
        whole = relative_bias(x, keys, table, bidirectional, 128)
        assert torch.equal(relative_bias(x[:, :2], keys, table, bidirectional, 128), whole[:, 7:])


def test_keys_ahead_are_hidden_in_one_direction():
    x, keys, table = given(6, 6)
    bias = relative_bias(x, keys, table, False, 128)
    ahead = torch.ones(6, 6, dtype=torch.bool).triu(1)
    assert (bias[:, ahead] <= -1e29).all()
    assert (bias[:, ~ahead] > -100).all()


def test_the_table_learns_from_every_bias_that_was_looked_up():
    """Each bias is one entry, so an entry's gradient is the number of pairs in its bucket: whole numbers, exactly."""
    x, keys, table = given(5, 7)
    table.requires_grad_()
    relative_bias(x, keys, table, True, 128).sum().backward()
    slots = np.arange(7)
    found = buckets_of(32, True, 128)[slots[None] - slots[2:, None] + 128]
    assert table.grad[:, 0].tolist() == np.bincount(found.ravel(), minlength=32).tolist()


@pytest.mark.parametrize(
    ("x", "keys", "table", "longest"),
    [((2, 5, 3), (2, 4), (32, 2), 128), ((2, 5), (2, 5), (32, 2), 128), ((2, 5, 3), (2, 5), (7, 2), 128),
     ((2, 5, 3), (2, 5), (32, 2), 8), ((2, 5, 3), (2, 5), (2, 2), 128)],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_is_named(x, keys, table, longest):
    with pytest.raises(ValueError, match=r"\[relative_bias\]"):
        relative_bias(torch.zeros(x), torch.ones(keys, dtype=torch.int64), torch.zeros(table), True, longest)


def test_the_wrapper_is_the_reference():
    x, keys, table = given(4, 6)
    for bidirectional in (True, False):
        found = relative_bias(x, keys, table, bidirectional, 128)
        assert torch.equal(found, relative_bias_reference(x, keys, table, bidirectional, 128))
