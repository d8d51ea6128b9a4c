"""How an encoder that takes one token per call becomes what a decoder is given."""

import numpy as np
import pytest

from portlm.engine import CallSpec
from portlm.memory import read_sources, reads_singly, reads_sources, source_inputs
from portlm.roles import StateSpec, TensorSpec

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
