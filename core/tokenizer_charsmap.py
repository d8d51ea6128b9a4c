"""SentencePiece's compiled character map: which characters a normalizer replaces, as a double-array trie in base64.

The library that walks it (spm_precompiled, after Aoe 1989's double array as in Darts) checks no index, so each
that it can reach is checked here.

    little-endian uint32 size of the trie in bytes | the trie's uint32 units | texts in UTF-8, each ended by a NUL
"""

import base64
import binascii

import numpy as np

from portlm.errors import FormatError

MAX_CHARSMAP_BYTES = 8 * 2**20


def check_charsmap(value: object, name: str) -> str:
    """Return a map whose every step stays inside it.

    Raises:
        FormatError: the text is no base64, too long, cut short, or leads outside its trie or its texts.
    """
    if not isinstance(value, str) or len(value) > MAX_CHARSMAP_BYTES:
        raise FormatError(
            f"{name}: precompiled_charsmap must be base64 of at most {MAX_CHARSMAP_BYTES} characters"
        )
    try:
        raw = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(f"{name}: precompiled_charsmap is no base64") from error
    size = int.from_bytes(raw[:4], "little")
    if len(raw) < 8 or size < 4 or size % 4 or size > len(raw) - 4:
        raise FormatError(f"{name}: precompiled_charsmap is cut short: a trie of {size} bytes in {len(raw)}")
    texts = raw[4 + size :]
    try:
        texts.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{name}: precompiled_charsmap holds text that is not UTF-8") from error
    units = np.frombuffer(raw, "<u4", size // 4, 4).astype(np.int64)
    # A unit: bit 31 marks a value; else bits 0-7 are its label, bit 8 says that it ends a key, the rest its offset.
    node = np.flatnonzero(
        (units < 2**31) | (np.arange(len(units)) == 0)
    )  # the root is entered whatever it says
    offset = (units[node] >> 10) << ((units[node] & 512) >> 6)
    base = node ^ offset
    if (base | 255).max(initial=0) >= len(units):
        raise FormatError(f"{name}: precompiled_charsmap leads outside its trie")
    values = units[base[(units[node] & 256) > 0]] & (2**31 - 1)
    starts = np.frombuffer(texts + b"\0", np.uint8) & 0xC0 != 0x80  # where a character begins, or all ends
    if values.max(initial=0) > len(texts) or not starts[values].all():
        raise FormatError(f"{name}: precompiled_charsmap leads outside its texts")
    return value
