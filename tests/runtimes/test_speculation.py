"""Guesses change how fast a text is written, and not one token of it: on every engine, with every option."""

import dataclasses
from functools import partial

import numpy as np
import pytest
from engine_cases import OPTIONS, PROMPTS, open_or_skip
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

from ngram_trees import random_ngrams
from packable import PACKED_KINDS

import portlm
from portlm.errors import UsageError
from portlm.models import DECODERS, build, save_model
from portlm.models.ngram import NGramConfig
from portlm.rows import Rows
from portlm.runtimes import guessing, pace
from portlm.runtimes.drafting import MATCHES, Draft, Lookup, SmallModel
from portlm.runtimes.null import NullEngine
from portlm.runtimes.packed import PackedEngine
from portlm.runtimes.session import Session
from portlm.runtimes.speculation import Speculation
from portlm.tokenizer import byte_tokenizer

BYTES = byte_tokenizer(eos="<|endoftext|>")
V, CONTEXT = 257, 48
# Families of each kind on one engine, which has a loop of its own, and one family on the rest.
TARGETS = [
    *((family, "packed", "fused") for family in PACKED_KINDS),
    *(("gpt2", "torch", profile) for profile in ("native", "fused")),
    *(("gpt2", engine, profile) for engine in ("ort", "tvm") for profile in ("portable", "fused")),
]


def open_session(folder, engine, profile):
    return Session(open_or_skip(folder, engine, "cpu", profile), BYTES)


@pytest.fixture(scope="module", params=TARGETS, ids=":".join)
def session(request, compiled):
    family, engine, profile = request.param
    with open_session(compiled[family], engine, profile) as session:
        yield session


@pytest.fixture(scope="module")
def packed(compiled):
    with open_session(compiled["gpt2"], "packed", "fused") as session:
        yield session


@pytest.fixture(autouse=True)
def _passes_are_free(free_passes):
    """All guesses are read."""


class Foreknowing:
    """Guesses what the text will be, with a mistake at every so many places."""

    def __init__(self, texts, mistake, row):
        self.text = next(t for t in texts if t[: len(row.prompt)] == row.prompt)
        self.mistake, self.known = mistake, 0

    def propose(self, new, count):
        assert tuple(new) == self.text[self.known : self.known + len(new)]
        self.known += len(new)
        places = range(self.known, min(self.known + count, len(self.text)))
        return Draft([(self.text[p] + 1) % 256 if p % self.mistake == 0 else self.text[p] for p in places])


class RowStub:
    """A text without a batch."""

    def __init__(self, decoding):
        self.decoding, self.tokens, self.seed, self.stream = decoding, [], 0, 0


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert (a.token_ids, a.text, a.finish_reason, a.stop) == (
            b.token_ids,
            b.text,
            b.finish_reason,
            b.stop,
        )


def foreknowing(session, prompts, results, mistake=3):
    whole = [
        (*(session.tokenizer.encode(p) or [256]), *r.token_ids) for p, r in zip(prompts, results, strict=True)
    ]
    return partial(Foreknowing, whole, mistake)


@pytest.mark.parametrize("options", OPTIONS)
def test_tokens_are_those_of_plain_decoding(options, session):
    batch_size = 1 if options == "sampled" else 4
    options = {"max_new_tokens": 12, **OPTIONS[options]}
    plain = session.generate(PROMPTS, **options)
    drafter = foreknowing(session, PROMPTS, plain)
    guessed = session.generate(PROMPTS, batch_size=batch_size, draft=drafter, **options)
    same(guessed, plain)
    stats = guessed[0].stats
    assert 0 < stats.accepted < stats.drafted
    assert stats.new_tokens == plain[0].stats.new_tokens == sum(len(r.token_ids) for r in plain)
    if batch_size == 1 and "stop" not in options:  # else one pass serves several rows
        assert stats.passes + stats.accepted <= stats.new_tokens - stats.rows + len(PROMPTS)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 5}], ids=str)
def test_a_lookup_writes_the_same_tokens(options, session):
    prompts = ["abcabcabcabca", "one two one two one", "no"]
    plain = session.generate(prompts, max_new_tokens=20, **options)
    found = session.generate(prompts, max_new_tokens=20, lookup=True, **options)
    same(found, plain)
    if not options:  # what is sampled here hardly repeats anything
        assert found[0].stats.drafted > 0


def test_a_text_that_fills_the_context_is_the_same_to_its_end(session):
    prompt = [1, 2, 3, 4]
    plain = session.generate(prompt, max_new_tokens=CONTEXT - 4)
    text = (*prompt, *plain.token_ids, *range(9))  # it knows even more than the context holds
    found = session.generate(prompt, max_new_tokens=CONTEXT - 4, draft=partial(Foreknowing, [text], 50))
    assert found.token_ids == plain.token_ids
    # At first one token is tried, and more after each success: a text that ends early has had fewer of those.
    assert found.stats.passes < len(plain.token_ids) / (3 if len(plain.token_ids) > 9 else 2)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 2}], ids=str)
@pytest.mark.parametrize("small", [("packed", "fused"), ("torch", "native")], ids=":".join)
def test_a_small_model_guesses_and_the_large_one_decides(small, options, packed, compiled):
    """The small model on an engine with a loop of its own, and on one without."""
    plain = packed.generate(PROMPTS, max_new_tokens=12, **options)
    with open_session(compiled["llama"], *small) as drafting:
        found = packed.generate(PROMPTS, max_new_tokens=12, draft=drafting, **options)
    same(found, plain)
    assert found[0].stats.drafted > 0


@pytest.fixture(scope="module")
def ngrams(tmp_path_factory):
    """A small model whose state is replaced at every token, of as many ids as the tokenizer."""
    config = NGramConfig(vocab_size=V, context_length=CONTEXT, order=4, histories=1201, places=1703)
    folder = tmp_path_factory.mktemp("ngrams")
    save_model(folder, random_ngrams(config), BYTES)
    with portlm.load(folder, "torch") as session:
        yield session


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 2}], ids=str)
def test_a_small_model_whose_state_cannot_go_back_guesses_with_a_copy(options, ngrams, tmp_path):
    config = dataclasses.replace(DECODERS["gpt2"].config_class().tiny(), vocab_size=V, context_length=CONTEXT)
    save_model(tmp_path, build(config), BYTES)
    with portlm.load(tmp_path, "torch") as large:
        plain = large.generate(PROMPTS, max_new_tokens=12, **options)
        found = large.generate(PROMPTS, max_new_tokens=12, draft=ngrams, **options)
    same(found, plain)
    assert found[0].stats.drafted > 0
    with pytest.raises(
        UsageError, match="this model has a state that cannot go back to before a wrong guess"
    ):
        ngrams.generate("a", lookup=True)


def test_a_copy_guesses_what_the_small_model_writes_behind_whatever_the_text_got(ngrams):
    text, row = [], RowStub(ngrams.decoding(max_new_tokens=40))
    small = SmallModel(ngrams.engine, V, row)
    for new, count in (([1, 2, 3], 5), ([4], 1), ([0, 0], 4), ([9], 3), ([7, 7, 0], 6)):
        text += new
        guess = small.propose(new, count).tokens
        assert tuple(guess) == ngrams.generate(text, max_new_tokens=count, ignore_eos=True).token_ids
        text += guess[:1]
        row.tokens += guess[:1]
        guess = small.propose(guess[:1], count).tokens
        assert tuple(guess) == ngrams.generate(text, max_new_tokens=count, ignore_eos=True).token_ids


@pytest.mark.parametrize("options", ["greedy", "sampled", "filtered", "seeds"])
def test_a_model_that_drafts_for_itself_is_always_right(options, packed):
    """It draws with the random numbers of the text, and goes back where a row had less room than its guess."""
    options = {"max_new_tokens": 12, "ignore_eos": True, **OPTIONS[options]}
    plain = packed.generate(PROMPTS, **options)
    found = packed.generate(PROMPTS, draft=packed, **options)
    same(found, plain)
    assert found[0].stats.accepted == found[0].stats.drafted > 20


def test_a_guess_holds_what_ends_a_text_and_nothing_behind_it_is_said(packed):
    free = packed.generate(PROMPTS, max_new_tokens=12, ignore_eos=True)
    ending = Session(packed.engine, BYTES, eos_ids=[free[0].token_ids[5], free[2].token_ids[3]])
    plain = ending.generate(PROMPTS, max_new_tokens=12)
    assert plain[0].finish_reason == "eos"
    found = ending.generate(PROMPTS, max_new_tokens=12, draft=foreknowing(packed, PROMPTS, free, 100))
    same(found, plain)
    assert found[0].stats.accepted > 0


@pytest.mark.parametrize("options", [{}, {"stop": ["e", "12"]}, {"temperature": 1.0, "seed": 2}], ids=str)
def test_a_stream_shows_the_text_of_generate(options, session):
    plain = session.generate("The ", max_new_tokens=30, **options)
    drafter = foreknowing(session, ["The "], [plain])
    stream = session.stream("The ", max_new_tokens=30, draft=drafter, **options)
    pieces = list(stream)
    assert all(pieces)
    assert "".join(pieces) == plain.text
    assert stream.generation.stats.accepted > 0
    assert tuple(session.stream("The ", max_new_tokens=30, draft=drafter, **options).ids()) == plain.token_ids


def test_plain_stretches_are_left_to_the_engines_own_loop(packed, monkeypatch):
    """Where nothing was said before, and a real clock says that a guess costs something."""
    monkeypatch.setattr(guessing, "Speculation", partial(Speculation, clock=iter(range(10**6)).__next__))
    monkeypatch.setattr(pace, "SHARE", 0.01)
    calls, advance = [], PackedEngine.advance

    def counted(self, state, asked):
        calls.append(asked.count)
        return advance(self, state, asked)

    monkeypatch.setattr(PackedEngine, "advance", counted)
    none = packed.generate("a", max_new_tokens=40, ignore_eos=True, draft=lambda row: Silent())
    assert none.stats.drafted == 0
    assert max(calls) > 20
    assert len(calls) < 6


class Silent:
    def propose(self, new, count):
        return Draft(())


def test_a_guess_that_is_no_token_is_refused(packed):
    class Lost:
        def propose(self, new, count):
            return Draft([V])

    with pytest.raises(UsageError, match=r"guessed tokens must be a whole number from 0 to 256, got 257"):
        packed.generate("a", max_new_tokens=9, draft=lambda row: Lost())


def test_what_guesses_cannot_do_is_said(packed, compiled):
    with pytest.raises(UsageError, match="a beam search takes no guesses"):
        packed.generate("a", lookup=True, num_beams=2)
    with pytest.raises(UsageError, match="two ways to guess: choose one"):
        packed.generate("a", lookup=True, draft=packed)
    with pytest.raises(UsageError, match=r"draft must be a session \(portlm.load gives one\), got 'small'"):
        packed.stream("a", draft="small")
    with pytest.raises(UsageError, match="lookup must be a whole number from 1 to 256, got 0"):
        packed.generate("a", lookup=0)
    other = Session(NullEngine(256, 48), byte_tokenizer())
    with pytest.raises(UsageError, match="a tokenizer of 256 tokens, and the model one of 257: take one"):
        packed.generate("a", draft=other)
    other = Session(NullEngine(257, 48), byte_tokenizer(eos="<|end|>"))
    with pytest.raises(
        UsageError, match="another tokenizer than the model: take one whose ids mean the same"
    ):
        packed.generate("a", draft=other)


def test_a_small_model_with_a_short_context_falls_silent(packed):
    """And the text goes on without."""
    short = Session(NullEngine(V, 8), BYTES)
    plain = packed.generate("abc", max_new_tokens=30)
    found = packed.generate("abc", max_new_tokens=30, draft=short)
    assert found.token_ids == plain.token_ids
    row = Silent()
    row.tokens, row.decoding, row.seed, row.stream = [], packed.decoding(), 0, 0
    small = SmallModel(short.engine, V, row)
    assert small.propose([1, 2, 3], 3).tokens == [4, 5, 6]
    assert small.propose([4, 5, 9], 9).tokens == [10, 11, 12]  # 8 tokens fit, and one is said of the last
    assert small.propose([1, 2, 3], 9).tokens == ()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.lists(st.integers(1, 9), max_size=9))
def test_a_lookup_finds_the_latest_place_behind_the_longest_match(text, cuts):
    """However the text came to be known."""
    lookup, begin = Lookup(), 0
    for end in sorted({min(sum(cuts[: i + 1]), len(text)) for i in range(len(cuts))} | {len(text)}):
        found = lookup.propose(text[begin:end], 5)
        begin = end
    places = {
        n: max((p for p in range(n, len(text)) if text[p - n : p] == text[len(text) - n :]), default=0)
        for n in MATCHES
        if n <= len(text)
    }
    kind = next((n for n, place in places.items() if place), 0)
    if not kind:
        assert found == Draft(())
        return
    whole = list(text)
    while len(whole) < len(text) + 5:  # what is guessed goes on as the text did
        whole.append(whole[places[kind] + len(whole) - len(text)])
    assert found == Draft(whole[len(text) :], kind)


def test_a_call_has_room_for_what_the_context_leaves(packed):
    rows = Rows(packed.engine, 2)
    rows.read_texts([[1, 2, 3], [1]])
    assert rows.room == CONTEXT - 3
    rows.read(np.ones((2, rows.room), np.int64), every=True)
    assert rows.room == 0
