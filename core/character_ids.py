"""Words as the characters that ELMo reads: bytes, between a beginning and an end, filled up to one length.

The numbers are those of the code released with Peters et al., 2018 (arXiv:1802.05365): 0 for what is masked, then the
bytes of UTF-8, the beginning and the end of a text, which are words of one character, the beginning and the end of a
word, and what fills it up.

T words, W characters of each.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from portlm.errors import UsageError

CHARACTERS = 262
TEXT_BEGIN, TEXT_END, WORD_BEGIN, WORD_END, FILLING = range(257, 262)
SHORTEST = 3  # a beginning, a character and an end


def character_ids(words: Sequence[str], length: int = 50) -> np.ndarray:
    """Return the characters of words, (T, W) int64. A word that is too long loses its end.

    Args:
        words: Valid Unicode; one without characters is a beginning and an end alone.
        length: W, at least 3.

    Raises:
        UsageError: The length is too small, or a word holds half of a surrogate pair.
    """
    if length < SHORTEST:
        raise UsageError(f"a word of characters is at least {SHORTEST} long, got {length}")
    found = np.full((len(words), length), FILLING, np.int64)
    for row, word in zip(found, words, strict=True):
        try:
            raw = word.encode()[: length - 2]
        except UnicodeEncodeError as error:
            raise UsageError(f"character {error.start} of a word is half of a surrogate pair") from error
        row[: len(raw) + 2] = [WORD_BEGIN, *(1 + byte for byte in raw), WORD_END]
    return found


def spelled(tokenizer: Any, ids: Sequence[int], length: int = 50) -> np.ndarray:
    """Return the characters of tokens without the text that they are of, (T, W) int64.

    A token that ends a text, or begins it, is the word of one character that stands for that; any other is spelled as
    it decodes, without spaces at its ends.

    Args:
        tokenizer: What the ids are of.
        ids: T of them.
        length: W.
    """
    ends = {tokenizer.bos_id: TEXT_BEGIN} | {tokenizer.eos_id: TEXT_END}
    found = character_ids([tokenizer.decode([index]).strip() for index in ids], length)
    for row, index in zip(found, ids, strict=True):
        if index in ends:
            row[:] = FILLING
            row[:SHORTEST] = WORD_BEGIN, ends[index], WORD_END
    return found
