"""Stop strings end a text before them, and a character is never cut, in a stream as in a whole text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import BYTES, EOS, Scripted, null

from portlm.runtimes.session import Session
from portlm.runtimes.stopping import StopScanner


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
