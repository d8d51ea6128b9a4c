"""Rows join and leave a running batch, and say what they would say alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portlm.errors import UsageError
from portlm.runtimes.base import ArrayEngine
from portlm.runtimes.null import DECODER
from portlm.runtimes.scheduler import WASTE_SHARE, WASTE_TOKENS, groups
from portlm.runtimes.session import Session
from portlm.tokenizer import byte_tokenizer

V = 257
BYTES = byte_tokenizer(eos="<|endoftext|>")


class Counting(ArrayEngine):
    """Says n, n - 1, ... 1 and ends the text, n being the row's first token; and keeps the shape of every call."""

    name, device, profile, precision = "counting", "cpu", "native", "fp32"

    def __init__(self):
        super().__init__({"decoder": DECODER}, V, 400)
        self.calls = []

    def _call(self, role, inputs, tensors):
        ids, mask = (
            np.concatenate([tensors["past_ids"], inputs["input_ids"]], axis=1),
            inputs["attention_mask"],
        )
        self.calls.append((*inputs["input_ids"].shape, mask.shape[1]))
        logits = np.zeros((len(ids), 1, V), np.float32)
        for row, (tokens, real) in enumerate(zip(ids, mask, strict=True)):
            said = tokens[real == 1]
            assert len(said) == 0 or inputs["position_ids"][row, -1] == len(said) - 1
            prompt = int((said == 200).sum()) + 1  # a row's prompt is n and then 200s
            left = int(said[0]) - (len(said) - prompt) if len(said) else 0
            logits[row, 0, left if left > 0 else 256] = 1
        return {"logits": logits}, {"past_ids": ids}


def answer(n):
    return (*range(n, 0, -1), 256)


LENGTHS = [
    (3, 1),
    (30, 2),
    (1, 60),
    (12, 5),
    (7, 300),
    (2, 2),
    (30, 30),
    (9, 9),
    (1, 1),
    (21, 3),
]  # answer, prompt


@pytest.mark.parametrize("batch_size", [1, 2, 4, 16])
def test_rows_that_come_and_go_do_not_change_what_others_say(batch_size):
    engine = Counting()
    prompts = [[n] + [200] * (p - 1) for n, p in LENGTHS]
    results = Session(engine, BYTES).generate(prompts, max_new_tokens=50, batch_size=batch_size)
    assert [r.token_ids for r in results] == [answer(n) for n, _ in LENGTHS]
    assert [r.finish_reason for r in results] == ["eos"] * len(LENGTHS)
    assert max(rows for rows, _, _ in engine.calls) <= batch_size
    stats = results[0].stats
    assert stats.new_tokens == sum(n + 1 for n, _ in LENGTHS)
    assert (stats.rows, stats.prompt_tokens) == (len(LENGTHS), sum(p for _, p in LENGTHS))


def test_a_finished_row_costs_nothing_more():
    engine = Counting()
    Session(engine, BYTES).generate([[n] for n in (1, 2, 3, 30)], max_new_tokens=50)
    rows = [rows for rows, tokens, _ in engine.calls]
    assert rows == [4, 4, 3, 2, *[1] * 27]


def test_slots_that_only_a_finished_row_had_are_dropped():
    engine = Counting()
    Session(engine, BYTES).generate([[1] + [200] * 299, [20]], max_new_tokens=50)
    slots = [slots for rows, tokens, slots in engine.calls if tokens == 1 and rows == 1]
    assert slots[-1] == 21  # the prompt of one token, and 20 more


def test_a_waiting_prompt_takes_the_place_of_a_finished_row():
    engine = Counting()
    Session(engine, BYTES).generate([[n] for n in (1, 30, 1, 1, 1, 1, 1)], max_new_tokens=50, batch_size=2)
    steps = sum(tokens == 1 and rows == 2 for rows, tokens, _ in engine.calls)
    assert len(engine.calls) < 60  # two batches one after the other would take 30 and more each
    assert steps >= 6


def test_each_prompt_may_have_its_own_limit():
    session = Session(Counting(), BYTES)
    results = session.generate([[9], [9], [9]], max_new_tokens=[1, 5, 20])
    assert [len(r.token_ids) for r in results] == [1, 5, 10]
    assert [r.finish_reason for r in results] == ["length", "length", "eos"]
    with pytest.raises(UsageError, match="max_new_tokens was given for 2 prompts, but there are 1"):
        session.generate([[9]], max_new_tokens=[1, 2])


def test_rows_that_join_later_draw_what_they_would_draw_alone():
    session = Session(Counting(), BYTES)
    prompts = [[n, 200] for n in (5, 1, 9, 2, 7)]
    options = {"temperature": 2.0, "max_new_tokens": 12, "ignore_eos": True}
    seeds = [3, 1, 4, 1, 5]
    lone = [
        session.generate([p], seed=[s], **options)[0].token_ids for p, s in zip(prompts, seeds, strict=True)
    ]
    limits = [12, 2, 12, 3, 12]
    for batch_size in (1, 2, 3, 5):
        together = session.generate(
            prompts, seed=seeds, batch_size=batch_size, **{**options, "max_new_tokens": limits}
        )
        assert [r.token_ids for r in together] == [t[:n] for t, n in zip(lone, limits, strict=True)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=20))
def test_groups_hold_every_row_once_and_pad_little(lengths):
    found = groups(lengths)
    assert sorted(index for group in found for index in group) == list(range(len(lengths)))
    for group in found:
        members = [lengths[index] for index in group]
        padding = len(members) * max(members) - sum(members)
        assert padding <= (WASTE_TOKENS + sum(members) // WASTE_SHARE) * len(members)


def test_prompts_of_one_length_are_one_group_and_a_long_one_is_read_by_itself():
    assert groups([7] * 16) == [list(range(16))]
    assert groups([5, 900, 6]) == [[0, 2], [1]]
