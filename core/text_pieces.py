"""Text in pieces: what is UTF-8 and what is not, and long text cut where a tokenizer cuts it in any case."""

import re
from collections.abc import Collection, Iterable, Iterator

from portlm.errors import UsageError

PIECE_CHARS = 2**16  # the library's working memory is some hundred bytes per token
CHARS_AT_ONCE = 2**20  # encoded in parallel, in a call that no signal interrupts
# Every supported way to cut words cuts here, whatever stands before and after: before a space that follows a
# visible character, before a newline that follows a letter or digit, and after a newline that stands alone. So the
# pieces give the whole's ids.
_CUT = re.compile(r"[!-~](?= )|[0-9A-Za-z](?=\n)|\S\n(?=\S)")
BETWEEN_WORDS = re.compile(r"[!-~](?= )")  # where no space is put before what follows
_NOT_UTF8 = re.compile("([\udc80-\udcff]+)")


def segments(text: str | bytes) -> Iterator[str | bytes]:
    """Cut input into valid Unicode (str) and what is not UTF-8 (bytes)."""
    if isinstance(text, str):
        try:
            raw = text.encode()
        except UnicodeEncodeError:
            try:
                raw = text.encode("utf-8", "surrogateescape")
            except UnicodeEncodeError as error:
                raise UsageError(
                    f"character {error.start} of the text is {text[error.start]!a}, half of a surrogate pair: "
                    "no bytes can hold it"
                ) from error
        else:
            yield text
            return
    else:
        raw = bytes(text)
    # Valid UTF-8 never decodes to a surrogate, so surrogates mark exactly the bytes that are not.
    for segment in _NOT_UTF8.split(raw.decode("utf-8", "surrogateescape")):
        if _NOT_UTF8.match(segment):
            yield segment.encode("utf-8", "surrogateescape")
        elif segment:
            yield segment


def cut(text: str, pattern: re.Pattern[str] = _CUT) -> Iterator[str]:
    """Cut a long text where the cut does not show; a word that would take long and much memory is cut inside.

    Args:
        text: valid Unicode.
        pattern: where. With `BETWEEN_WORDS`, for a tokenizer that would put a space before each piece, words are
            never cut, however long.
    """
    before_space = pattern is BETWEEN_WORDS
    start = 0
    while len(text) - start > PIECE_CHARS:
        longest = len(text) if before_space else start + CHARS_AT_ONCE
        found = pattern.search(text, start + PIECE_CHARS - 1, longest)
        end = longest if found is None else found.end()
        if end >= len(text):
            break
        yield text[start:end]
        start = end
    yield text[start:]


def groups(pieces: Iterable[str]) -> Iterator[list[str]]:
    """Join pieces to lists of about the size that is encoded at once."""
    group: list[str] = []
    for piece in pieces:
        group.append(piece)
        if sum(map(len, group)) >= CHARS_AT_ONCE:
            yield group
            group = []
    if group:
        yield group


def splitter(tokens: Collection[str]) -> re.Pattern[str] | None:
    """Return a pattern that finds the tokens in text, the longest where several begin."""
    if not tokens:
        return None
    return re.compile(f"({'|'.join(re.escape(t) for t in sorted(tokens, key=lambda t: (-len(t), t)))})")
