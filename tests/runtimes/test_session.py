"""What a session writes, streams and scores."""

import numpy as np
import pytest
from scripted import BYTES, EOS, SCRIPT, Scripted, null

from portlm import rows as rows_module
from portlm.engine import Placement
from portlm.errors import ContextLengthError, UsageError
from portlm.runtimes.decoding import Decoding
from portlm.runtimes.null import NullEngine
from portlm.runtimes.session import Session
from portlm.tokenizer import byte_tokenizer


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


def test_a_session_closes_its_engine():
    engine = Scripted({})
    with Session(engine, BYTES) as session:
        assert session.placement() == Placement({"cpu": 1})
        assert repr(session) == "<portlm.Session scripted:cpu native fp32>"
    assert engine.closed == 1


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
