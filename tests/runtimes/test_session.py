from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portlm import rows as rows_module
from portlm.engine import Placement
from portlm.errors import ContextLengthError, PortlmError, UsageError
from portlm.runtimes.base import ArrayEngine
from portlm.runtimes.decoding import Decoding
from portlm.runtimes.null import DECODER, NullEngine
from portlm.runtimes.session import Session
from portlm.runtimes.stopping import StopScanner
from portlm.tokenizer import byte_tokenizer

EOS = 256
BYTES = byte_tokenizer(eos="<|endoftext|>")


class Scripted(ArrayEngine):
    """Answers each prompt with the tokens that a script has for it, whatever stands to its left or beside it.

    It knows a row only by the tokens that the mask shows, so a wrong mask, position or order gives another answer.
    """

    name, device, profile, precision = "scripted", "cpu", "native", "fp32"

    def __init__(self, script):
        super().__init__({"decoder": DECODER}, 257, 64)
        self.script = {
            tuple(p.encode()): list(a.encode()) if isinstance(a, str) else a for p, a in script.items()
        }
        self.steps = []
        self.closed = 0

    def _call(self, role, inputs, tensors):
        input_ids, mask = inputs["input_ids"], inputs["attention_mask"]
        self.steps.append(input_ids.shape)
        ids = np.concatenate([tensors["past_ids"], input_ids], axis=1)
        assert mask.shape == ids.shape
        logits = np.zeros((*input_ids.shape, self.vocab_size), np.float32)
        past = ids.shape[1] - input_ids.shape[1]
        for b in range(len(ids)):
            for t in range(input_ids.shape[1]):
                seen = np.flatnonzero(mask[b, : past + t + 1])
                if not mask[b, past + t]:
                    continue
                assert inputs["position_ids"][b, t] == len(seen) - 1
                logits[b, t, self.next(tuple(ids[b, seen].tolist()))] = 9
        return {"logits": logits[:, inputs["logits_to_keep"]]}, {"past_ids": ids}

    def next(self, seen):
        for prompt, answer in self.script.items():
            if (
                seen[: len(prompt)] == prompt
                and list(seen[len(prompt) :]) == answer[: len(seen) - len(prompt)]
            ):
                rest = answer[len(seen) - len(prompt) :]
                return rest[0] if rest else EOS
        return 0

    def placement(self):
        return Placement({"cpu": 1})

    def close(self):
        self.closed += 1


def null(context=64, tokenizer=None):
    return Session(NullEngine(257, context), tokenizer or BYTES)


# --- generate ---------------------------------------------------------------------------------------


def test_generate_continues_the_prompt():
    result = null().generate("abc", max_new_tokens=4)
    assert result.text == str(result) == "defg"
    assert result.token_ids == tuple(b"defg")
    assert (result.finish_reason, result.stop, result.prompt_tokens, result.new_tokens) == (
        "length",
        None,
        3,
        4,
    )


def test_the_end_of_text_token_ends_the_text_and_is_not_part_of_it():
    session = Session(Scripted({"a": "bcd"}), BYTES)
    result = session.generate("a", max_new_tokens=20)
    assert (result.text, result.finish_reason, result.token_ids) == ("bcd", "eos", (*b"bcd", EOS))
    result = session.generate("a", max_new_tokens=5, ignore_eos=True)
    assert (result.finish_reason, result.new_tokens, result.token_ids[3]) == ("length", 5, EOS)


def test_eos_ids_beyond_the_tokenizers_own_end_a_text_too():
    session = Session(Scripted({"a": "bcd"}), BYTES, eos_ids=[ord("c")])
    assert session.generate("a", max_new_tokens=20).text == "b"


PROMPTS = ["a", "hello", "xy", "q" * 20, "hel"]
SCRIPT = {"a": "B", "hello": ", world", "xy": "", "q" * 20: "r" * 30, "hel": "icopter"}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
@pytest.mark.parametrize("tokens_per_call", [2048, 15, 1])
def test_prompts_of_any_length_get_the_same_answer_alone_and_in_a_batch(
    batch_size, tokens_per_call, monkeypatch
):
    monkeypatch.setattr(rows_module, "TOKENS_PER_CALL", tokens_per_call)
    results = Session(Scripted(SCRIPT), BYTES).generate(PROMPTS, max_new_tokens=25, batch_size=batch_size)
    assert [r.text for r in results] == [SCRIPT[p][:25] for p in PROMPTS]
    assert [r.finish_reason for r in results] == ["eos", "eos", "eos", "length", "eos"]
    assert [r.prompt_tokens for r in results] == [len(p) for p in PROMPTS]


def test_a_prompt_draws_the_same_tokens_alone_and_in_a_batch_when_it_brings_its_seed():
    session, options = null(), {"temperature": 5.0, "max_new_tokens": 10}
    together = session.generate(["a", "bcd", "ef"], seed=[3, 1, 4], **options)
    alone = [session.generate(p, seed=s, **options) for p, s in (("a", 3), ("bcd", 1), ("ef", 4))]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]


def test_equal_prompts_of_one_seed_get_different_answers_whatever_the_batch_size():
    session, options = null(), {"temperature": 5.0, "max_new_tokens": 8, "seed": 7}
    results = [r.token_ids for r in session.generate(["a"] * 6, **options)]
    assert len(set(results)) == 6
    assert [r.token_ids for r in session.generate(["a"] * 6, batch_size=2, **options)] == results
    assert [r.token_ids for r in session.generate(["a"] * 6, **options)] == results


def test_the_filters_reach_the_selection():
    session = null()
    greedy = session.generate("a", max_new_tokens=5).text
    assert session.generate("a", max_new_tokens=5, temperature=9.0, top_k=1).text == greedy
    assert session.generate("a", max_new_tokens=5, temperature=9.0, top_p=1e-9).text == greedy
    assert session.generate("a", max_new_tokens=5, temperature=9.0, min_p=1.0).text == greedy
    assert session.generate("a", max_new_tokens=5, temperature=9.0).text != greedy


@pytest.mark.parametrize(
    "ids",
    [[97, 98], (97, 98), range(97, 99), np.array([97, 98]), np.array([97, 98], np.uint8), [np.int32(97), 98]],
    ids=repr,
)
def test_token_ids_can_stand_for_text(ids):
    """A flat list or array is one prompt and gets one answer, as a text does; several are a list."""
    session = null()
    assert session.generate(ids, max_new_tokens=2).text == "cd"
    assert [answer.text for answer in session.generate([ids, "ab"], max_new_tokens=2)] == ["cd", "cd"]
    assert "".join(session.stream(ids, max_new_tokens=2)) == "cd"
    assert session.score(ids) == session.score("ab") == session.score([ids])[0]


def test_a_matrix_of_token_ids_is_a_prompt_in_each_row():
    answers = null().generate(np.array([[97, 98], [99, 100]]), max_new_tokens=2)
    assert [answer.text for answer in answers] == ["cd", "ef"]


def test_an_empty_prompt_starts_from_the_end_of_text_token():
    result = Session(NullEngine(257, 8), BYTES).generate("", max_new_tokens=1)
    assert (result.token_ids, result.prompt_tokens) == ((0,), 1)


def test_an_empty_prompt_without_an_end_of_text_token_is_an_error():
    with pytest.raises(UsageError, match="prompt 1 is empty"):
        null(tokenizer=byte_tokenizer()).generate(["a", ""], max_new_tokens=1)
    with pytest.raises(UsageError, match="the prompt is empty"):
        null(tokenizer=byte_tokenizer()).generate("", max_new_tokens=1)


def test_a_row_of_the_table_without_a_token_is_never_drawn():
    """Models pad their vocabulary to round numbers; the tokenizer has no text for what lies beyond its own."""
    session = Session(NullEngine(300, 64), BYTES)
    assert session.generate([[255]], max_new_tokens=3, ignore_eos=True)[0].token_ids == (256, 0, 1)
    tokens = session.generate("a", max_new_tokens=60, temperature=100.0, ignore_eos=True).token_ids
    assert max(tokens) <= 256


def test_control_tokens_leave_no_text():
    result = Session(Scripted({"a": [98, EOS, 99]}), BYTES).generate("a", max_new_tokens=3, ignore_eos=True)
    assert (result.text, result.token_ids) == ("bc", (98, EOS, 99))


def test_no_prompts_give_no_answers():
    assert null().generate([]) == []
    assert null().score([]) == []


def test_an_empty_list_is_an_empty_prompt_where_there_is_one_prompt():
    assert (
        next(null().stream([], max_new_tokens=1)) == "\0"
    )  # after the end of text, the last id, comes the first
    assert null().generate(np.array([], np.int64), max_new_tokens=1).token_ids == (0,)


@pytest.mark.parametrize(("context", "tokens"), [(64, 61), (400, 128), (4, 1)])
def test_without_a_number_128_tokens_are_written_or_what_the_context_holds(context, tokens):
    session = null(context)
    assert session.generate("abc", ignore_eos=True).new_tokens == tokens
    several = session.generate(["abc", "ab"], ignore_eos=True, max_new_tokens=None)
    assert [r.new_tokens for r in several] == [tokens, min(128, context - 2)]
    assert session.generate("abc", decoding=Decoding(ignore_eos=True)).new_tokens == tokens


class Framed:
    """A tokenizer whose texts begin with <s>, here the letter s, and end with e, as some files ask for."""

    def __init__(self, begin=b"s", end=b""):
        self.begin, self.end, self.inner = list(begin), list(end), BYTES

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def encode(self, text, *, add_special_tokens=True):
        ids = self.inner.encode(text)
        return [*self.begin, *ids, *self.end] if add_special_tokens else ids


def test_what_every_text_begins_with_is_put_before_texts_and_not_before_ids():
    session = Session(NullEngine(257, 64), Framed(b"s", b"e"))
    for ask in (
        lambda prompt, **o: session.generate(prompt, max_new_tokens=1, **o),
        lambda prompt, **o: session.generate([prompt], max_new_tokens=1, **o)[0],
        lambda prompt, **o: spent(session.stream(prompt, max_new_tokens=1, **o)),
    ):
        assert (ask("ab").prompt_tokens, ask("ab").text) == (4, "f")
        bare = ask("ab", add_special_tokens=False)
        assert (bare.prompt_tokens, bare.text) == (2, "c")
        assert ask([97, 98]).prompt_tokens == 2
    assert session.score("ab").token_ids == tuple(b"sabe")
    assert session.score("ab", add_special_tokens=False).token_ids == tuple(b"ab")
    assert session.score([97, 98]).token_ids == tuple(b"ab")


def spent(stream):
    assert list(stream)
    return stream.generation


def test_an_empty_prompt_starts_from_what_every_text_begins_with():
    session = Session(NullEngine(257, 64), Framed())
    assert session.generate("", max_new_tokens=1).text == "t"
    assert session.generate("", max_new_tokens=1, add_special_tokens=False).token_ids == (
        0,
    )  # after end of text
    with pytest.raises(UsageError, match="the text is empty"):
        session.score("")


def test_no_step_is_computed_beyond_the_last_token():
    engine = Scripted({"abc": "defghij"})
    Session(engine, BYTES).generate("abc", max_new_tokens=3)
    assert engine.steps == [(1, 3), (1, 1), (1, 1)]
    engine.steps.clear()
    Session(engine, BYTES).generate("abc", max_new_tokens=20, stop="de")
    assert engine.steps == [(1, 3), (1, 1)]


def test_stats_count_tokens_and_time():
    result = Session(Scripted(SCRIPT), BYTES).generate(["a", "hello"], max_new_tokens=20)
    stats = result[0].stats
    assert stats is result[1].stats
    assert (stats.prompt_tokens, stats.new_tokens, stats.rows) == (6, len("B, world") + 2, 2)
    assert stats.prefill_seconds > 0
    assert stats.decode_seconds > 0
    assert stats.tokens_per_second == pytest.approx(8 / stats.decode_seconds)


# --- stop strings and characters --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "text", "found"),
    [
        ("fg", "de", "fg"),
        (["zz", "efg"], "d", "efg"),
        ("zz", "defgh", None),
        ("d", "", "d"),
        ("ghi", "defgh", None),  # only begins: what was held back is part of the text
        (["efgh", "fg"], "de", "fg"),  # complete first
    ],
)
def test_a_stop_string_ends_the_text_before_it(stop, text, found):
    result = null().generate("abc", max_new_tokens=5, stop=stop)
    assert (result.text, result.stop) == (text, found)
    assert result.finish_reason == ("stop" if found else "length")


def test_a_character_is_never_cut():
    text = "é漢🙂 ok"
    session = Session(Scripted({"a": text}), BYTES)
    assert list(session.stream("a", max_new_tokens=30)) == list(text)
    for length in range(1, len(text.encode())):
        result = session.generate("a", max_new_tokens=length)
        assert result.text == text.encode()[:length].decode(errors="replace")


@pytest.mark.parametrize("text", ["é漢🙂 ok", "🙂🙃", "a🙂", "\u0301é"])
def test_the_joined_stream_is_what_generate_returns_for_a_text_cut_inside_a_character(text):
    """The bytes that are left at the end become U+FFFD in both, and a piece holds back the rest of a character."""
    session = Session(Scripted({"a": text}), BYTES)
    for length in range(1, len(text.encode()) + 2):
        for stop in ((), "🙃", "\ufffd"):
            whole = session.generate("a", max_new_tokens=length, stop=stop)
            stream = session.stream("a", max_new_tokens=length, stop=stop)
            pieces = list(stream)
            assert "".join(pieces) == whole.text
            assert stream.generation.text == whole.text
            assert (stream.generation.finish_reason, stream.generation.stop) == (
                whole.finish_reason,
                whole.stop,
            )
            assert all("\ufffd" not in piece for piece in pieces[:-1])


def test_a_character_that_is_no_character_is_the_same_in_a_stream():
    """Bytes that never were UTF-8, in the middle and at the end."""
    raw = b"\xffa\xf0\x9f\x99b\xe6\xbc"
    session = Session(Scripted({"a": list(raw)}), BYTES)
    for length in range(1, len(raw) + 2):
        assert (
            "".join(session.stream("a", max_new_tokens=length))
            == session.generate("a", max_new_tokens=length).text
        )


def test_a_stream_gives_token_ids_in_place_of_text_and_beside_it():
    session = Session(Scripted({"a": "é!"}), BYTES)
    stream = session.stream("a", max_new_tokens=9)
    assert list(stream.ids()) == [*"é!".encode(), EOS]
    assert stream.generation.text == "é!"
    stream = session.stream("a", max_new_tokens=9)
    assert next(stream) == "é"
    assert list(stream.ids()) == [*"é!".encode(), EOS]
    assert list(stream) == ["!"]


def test_a_stop_string_may_be_longer_than_a_token_and_of_any_script():
    session = Session(Scripted({"a": "問い。答え:🙂🙃"}), BYTES)
    assert session.generate("a", max_new_tokens=60, stop="答え:").text == "問い。"
    assert session.generate("a", max_new_tokens=60, stop="🙃").text == "問い。答え:🙂"


def first_complete(text, stops):
    """The definition: the end of the first stop string to be complete, character by character."""
    for end in range(len(text) + 1):
        whole = [s for s in stops if text[:end].endswith(s)]
        if whole:
            longest = max(whole, key=len)
            return text[: end - len(longest)], longest
    return text, None


letters = st.text("ab", max_size=12)


@settings(max_examples=400, deadline=None)
@given(st.lists(letters, max_size=8), st.lists(st.text("ab", min_size=1, max_size=5), max_size=4))
def test_stopping_does_not_depend_on_how_the_text_is_cut(pieces, stops):
    scanner = StopScanner(stops)
    shown = [scanner.push(piece) for piece in pieces]
    if scanner.found is None:
        shown.append(scanner.flush())
    assert ("".join(shown), scanner.found) == first_complete("".join(pieces), stops)


@settings(max_examples=200, deadline=None)
@given(letters, st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4))
def test_text_is_held_back_no_longer_than_needed(text, stops):
    scanner = StopScanner(stops)
    shown = "".join(scanner.push(letter) for letter in text)
    if scanner.found is None:
        held = text[len(shown) :]
        assert any(s.startswith(held) for s in stops)
        assert all(not s.startswith(text[i:]) for s in stops for i in range(len(shown)))


# --- stream -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"stop": "ghi"}, {"stop": ["i", "fz"]}, {"temperature": 2.0, "seed": 5}, {"max_new_tokens": 1}],
    ids=str,
)
def test_a_stream_says_what_generate_says(options):
    session = null()
    options = {"max_new_tokens": 12, **options}
    stream = session.stream("abc", **options)
    pieces = list(stream)
    whole = session.generate("abc", **options)
    assert "".join(pieces) == whole.text
    assert all(pieces)
    assert stream.generation.token_ids == whole.token_ids
    assert stream.generation.finish_reason == whole.finish_reason
    assert stream.generation.text == whole.text


def test_closing_a_stream_stops_the_model():
    engine = Scripted({"a": "b" * 50})
    stream = Session(engine, BYTES).stream("a", max_new_tokens=50)
    assert next(stream) == "b"
    stream.close()
    assert list(stream) == []
    assert stream.generation is None
    assert len(engine.steps) == 1


def test_time_between_the_pieces_of_a_stream_is_not_counted():
    import time

    stream = null().stream("a", max_new_tokens=3)
    for _ in stream:
        time.sleep(0.05)
    assert stream.generation.stats.decode_seconds < 0.05


def test_errors_in_the_arguments_of_a_stream_are_raised_at_once():
    with pytest.raises(UsageError, match="temperature"):
        null().stream("a", temperature=-1)
    with pytest.raises(ContextLengthError):
        null().stream("a" * 65)


# --- limits and errors ------------------------------------------------------------------------------


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


def test_a_session_closes_its_engine():
    engine = Scripted({})
    with Session(engine, BYTES) as session:
        assert session.placement() == Placement({"cpu": 1})
        assert repr(session) == "<portlm.Session scripted:cpu native fp32>"
    assert engine.closed == 1


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


# --- score ------------------------------------------------------------------------------------------


def test_score_gives_the_log_softmax_of_each_next_token():
    hit, miss = -np.log(1 + 256 * np.exp(-1.0)), -1 - np.log(1 + 256 * np.exp(-1.0))
    score = null().score("abcx")
    assert score.token_ids == tuple(b"abcx")
    assert score.logprobs == pytest.approx([hit, hit, miss], rel=1e-12)
    assert score.greedy == (True, True, False)
    assert score.total == pytest.approx(2 * hit + miss)
    assert score.perplexity == pytest.approx(np.exp(-(2 * hit + miss) / 3))


@pytest.mark.parametrize("logits_per_step", [1 << 24, 257 * 8, 257])
def test_texts_score_the_same_alone_and_in_a_batch(logits_per_step, monkeypatch):
    session = Session(Scripted(SCRIPT), BYTES)
    texts = ["hello, world", "a", "helicopter", "xyzzy", [97, 66, EOS], "q" * 40]
    alone = [session.score([text])[0] for text in texts]
    monkeypatch.setattr(rows_module, "LOGITS_PER_CALL", logits_per_step)
    assert session.score(texts) == alone
    assert session.score(texts, batch_size=2) == alone
    assert alone[0].greedy[4:] == (True,) * 7
    assert alone[4].greedy == (True, True)
    assert np.isnan(alone[1].perplexity)


def test_a_text_may_fill_the_context_and_no_more():
    assert len(null().score("a" * 64).logprobs) == 63
    with pytest.raises(ContextLengthError, match="the text has 65 tokens"):
        null().score("a" * 65)
    with pytest.raises(UsageError, match="text 1 is empty"):
        null().score(["a", ""])
