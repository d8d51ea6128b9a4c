import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portlm.data.python_topics import python_topics
from portlm.data.text import read_text, split_text
from portlm.errors import FormatError, UsageError


def test_text_is_read_byte_for_byte(tmp_path):
    raw = "\ufeffé\r\nline\rend\0 \U0001f600".encode()
    (tmp_path / "a.txt").write_bytes(raw)
    assert read_text(tmp_path / "a.txt").encode() == raw


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "is empty"),
        (b"good\xff", "byte 4 is 0xff"),
        (b"caf\xe9 au lait", "byte 3 is 0xe9"),
        (b"cut \xe2\x82", "byte 4 is 0xe2"),
        (b"\xed\xa0\x80", "byte 0 is 0xed"),
        ("text".encode("utf-16"), "iconv -f UTF-16"),
    ],
)
def test_what_is_not_utf8_text_is_refused_with_its_offset(tmp_path, raw, says):
    (tmp_path / "a.txt").write_bytes(raw)
    with pytest.raises(FormatError, match=says) as caught:
        read_text(tmp_path / "a.txt")
    assert "a.txt" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "missing", tmp_path / "pipe", tmp_path):
        with pytest.raises(FormatError, match=str(path)):
            read_text(path)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.floats(0, 0.99))
def test_the_parts_of_a_split_are_the_text_and_the_second_has_the_asked_share(text, held_out):
    share = int(len(text.encode()) * held_out)
    try:
        train, val = split_text(text, held_out)
    except (
        UsageError
    ):  # only where one part would be empty: nothing is asked for, or the cut is in the first character
        assert share == 0 or len(text.encode()) - share < len(text[0].encode())
        return
    assert train + val == text
    assert train
    assert share <= len(val.encode()) <= share + 3  # a character has at most 4 bytes


@pytest.mark.parametrize("held_out", [-0.1, 1.0, 2.0, float("nan")])
def test_an_impossible_share_is_a_usage_error(held_out):
    with pytest.raises(UsageError, match="fraction"):
        split_text("some text", held_out)


def test_half_of_a_surrogate_pair_is_refused():
    with pytest.raises(UsageError, match="character 1 "):
        split_text("a\ud800" * 20)


def test_the_python_corpus_is_large_readable_and_always_the_same():
    text = python_topics()
    assert 300_000 < len(text.encode()) < 800_000
    headings = [line for line in text.splitlines() if line.startswith("# ")]
    assert "# assert" in headings
    assert text.startswith("# assert\n\n")
    assert text.endswith("\n\n")
    code = (
        "import hashlib, sys; from portlm.data.python_topics import python_topics\n"
        "print(hashlib.sha256(python_topics().encode()).hexdigest())\n"
        "assert not {'torch', 'numpy'} & sys.modules.keys()"
    )
    digests = set()
    for seed in "12":
        env = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
        )
        digests.add(done.stdout)
    assert len(digests) == 1
