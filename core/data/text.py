"""Text files, read strictly: a model should not learn from replacement characters nobody noticed."""

import os

from portlm.errors import FormatError, UsageError
from portlm.files import open_regular

_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a whole UTF-8 file, every byte as it is: no newline is translated and no byte-order mark dropped.

    Raises:
        FormatError: the file is missing, empty, unreadable, no regular file, or not UTF-8; the message then
            names the offset of the first byte that is wrong.
    """
    with open_regular(path) as file:
        try:
            raw = file.read()
        except OSError as error:
            raise FormatError(f"{path} cannot be read: {error.strerror}") from error
    if not raw:
        raise FormatError(f"{path} is empty: there is no text to read")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        cure = (
            "convert it with iconv -f UTF-16 -t UTF-8" if raw[:2] in _UTF16 else "convert it to UTF-8 first"
        )
        raise FormatError(
            f"{path} is not UTF-8 text: byte {error.start} is 0x{raw[error.start]:02x} ({error.reason}), {cure}"
        ) from error


def split_text(text: str, held_out: float = 0.1) -> tuple[str, str]:
    """Cut a text in two: the first part to train on, the last `held_out` of its bytes to judge by.

    The cut is counted in UTF-8 bytes and falls before the character that contains it, so the parts joined are
    the text. It depends on nothing but the text and the fraction: every tokenizer is judged on the same
    bytes.

    Args:
        text: any text.
        held_out: fraction for the second part, 0 <= held_out < 1.

    Raises:
        UsageError: the fraction is out of range or leaves one part empty, or the text is not valid Unicode.
    """
    if not 0 <= held_out < 1:
        raise UsageError(f"the held-out fraction is {held_out}: give a number from 0 to less than 1")
    try:
        raw = text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"character {error.start} of the text is half of a surrogate pair") from error
    cut = len(raw) - int(len(raw) * held_out)
    while cut < len(raw) and raw[cut] & 0xC0 == 0x80:  # inside a character
        cut -= 1
    if cut == 0 or (held_out > 0 and cut == len(raw)):
        raise UsageError(
            f"a text of {len(raw)} bytes cannot hold out a fraction of {held_out}: give more text"
        )
    return raw[:cut].decode(), raw[cut:].decode()
