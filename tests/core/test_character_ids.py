"""Words as characters: the numbers of the code released with ELMo, and what a word of fifty holds."""

import numpy as np
import pytest

from portlm.character_ids import CHARACTERS, character_ids, spelled
from portlm.errors import UsageError
from portlm.text_tokenizer import words_at_spaces
from portlm.tokenizer import byte_tokenizer


def test_a_word_is_its_bytes_between_a_beginning_and_an_end():
    """By the released code: bytes, 258 and 259 around a word, 260 behind it; all one more, for 0 to be a mask."""
    (word,) = character_ids(["caf\u00e9"], 10)
    assert word.tolist() == [
        259,
        1 + ord("c"),
        1 + ord("a"),
        1 + ord("f"),
        1 + 0xC3,
        1 + 0xA9,
        260,
        261,
        261,
        261,
    ]
    assert character_ids([""], 3).tolist() == [[259, 260, 261]]
    assert character_ids([], 3).shape == (0, 3)


def test_a_long_word_loses_its_end_and_keeps_its_length():
    found = character_ids(["x" * 80, "x" * 48, "x" * 49])
    assert found.shape == (3, 50)
    assert np.array_equal(found[0], found[1])
    assert found[0].tolist() == [259, *[1 + ord("x")] * 48, 260]
    assert found.max() < CHARACTERS


def test_tokens_are_spelled_as_they_decode_and_the_end_of_a_text_is_a_word_of_its_own():
    words = words_at_spaces(["[UNK]", "the", "cat"])
    assert np.array_equal(spelled(words, [2, 1], 8), character_ids(["cat", "the"], 8))
    with_end = byte_tokenizer("<|endoftext|>")
    assert spelled(with_end, [ord("a"), 256], 5).tolist() == [
        [259, 1 + ord("a"), 260, 261, 261],
        [259, 258, 260, 261, 261],
    ]


@pytest.mark.parametrize(
    ("words", "length", "message"), [(["a"], 2, "at least 3 long, got 2"), (["\ud800"], 5, "half")]
)
def test_what_cannot_be_spelled_is_refused(words, length, message):
    with pytest.raises(UsageError, match=message):
        character_ids(words, length)
