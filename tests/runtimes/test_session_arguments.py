"""Whatever a session is asked, it answers right or says in one line what was wrong with the question."""

from dataclasses import fields

import numpy as np
import pytest
from scripted import BYTES, null

from portlm.errors import ContextLengthError, PortlmError, UsageError
from portlm.runtimes.decoding import Decoding
from portlm.runtimes.null import NullEngine
from portlm.runtimes.session import Session


@pytest.mark.parametrize(
    ("prompt", "new", "fits"), [(63, 1, True), (62, 2, True), (1, 63, True), (63, 2, False)]
)
def test_a_prompt_may_fill_the_context_to_the_last_token(prompt, new, fits):
    if fits:
        assert null().generate("a" * prompt, max_new_tokens=new).new_tokens == new
    else:
        with pytest.raises(ContextLengthError, match=r"= 2 has 65 tokens.* 64: .* at most 1,"):
            null().generate("a" * prompt, max_new_tokens=new)


@pytest.mark.parametrize("tokens", [65, 640])
def test_a_prompt_longer_than_the_context_is_an_error_with_both_numbers(tokens):
    with pytest.raises(ContextLengthError, match=f"prompt 1 has {tokens} tokens.*holds 64") as error:
        null().generate(["a", "a" * tokens], max_new_tokens=1)
    assert (error.value.tokens, error.value.limit) == (tokens, 64)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"), ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"), ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 258}, "top_k"), ({"top_p": 0}, "top_p"), ({"min_p": 2}, "min_p"),
        ({"seed": -1}, "seed"), ({"seed": 2**64}, "seed"), ({"seed": [1, 2]}, "seed was given for 2 prompts"),
        ({"seed": "1"}, "seed"), ({"stop": ""}, "stop string"), ({"stop": ["a"] * 17}, "16 stop strings"),
        ({"stop": "é" * 129}, "256 bytes"), ({"stop": [3]}, "stop string"), ({"batch_size": 0}, "batch_size"),
        ({"temperature": 10**400}, "temperature must be .* got a number of 1329 bits"),
        ({"temperature": None}, "temperature must be a finite number"),
        ({"stop": None}, "stop must be a text or a list of them, an empty one for none, got None"),
        ({"repetition_penalty": 1e-320}, "repetition_penalty must be a finite number from 1e-06 to 1e"),
        ({"early_stopping": np.array([1, 2])}, 'early_stopping must be True, False or "never"'),
        ({"max_new_tokens": 10**9000}, "max_new_tokens must be .* got a number of 29898 bits"),
        ({"do_sample": True}, "no option 'do_sample' of decoding: temperature 0 takes the most probable"),
        ({"decoding": {"temperature": 1}}, "decoding must be a Decoding, got"), ({"decoding": "greedy"}, "a Decoding"),
    ],
)  # fmt: skip
def test_an_argument_out_of_range_is_named(options, words):
    with pytest.raises(UsageError, match=words):
        null().generate(["a"], **{"max_new_tokens": 2, **options})


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([97, "a"], "prompt 0 is a number beside other prompts"), ([[97, 257]], "prompt 0 holds token 257"),
        ([97, 257], "the prompt holds token 257"), ([[-1]], "holds token -1"), ([[2**9000]], "a number of 9001 bits"),
        (b"abc", "a text, token ids"), ([b"abc"], "prompt 0 must be a text"), (7, "a text, token ids"),
        ([[0.5]], "whole number"), ([0.5], "a token of the prompt must be a whole number"), (None, "a text, token ids"),
        ([None], "prompt 0 must be a text"), ([[True]], "whole number, got True"), ([True], "whole number, got True"),
        (np.array(3), "a text, token ids"), ([np.array(3)], "prompt 0 must be a text"),
        (np.array([0.5]), r"the prompt must be whole numbers, got an array of float64 \(1,\)"),
        (np.array([True]), "must be whole numbers"), (np.zeros((1, 1, 1), np.int64), "a text, token ids"),
        ({"a": 1}, "a text, token ids"), ({97}, "a text, token ids"), (iter("ab"), "a text, token ids"),
        ([["a"]], "whole number, got 'a'"), ([[[97]]], "whole number"), (np.array(["a"]), "whole numbers"),
        (np.array([2**63], np.uint64), "holds token 9223372036854775808"), (object(), "a text, token ids"),
    ],
    ids=lambda value: repr(value).partition(" at 0x")[0],  # the same in every process
)  # fmt: skip
def test_a_prompt_of_another_kind_is_refused(prompts, words):
    for ask in (null().generate, null().score):
        with pytest.raises(
            UsageError, match=words if ask.__name__ == "generate" else words.replace("prompt", "text")
        ):
            ask(prompts)
    if not isinstance(prompts, list) or len(prompts) > 1:
        with pytest.raises(UsageError, match=words):
            null().stream(prompts)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_numbers_are_an_error_that_names_engine_and_place(bad):
    class Broken(NullEngine):
        def _call(self, role, inputs, tensors):
            outputs, new = super()._call(role, inputs, tensors)
            if inputs["input_ids"].shape[1] == 1:
                outputs["logits"][-1, -1, 5] = bad
            return outputs, new

    with pytest.raises(PortlmError, match=r"null:cpu: new token 1: .*row 1: the logit of token 5 is"):
        Session(Broken(257, 64), BYTES).generate(["ab", "cd"], max_new_tokens=3)


def test_a_tokenizer_larger_than_the_model_is_refused():
    with pytest.raises(UsageError, match="257 tokens, but the model only 256"):
        Session(NullEngine(256, 8), BYTES)


ANYTHING = (
    None, True, -1, 0, 2.5, float("nan"), float("inf"), 10**400, 10**9000, 2**64, 1j, "x", "", b"x", "\ud800", (), [],
    [None], [[1]], [2.5], {}, {1}, {"a": 1}, object(), int, np.array(1), np.array([1, 2, 3]), np.array([0.5]),
    np.zeros((2, 2)), range(10**12), range(2**99),
    np.float32(0.5), np.int8(1), np.bool_(True), range(3), iter([1]), len,
)  # fmt: skip


class Unshowable:
    """An object that cannot even be shown."""

    def __repr__(self):
        raise RuntimeError("no")


@pytest.mark.parametrize("value", [*ANYTHING, Unshowable()], ids=lambda value: type(value).__name__)
def test_whatever_is_handed_to_a_session_the_answer_is_right_or_a_usage_error_of_one_line(value):
    """Every argument of generate, stream, score and Decoding, with values of every type in its place."""
    session = null()
    calls = [
        session.generate,
        session.stream,
        session.score,
        lambda v: session.generate([v]),
        lambda v: session.score([v]),
    ]
    for name in (
        "decoding",
        "batch_size",
        "add_special_tokens",
        *(field.name for field in fields(Decoding)),
        "no_such",
    ):
        calls.append(lambda v, name=name: session.generate("ab", **{"max_new_tokens": 2, name: v}))
    calls.append(lambda v: Decoding.of(v, top_k=1))
    calls += [
        lambda v, name=name: Decoding(**{name: v}) for name in (field.name for field in fields(Decoding))
    ]
    calls += [
        lambda v: session.score("ab", batch_size=v),
        lambda v: session.score("ab", add_special_tokens=v),
    ]
    refused = []
    for call in calls:
        try:
            call(value)
        except UsageError as error:
            refused.append(str(error))
    assert refused
    assert all("\n" not in message and len(message) < 400 for message in refused)
