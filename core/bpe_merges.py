"""Which pairs of tokens a text merges: the learning of byte-level BPE, in a process of its own that can be ended.

The `tokenizers` library learns in one call, which can take minutes and in which Python sees no signal. So it runs in a
child process: Ctrl-C, or any other error in the parent, ends it. Between the two are pipes with plain data, pieces of
text to the child and JSON back. The child ends when its input does, so it does not outlive a parent that was killed.

    python -m portlm.bpe_merges SIZE MIN_FREQUENCY
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import IO

from portlm.errors import PortlmError

MAX_TOKEN_CHARS = 128  # of what is learned: runs of one character would grow for ever
# Merging inside a word takes the square of its length. Only text without spaces (base64, DNA) has such words, and
# which pairs are frequent in it hardly changes if it is cut.
MAX_WORD_BYTES = 1024

_LENGTH_BYTES = 4
_END = bytes(_LENGTH_BYTES)  # a piece without text


def learn_merges(pieces: Iterable[str], size: int, min_frequency: int) -> list[tuple[str, str]]:
    """Return the pairs to merge, in the byte alphabet and in the order they were learned.

    Args:
        pieces: the text, cut where no word is cut.
        size: of the vocabulary, the 256 bytes included.
        min_frequency: how often a pair must occur.

    Raises:
        PortlmError: the process died, for example of too little memory.
    """
    # -P: no module comes from the working folder. In a group of its own, Ctrl-C at a terminal reaches the parent alone.
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "portlm.bpe_merges", str(size), str(min_frequency)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError):  # it has died: its exit code says so
            for piece in pieces:
                _send(child.stdin, piece)
            child.stdin.write(_END)
            child.stdin.flush()  # and kept open: see _end_with
        answer = child.stdout.read()
        child.wait()
    finally:
        child.kill()
        child.wait()
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
        child.stdout.close()
    if child.returncode != 0:
        raise PortlmError(
            f"the process that learns the vocabulary died ({child.returncode}): give less text or a smaller vocabulary"
        )
    return [(left, right) for left, right in json.loads(answer)]


def _send(pipe: IO[bytes], piece: str) -> None:
    raw = piece.encode()
    if raw:
        pipe.write(len(raw).to_bytes(_LENGTH_BYTES, "little") + raw)


def _received(pipe: IO[bytes]) -> Iterator[str]:
    """Yield what was sent."""
    while (head := pipe.read(_LENGTH_BYTES)) != _END:
        size = int.from_bytes(head, "little")
        raw = pipe.read(size)
        if not head or len(raw) < size:
            raise SystemExit(1)  # the parent is gone
        yield raw.decode()


def _learn(pieces: Iterable[str], size: int, min_frequency: int) -> list[list[str]]:
    import tokenizers
    from tokenizers import pre_tokenizers

    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    long_word = tokenizers.Regex(f".{{{MAX_WORD_BYTES}}}")
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Split(long_word, "isolated")]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
        show_progress=False,
        special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=MAX_TOKEN_CHARS,
    )
    learner.train_from_iterator(pieces, trainer)
    merges: list[list[str]] = json.loads(learner.to_str())["model"]["merges"]
    return merges


def _end_with(pipe: IO[bytes]) -> None:
    """End this process as soon as nobody holds the other end of a pipe."""
    pipe.read(1)
    os._exit(1)


def _main() -> None:
    size, min_frequency = map(int, sys.argv[1:])
    source = sys.stdin.buffer

    def pieces() -> Iterator[str]:
        yield from _received(source)
        threading.Thread(target=_end_with, args=(source,), daemon=True).start()

    merges = _learn(pieces(), size, min_frequency)
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(json.dumps(merges))
        sys.stdout.flush()
    os._exit(0)  # the thread waits for the parent, which has what it wants


if __name__ == "__main__":
    _main()
