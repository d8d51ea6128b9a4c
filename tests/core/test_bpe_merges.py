"""Learning a vocabulary: ended by Ctrl-C at once, with nothing left, however long the words are."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from portlm import bpe_merges
from portlm.bpe_merges import MAX_WORD_BYTES, learn_merges
from portlm.data.python_topics import python_topics
from portlm.errors import PortlmError
from portlm.tokenizer import train_bpe

SAMPLE = python_topics()[:30_000]


def children(pid):
    """Living processes that a process has started."""
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in found.read_text().split()] if found.exists() else []


def wait_for(condition):
    """Return the first true value; a minute is more than any of this takes."""
    for _ in range(1200):
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def without_spaces(tmp_path_factory):
    """A text that is one word. The child has read it after a second, and learns from it for half a minute."""
    path = tmp_path_factory.mktemp("text") / "dna.txt"
    path.write_text("".join(random.Random(0).choices("ACGT", k=10_000_000)))
    return path


def commands(text, out):
    yield ["tokenizer", "train", str(text), "--out", str(out), "--vocab-size", "4096"]
    yield ["pretrain", str(text), "--out", str(out), "--tokenizer", "bpe:4096", "--preset", "tiny", "--quiet"]


@pytest.mark.parametrize("verb", [0, 1], ids=["tokenizer train", "pretrain"])
def test_ctrl_c_ends_the_learning_of_a_vocabulary_and_leaves_nothing(without_spaces, tmp_path, verb):
    """As `kill -INT` sends it to the one process; a terminal's reaches it, too."""
    command = list(commands(without_spaces, tmp_path / "out"))[verb]
    running = subprocess.Popen(
        [sys.executable, "-m", "portlm", *command], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        (child,) = wait_for(lambda: children(running.pid))
        wait_for(lambda: b"bpe_merges" in Path(f"/proc/{child}/cmdline").read_bytes())
        time.sleep(3)
        running.send_signal(signal.SIGINT)
        sent = time.monotonic()
        output, errors = running.communicate(timeout=60)
    finally:
        running.kill()
    assert time.monotonic() - sent < 5  # a second, on a machine with nothing else to do
    assert (running.returncode, output) == (130, "")
    assert errors.splitlines()[-1] == "portlm: error: interrupted"
    assert "Traceback" not in errors
    assert not alive(child)
    left = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not [name for name in left if "tokenizer" in name or name.endswith((".bin", ".tmp"))]


@pytest.mark.parametrize("moment", [0.0, 3.0], ids=["while it reads", "while it learns"])
def test_the_child_does_not_outlive_a_parent_that_was_killed(without_spaces, moment):
    code = "import sys; from portlm.tokenizer import train_bpe\ntrain_bpe([open(sys.argv[1]).read()], 4096)"
    parent = subprocess.Popen([sys.executable, "-c", code, str(without_spaces)])
    (child,) = wait_for(lambda: children(parent.pid))
    time.sleep(moment)
    assert alive(child)
    parent.kill()
    parent.wait()
    wait_for(lambda: not alive(child))


def test_the_child_learns_what_the_library_learns_in_one_call():
    pieces = [SAMPLE, " naïve 漢字 \x00"]
    here = [tuple(pair) for pair in bpe_merges._learn(pieces, 600, 2)]
    assert learn_merges(iter(pieces), 600, 2) == here
    assert len(here) == 344


def test_words_are_cut_only_where_no_ordinary_text_has_them(monkeypatch):
    """The same merges as without a cut, up to words of a thousand bytes."""
    text = SAMPLE + " " + "ab" * (MAX_WORD_BYTES // 2 - 1) + " xyz"
    with_cut = bpe_merges._learn([text], 500, 2)
    monkeypatch.setattr(bpe_merges, "MAX_WORD_BYTES", 10**5)
    assert bpe_merges._learn([text], 500, 2) == with_cut


def test_text_without_spaces_takes_linear_time():
    """Ten times the text may take 60 times the time (noise, logarithms); the square would be a hundred times."""
    spent = []
    for length in (20_000, 200_000):
        text = "".join(random.Random(1).choices("ACGT", k=length))
        start = os.times()
        train_bpe([text], 512)
        spent.append(os.times().children_user - start.children_user)
    assert spent[1] < 60 * max(spent[0], 0.05)


def test_a_child_that_dies_is_an_error_and_what_the_caller_raises_stays(monkeypatch):
    with pytest.raises(PortlmError, match=r"the process that learns the vocabulary died \(\d+\)"):
        learn_merges(["a"], -5, 2)

    def failing():
        yield SAMPLE
        raise KeyboardInterrupt

    before = children(os.getpid())
    with pytest.raises(KeyboardInterrupt):
        learn_merges(failing(), 300, 2)
    assert children(os.getpid()) == before
