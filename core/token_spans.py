"""Where in a text each of its tokens lies, in characters, and in which word."""

import re
from collections.abc import Sequence

from portlm.text_tokenizer import TextTokenizer
from portlm.tokenizer import Tokenizer

Span = tuple[int, int]
WORD = re.compile(r"\w+|[^\w\s]")  # letters and digits that stand together, or another character by itself


def token_spans(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[Span]]:
    """Return the ids of a text, without what is put around it, and the characters from which each is made.

    Spaces at either end of a token do not count, so the span of a token of spaces alone is empty. Of a character whose
    bytes lie in several tokens, each has the whole.

    Args:
        tokenizer: of the model.
        text: valid Unicode.

    Raises:
        UsageError: as `Tokenizer.encode`.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = tokenizer.spans(text) if isinstance(tokenizer, TextTokenizer) else _of_bytes(tokenizer, text, ids)
    return ids, [_trimmed(text, begin, end) for begin, end in found]


def word_of(text: str, spans: Sequence[Span]) -> list[int]:
    """Return for each token the number of the word that it lies in, or begins in; -1 for one of no word."""
    words = [match.span() for match in WORD.finditer(text)]
    found, place = [], 0
    for begin, end in spans:
        while place < len(words) and words[place][1] <= begin:
            place += 1
        inside = place < len(words) and words[place][0] < end and begin < end
        found.append(place if inside else -1)
    return found


def words(text: str) -> list[Span]:
    """Return where the words of a text lie, in order."""
    return [match.span() for match in WORD.finditer(text)]


def _of_bytes(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> list[Span]:
    """The spans of tokens that stand for bytes, by their lengths."""
    lengths = [len(tokenizer.token_bytes(index)) for index in ids]
    character = [i for i, char in enumerate(text) for _ in char.encode("utf-8", "surrogateescape")]
    place = len(character) - sum(lengths)  # -1 where a space was put before the text
    spans = []
    for length in lengths:
        begin, end = max(place, 0), place + length
        spans.append((character[begin], character[end - 1] + 1) if end > begin else (0, 0))
        place = end
    return spans


def _trimmed(text: str, begin: int, end: int) -> Span:
    while begin < end and text[begin].isspace():
        begin += 1
    while begin < end and text[end - 1].isspace():
        end -= 1
    return begin, end
