"""How an encoder that takes one token per call, or a picture, becomes what a decoder is given."""

import numpy as np
import pytest

from portlm.engine import CallSpec
from portlm.errors import UsageError
from portlm.memory import (
    given_for,
    giver_of,
    read_sources,
    reads_singly,
    reads_sources,
    sees_pictures,
    source_inputs,
)
from portlm.roles import StateSpec, TensorSpec
from portlm.runtimes.decoding import Decoding
from portlm.runtimes.penalties import penalise

ONE = ("batch", 1)
TOKENS = (TensorSpec("input_ids", "int64", ONE), TensorSpec("attention_mask", "int64", ONE))
BACKWARD = (
    TensorSpec("backward_input_ids", "int64", ONE),
    TensorSpec("backward_attention_mask", "int64", ONE),
)
SEEN = StateSpec("past_sum", "present_sum", "float32", ("batch", 1), "zeros", "replace")
OUTPUTS = (
    TensorSpec("sum", "float32", ("batch", 3)),  # no axis of tokens, although it has two
    TensorSpec("token", "float32", ("batch", 1, 2)),
    TensorSpec("backward_token", "float32", ("batch", 1, 2)),
)


def given(*names):
    return tuple(
        StateSpec(name, "", "float32", ("batch", "source", 2), "given", "constant") for name in names
    )


class Adder:
    """Gives the ids that it reads, and their sum so far."""

    context_length = 8

    def __init__(self, inputs, decoder):
        logits = (TensorSpec("logits", "float32", ("batch", 1, 5)),)
        self.roles = {
            "encoder": CallSpec(inputs, OUTPUTS, (SEEN,)),
            "decoder": CallSpec(TOKENS, logits, decoder),
        }
        self.calls = []

    def start(self, role, batch, given=None):
        return np.zeros((batch, 1), np.float32)

    def run(self, role, inputs, state):
        self.calls.append(inputs)
        assert all(value.flags.c_contiguous and value.shape[1:] == (1,) for value in inputs.values())
        forward = inputs.get("input_ids", inputs.get("backward_input_ids"))
        backward = inputs.get("backward_input_ids", forward)
        state = state + forward

        def token(ids):
            return np.repeat(ids[:, :, None], 2, axis=2).astype(np.float32)

        made = {
            "sum": np.repeat(state, 3, axis=1),
            "token": token(forward),
            "backward_token": token(backward),
        }
        return made, state


def test_tokens_are_put_together_in_the_order_of_the_source_and_the_last_state_counts():
    state = StateSpec("sum", "next", "float32", ("batch", 3), "given", "replace")
    mask = StateSpec("encoder_attention_mask", "", "int64", ("batch", "source"), "given", "constant")
    engine = Adder(TOKENS + BACKWARD, (mask, state, *given("token", "backward_token")))
    assert reads_sources(engine.roles)
    assert reads_singly(engine.roles["encoder"])
    found = read_sources(engine, [[1, 2, 3], [4]])
    expected = [[1, 2, 3], [0, 0, 4]]  # padded on the left
    assert found["token"][:, :, 0].tolist() == expected
    assert found["backward_token"][:, :, 0].tolist() == expected  # read from the end, and turned again
    assert found["encoder_attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert found["sum"].tolist() == [[6] * 3, [4] * 3]
    assert [call["input_ids"].ravel().tolist() for call in engine.calls] == [[1, 0], [2, 0], [3, 4]]
    assert [call["backward_input_ids"].ravel().tolist() for call in engine.calls] == [[3, 4], [2, 0], [1, 0]]


def test_an_encoder_that_reads_only_backwards_gets_the_last_token_first():
    mask = StateSpec("encoder_attention_mask", "", "int64", ("batch", "source"), "given", "constant")
    engine = Adder(BACKWARD, (mask, *given("backward_token")))
    found = read_sources(engine, [[1, 2, 3], [4]])
    assert [call["backward_input_ids"].ravel().tolist() for call in engine.calls] == [[3, 4], [2, 0], [1, 0]]
    assert found["encoder_attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert found["backward_token"][:, :, 0].tolist() == [[1, 2, 3], [0, 0, 4]]


def test_an_encoder_of_whole_sources_gets_them_in_one_call():
    whole = (
        TensorSpec("input_ids", "int64", ("batch", "source")),
        TensorSpec("position_ids", "int64", ("batch", "source")),
    )
    inputs = source_inputs(CallSpec(whole, OUTPUTS), [[1, 2, 3], [4]])
    assert {name: value.tolist() for name, value in inputs.items()} == {
        "input_ids": [[1, 2, 3], [0, 0, 4]],
        "position_ids": [[0, 1, 2], [0, 0, 0]],
    }


@pytest.mark.parametrize(
    "change",
    [
        {"state": (StateSpec("a", "b", "float32", ("batch", 2), "given", "replace"),)},
        {"inputs": (TensorSpec("input_ids", "int64", ("batch", "source")),)},
        {"inputs": (*TOKENS, TensorSpec("pixels", "float32", ONE))},
    ],
    ids=["a state that is given", "a state and whole sources", "what is no token"],
)
def test_another_encoder_is_none_that_reads_sources(change):
    engine = Adder(TOKENS, given("token"))
    assert reads_sources(engine.roles)
    spec = engine.roles["encoder"]
    fields = {"inputs": spec.inputs, "outputs": spec.outputs, "state": spec.state}
    assert not reads_sources({**engine.roles, "encoder": CallSpec(**{**fields, **change})})


# ---- pictures ----------------------------------------------------------------------------------------------------

PIXELS = (TensorSpec("pixel_values", "float32", ("batch", 3, 2, 2)),)
PICTURE = TensorSpec("picture", "float32", ("batch", 4, 1))


class Looker:
    """Gives the mean of each picture four times, and counts its calls."""

    context_length = 8

    def __init__(self):
        state = (StateSpec("picture", "", "float32", ("batch", 4, 1), "given", "constant"),)
        logits = (TensorSpec("logits", "float32", ("batch", 1, 5)),)
        self.roles = {"see": CallSpec(PIXELS, (PICTURE,)), "decoder": CallSpec(TOKENS, logits, state)}
        self.calls = 0

    def start(self, role, batch, given=None):
        return batch

    def run(self, role, inputs, state):
        self.calls += 1
        pixels = inputs["pixel_values"]
        assert state == len(pixels)
        means = pixels.mean((1, 2, 3), dtype=np.float32)
        return {"picture": np.repeat(means, 4).reshape(-1, 4, 1)}, state


def filled(value):
    return np.full((3, 2, 2), value, np.float32)


def test_pictures_are_seen_together_and_a_row_without_one_is_given_zeros():
    engine = Looker()
    found = given_for(engine, [(), (), ()], [filled(3), None, filled(5)])["picture"]
    assert found[:, 0, 0].tolist() == [3, 0, 5]
    assert engine.calls == 1
    assert not given_for(engine, [()], [None])["picture"].any()
    assert engine.calls == 1  # nobody has to look at nothing


def test_a_picture_for_a_model_that_sees_none_is_refused():
    engine = Adder(TOKENS, given("token"))
    with pytest.raises(UsageError, match="this model sees no pictures"):
        given_for(engine, [(1,)], [filled(1)])
    with pytest.raises(UsageError, match="this model has no encoder, so it reads no source"):
        read_sources(Looker(), [(1,)])


@pytest.mark.parametrize(
    "see",
    [
        CallSpec((*PIXELS, *TOKENS), (PICTURE,)),
        CallSpec(PIXELS, (TensorSpec("picture", "float32", ("batch", 5, 1)),)),
        CallSpec(PIXELS, (TensorSpec("sight", "float32", ("batch", 4, 1)),)),
        CallSpec(PIXELS, (PICTURE,), (SEEN,)),
    ],
    ids=["tokens beside pixels", "another shape", "another name", "a state"],
)
def test_another_role_is_none_that_sees_pictures(see):
    roles = Looker().roles
    assert sees_pictures(roles)
    assert giver_of(roles) == "see"
    assert not sees_pictures({**roles, "see": see})
    assert giver_of({**roles, "see": see}) == ""


def test_rows_of_a_picture_are_no_tokens_that_were_said():
    scores = np.ones(5, np.float32)
    penalise(scores, (2, 5, 6, 2, 9), Decoding.of(repetition_penalty=2.0, no_repeat_ngram_size=1))
    assert scores.tolist() == [1, 1, -np.inf, 1, 1]
