import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from portlm.data.batches import IGNORE, BatchSampler, evaluation_batches
from portlm.data.shards import write_shards
from portlm.errors import ConfigError, UsageError

TOKENS = np.arange(1000, 2000, dtype=np.uint16)


@given(st.integers(1, 5), st.integers(1, 30), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_targets_are_the_inputs_one_token_further(B, T, seed, step):
    inputs, targets = BatchSampler(TOKENS, B, T, seed).batch(step)
    assert inputs.shape == targets.shape == (B, T)
    assert inputs.dtype == targets.dtype == np.int64
    assert (targets == inputs + 1).all()  # the tokens count upwards
    assert inputs.min() >= 1000
    assert targets.max() <= 1999


def test_a_batch_depends_on_seed_and_step_alone():
    sampler = BatchSampler(TOKENS, 4, 8, seed=7)
    np.random.seed(0)
    state = np.random.get_state()[1].tobytes()
    later = sampler.batch(5)
    for step in (3, 0, 5):
        again = BatchSampler(TOKENS, 4, 8, seed=7).batch(step)
    assert (again[0] == later[0]).all()
    assert np.random.get_state()[1].tobytes() == state
    assert not (sampler.batch(6)[0] == later[0]).all()
    assert not (BatchSampler(TOKENS, 4, 8, seed=8).batch(5)[0] == later[0]).all()


def test_the_positions_are_the_same_on_every_machine_and_version():
    """Written down once: a change here would change every training run."""
    starts = [BatchSampler(TOKENS, 4, 8, seed=s).starts(t).tolist() for s, t in ((0, 0), (1, 0), (0, 1))]
    assert starts == [[11, 239, 110, 559], [301, 841, 154, 30], [806, 745, 666, 479]]


def test_every_position_is_reached_and_none_is_preferred():
    """20 windows, 20000 draws: each count is within 6 standard deviations (31) of 1000."""
    sampler = BatchSampler(np.zeros(24, np.uint16), 100, 4)
    counts = np.bincount(np.concatenate([sampler.starts(s) for s in range(200)]), minlength=20)
    assert len(counts) == 20
    assert abs(counts - 1000).max() < 6 * 31


def test_huge_data_sets_need_no_wider_integers():
    class Huge:
        def __len__(self):
            return 2**60

    starts = np.concatenate([BatchSampler(Huge(), 64, 8).starts(s) for s in range(4)])
    assert starts.min() >= 0
    assert 2**59 < starts.max() < 2**60


def test_resuming_from_a_saved_state_gives_the_batches_of_the_unbroken_run():
    whole = BatchSampler(TOKENS, 2, 8, seed=3)
    expected = [next(whole)[0] for _ in range(6)]
    first = BatchSampler(TOKENS, 2, 8, seed=3)
    for _ in range(4):
        next(first)
    second = BatchSampler(TOKENS, 2, 8, seed=3)
    second.load_state_dict(first.state_dict())
    assert all((next(second)[0] == e).all() for e in expected[4:])
    with pytest.raises(ConfigError, match="batch_size 2 and this one has 3"):
        BatchSampler(TOKENS, 3, 8, seed=3).load_state_dict(first.state_dict())
    with pytest.raises(ConfigError, match="step"):
        second.load_state_dict({})


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 9), st.sampled_from([None, 77]))
def test_evaluation_covers_every_token_exactly_once(N, B, T, before):
    tokens = np.arange(100, 100 + N, dtype=np.uint16)
    if N == 1 and before is None:
        with pytest.raises(UsageError, match="nothing to predict"):
            next(evaluation_batches(tokens, B, T, before))
        return
    batches = list(evaluation_batches(tokens, B, T, before))
    assert all(i.shape == t.shape and i.shape[0] <= B and i.shape[1] == T for i, t in batches)
    assert all(i.shape[0] == B for i, _ in batches[:-1])
    inputs = np.concatenate([i.ravel() for i, _ in batches])
    targets = np.concatenate([t.ravel() for _, t in batches])
    real = targets != IGNORE
    first = 1 if before is None else 0
    assert targets[real].tolist() == tokens[first:].tolist()
    previous = tokens[:-1].tolist() if before is None else [before, *tokens[:-1].tolist()]
    assert inputs[real].tolist() == previous
    assert real[: real.sum()].all(), "only the end is padded"
    assert (inputs[~real] == 0).all()
    assert (~real).sum() < T


def test_shards_and_arrays_give_the_same_batches(tmp_path):
    shards = write_shards(tmp_path, [TOKENS], vocab_size=2000, text_bytes=1, shard_tokens=64)
    a, b = (BatchSampler(t, 8, 100, seed=1).batch(2) for t in (TOKENS, shards))
    assert all((x == y).all() for x, y in zip(a, b, strict=True))
    a, b = (list(evaluation_batches(t, 3, 100)) for t in (TOKENS, shards))
    assert all((x[0] == y[0]).all() and (x[1] == y[1]).all() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (-1, 4), (4, 1000)])
def test_impossible_sizes_are_usage_errors(sizes):
    with pytest.raises(UsageError):
        BatchSampler(TOKENS, *sizes)


def test_a_text_too_short_for_the_context_is_an_error_with_both_numbers():
    with pytest.raises(UsageError, match="has 1000 tokens and a context of 1000 needs 1001"):
        BatchSampler(TOKENS, 1, 1000)
    assert BatchSampler(TOKENS, 1, 999).batch(0)[1][0, -1] == 1999


@pytest.mark.parametrize("number", [-1, 2**64])
def test_seeds_and_steps_outside_64_bits_are_usage_errors(number):
    with pytest.raises(UsageError, match="seed"):
        BatchSampler(TOKENS, 1, 4, seed=number)
    with pytest.raises(UsageError, match="step"):
        BatchSampler(TOKENS, 1, 4).batch(number)


def test_batches_can_be_changed_without_changing_the_data():
    tokens = TOKENS.copy()
    inputs, targets = BatchSampler(tokens, 2, 4).batch(0)
    digest = hashlib.sha256(tokens).digest()
    inputs[:] = 0
    assert targets.min() >= 1000
    assert hashlib.sha256(tokens).digest() == digest
