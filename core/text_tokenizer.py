"""Tokenizers of text, not bytes: WordPiece, whole words, Unigram, SentencePiece's BPE, byte-level BPE that normalizes.

The `tokenizers` library turns text into ids, with a file that was checked in full (tokenizer_kinds.py). What it cannot
do is here: ids become text token by token, in one way whether they come all at once or as they are generated, and text
that spells a control token stays text. Decoding follows the library's decoders to the character.

What such a tokenizer rewrites is lost: `decode(encode(text))` is its normal form of the text.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec.structs import replace

from portlm.errors import FormatError, UsageError
from portlm.files import shown
from portlm.text_pieces import BETWEEN_WORDS, cut, groups
from portlm.tokenizer import StreamDecoder, Tokenizer, build_library, is_panic
from portlm.tokenizer_file import CHAR_TO_BYTE, MAX_VOCAB
from portlm.tokenizer_kinds import AT_SPACES, TextFile, parse_text
from portlm.tokenizer_steps import SPLIT_PATTERNS, ids_around, steps_of, template

if TYPE_CHECKING:
    import tokenizers

UNKNOWN = "[UNK]"  # what stands for a word that a vocabulary lacks
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CLEANED = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
    (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


class TextTokenizer(Tokenizer):
    """A tokenizer of text. Made by `Tokenizer.load` or from words (below).

    Its attributes are those of `Tokenizer`, and one more.

    Attributes:
        unknown_id: the id of what has no token, or None.
    """

    def __init__(self, file: TextFile, eos: str | None = None, bos: str | None = None):
        self._text_file = file
        self._eos, self._bos = eos, bos
        self._control = frozenset(file.special.values())
        self.vocab_size = len(file.tokens)
        self.special = dict(file.special)
        self.unknown_id = file.unknown
        self.eos_id = None if eos is None else file.special[eos]
        self.bos_id = None if bos is None else file.special[bos]
        self._post_processor = file.post_processor
        self.begin_ids, self.end_ids = ids_around(file.post_processor, file.special)
        plain = file.plain_document()
        self._plain = build_library(json.dumps(plain))
        self._plain.encode_special_tokens = True
        for token in plain["added_tokens"]:
            if (index := self._plain.token_to_id(token["content"])) != token["id"]:
                raise FormatError(
                    f"tokenizer.json gives {shown(token['content'])} the id {token['id']}, the library {index}"
                )

    @cached_property
    def _names(self) -> list[str]:
        """What each id is called when it is written: a token that is found in normal text, in its normal form."""
        names, normalizer = list(self._text_file.tokens), self._plain.normalizer
        for token in self._text_file.added if normalizer is not None else ():
            if token["normalized"]:
                names[token["id"]] = normalizer.normalize_str(token["content"])
        return names

    @cached_property
    def _whole(self) -> "tokenizers.Tokenizer":
        """The library's tokenizer that finds control tokens in text."""
        return build_library(self.to_json())

    def without_template(self) -> "Tokenizer":
        """Return the same tokenizer, which puts nothing around a text."""
        return TextTokenizer(replace(self._text_file, post_processor=None), self._eos, self._bos)

    def within(self, vocab_size: int) -> "Tokenizer":
        """As `Tokenizer.within`."""
        if self.vocab_size <= vocab_size:
            return self
        file = self._text_file.within(vocab_size)
        if file is None or max([*self.begin_ids, *self.end_ids, 0]) >= vocab_size:
            raise FormatError(
                f"the tokenizer has {self.vocab_size} tokens and the model {vocab_size}, and text becomes some of the "
                "others, so they do not belong together"
            )
        file = parse_text(file.document(), "the tokenizer of the model")
        eos, bos = (name if name in file.special else None for name in (self._eos, self._bos))
        return TextTokenizer(file, eos, bos)

    def to_json(self) -> str:
        """Return tokenizer.json."""
        return json.dumps(self._text_file.document(), ensure_ascii=False, separators=(",", ":")) + "\n"

    def encode_pieces(self, text: str | bytes, special: bool = False) -> Iterator[list[int]]:
        """Yield ids piece by piece, where the kind of the tokenizer lets a text be cut; else all at once.

        Raises:
            UsageError: the text is not UTF-8, or holds a byte that has no token.
            FormatError: the library cannot work with this file.
        """
        whole = _text_of(text)
        library = self._whole if special else self._plain
        if self._without_token is not None:
            normal = library.normalizer.normalize_str(whole) if library.normalizer else whole
            self._refuse(normal.encode())
        if not whole:
            return
        where = self._cuts[special]
        pieces = [whole] if where is None else cut(whole, where)
        for group in groups(pieces):
            try:
                encodings = library.encode_batch_fast(group, add_special_tokens=False)
            except BaseException as error:
                if isinstance(error, Exception) or is_panic(error):
                    raise FormatError(
                        f"the tokenizers library cannot encode with this file: {error!s:.200}"
                    ) from error
                raise
            for encoding in encodings:
                yield encoding.ids

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Return where in a text each of its tokens begins and ends, in characters.

        Raises:
            UsageError: the text is not Unicode.
        """
        found: list[tuple[int, int]] = self._plain.encode(_text_of(text), add_special_tokens=False).offsets
        return found

    @cached_property
    def _cuts(self) -> tuple[re.Pattern[str] | None, re.Pattern[str] | None]:
        """Where a long text may be cut without changing its ids, if anywhere, without and with control tokens in it."""
        file, where = self._text_file, None
        steps = [] if file.pre_tokenizer is None else steps_of(file.pre_tokenizer, "pretokenizers")
        normal = None if file.normalizer is None else file.normalizer["type"]
        by_words = any(step["type"] in AT_SPACES for step in steps) and normal in (
            None,
            "BertNormalizer",
        )
        of_bytes = file.byte_level and normal in (None, "NFC") and all(map(_is_usual, steps))
        if by_words or of_bytes:
            where = BETWEEN_WORDS
        looks_around = [token for token in file.added if _looks_around(token)]
        return None if any(
            not token["special"] for token in looks_around
        ) else where, None if looks_around else where

    @cached_property
    def _without_token(self) -> re.Pattern[bytes] | None:  # type: ignore[override]
        """Finds bytes that have no token, which the library would leave out."""
        if not self._text_file.byte_level or self.unknown_id is not None:
            return None
        vocab = set(self._text_file.tokens)
        missing = bytes(byte for char, byte in CHAR_TO_BYTE.items() if char not in vocab)
        return re.compile(b"[" + re.escape(missing) + b"]") if missing else None

    @cached_property
    def _tokens(self) -> list[bytes]:  # type: ignore[override]
        """The bytes of each id, where tokens are bytes; of one that is written otherwise, its name."""
        return [
            bytes(map(CHAR_TO_BYTE.__getitem__, name))
            if all(char in CHAR_TO_BYTE for char in name)
            else name.encode()
            for name in self._names
        ]

    def decode_bytes(self, ids: Sequence[int] | np.ndarray, skip_special: bool = False) -> bytes:
        """Return the text that ids stand for, in UTF-8.

        Raises:
            UsageError: an id is outside the vocabulary.
        """
        if self._text_file.byte_level:
            return super().decode_bytes(ids, skip_special)
        decoder = self.stream_decoder(skip_special)
        pieces = [decoder.push(int(index)) for index in ids]
        return "".join([*pieces, decoder.finish()]).encode()

    def stream_decoder(self, skip_special: bool = False) -> "StreamDecoder":
        """Return a decoder that takes one id at a time."""
        return (
            StreamDecoder(self, skip_special)
            if self._text_file.byte_level
            else PieceDecoder(self, skip_special)
        )

    @cached_property
    def spelling(self) -> "Spelling":
        """How tokens are written."""
        return Spelling(self._text_file.decoder)

    def names(self) -> list[str]:
        """Return what tokenizer.json calls each id."""
        return list(self._text_file.tokens)

    def token_name(self, token: int) -> str:
        """Return what an id is called, before its text is made of that.

        Raises:
            UsageError: the id is outside the vocabulary.
        """
        if not 0 <= token < self.vocab_size:
            raise UsageError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
        return self._names[token]

    def is_control(self, token: int) -> bool:
        """Whether an id is a control token."""
        return token in self._control


class Spelling:
    """How the tokens of a checked decoder are written, each by itself.

    Attributes:
        first: the text of the first token.
        later: the text of another.
        last: the text of the last token instead, where that differs.
        as_bytes: whether tokens such as <0x0A> are bytes.
        strip: a character, and how many of it are taken from the beginning of the whole text.
    """

    def __init__(self, decoder: dict[str, Any] | None):
        self.first: Callable[[str], str] = str
        self.later: Callable[[str], str] = lambda token: f" {token}"
        self.last: Callable[[str], str] | None = None
        self.as_bytes, self.strip = False, (" ", 0)
        if decoder is None:
            return
        match decoder["type"]:
            case "Metaspace":
                mark, scheme = decoder["replacement"], decoder["prepend_scheme"]
                self.later = lambda token: token.replace(mark, " ")
                self.first = self.later if scheme == "never" else lambda token: token.replace(mark, "")
            case "WordPiece":
                prefix, clean = decoder["prefix"], _cleaned if decoder["cleanup"] else str
                self.first = clean
                self.later = lambda token: clean(
                    token[len(prefix) :] if token.startswith(prefix) else f" {token}"
                )
            case "BPEDecoder":
                suffix = decoder["suffix"]
                self.first = self.later = lambda token: token.replace(suffix, " ")
                self.last = lambda token: token.replace(suffix, "")
            case _:
                steps = decoder["decoders"]
                pairs = [(s["pattern"]["String"], s["content"]) for s in steps if s["type"] == "Replace"]
                self.first = self.later = lambda token: _replaced(token, pairs)
                self.as_bytes = any(step["type"] == "ByteFallback" for step in steps)
                for step in steps:
                    if step["type"] == "Strip":
                        self.strip = step["content"], step["start"]


def _cleaned(token: str) -> str:
    """Take out the spaces that English has none of, as the library's WordPiece decoder does."""
    for spaced, plain in _CLEANED:
        token = token.replace(spaced, plain)
    return token


def _replaced(token: str, pairs: list[tuple[str, str]]) -> str:
    for old, new in pairs:
        token = token.replace(old, new)
    return token


class PieceDecoder(StreamDecoder):
    """Text as it grows, of a tokenizer whose tokens are pieces of text.

    Bytes in tokens of their own (<0xE2>) become text when the run of them ends, for the library writes U+FFFD for each
    of a run if any of them is wrong.
    """

    def __init__(self, tokenizer: TextTokenizer, skip_special: bool = False):
        self._of, self._skip = tokenizer, skip_special
        self._begin()

    def _begin(self) -> None:
        self._bytes, self._begun = bytearray(), False
        self._held: str | None = None
        self._strip = self._of.spelling.strip[1]

    def push(self, token: int) -> str:
        """As `StreamDecoder.push`."""
        name, spelling = self._of.token_name(token), self._of.spelling
        if self._skip and self._of.is_control(token):
            return ""
        write = spelling.later if self._begun else spelling.first
        self._begun = True
        if spelling.last is not None:  # what the last one is shows when no other follows
            before, self._held = self._held, name
            return "" if before is None else write(before)
        if spelling.as_bytes:
            # The library replaces before it looks for bytes; no replacement makes one of another token.
            name = write(name)
            if found := _BYTE_TOKEN.fullmatch(name):
                self._bytes.append(int(found[1], 16))
                return ""
            return self._stripped(self._run() + name)
        return self._stripped(write(name))

    def finish(self) -> str:
        """As `StreamDecoder.finish`."""
        rest = self._run()
        if self._held is not None and self._of.spelling.last is not None:
            rest += self._of.spelling.last(self._held)
        text = self._stripped(rest)
        self._begin()
        return text

    def _run(self) -> str:
        """Return the text of the bytes that have come together."""
        raw, self._bytes = bytes(self._bytes), bytearray()
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(raw)

    def _stripped(self, text: str) -> str:
        """Take from the beginning of the whole text what its decoder takes."""
        while self._strip and text:
            if text[0] != self._of.spelling.strip[0]:
                self._strip = 0
                break
            text, self._strip = text[1:], self._strip - 1
        return text


def _is_usual(step: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer cuts before a space in any case."""
    return step["type"] in ("ByteLevel", "Digits") or step.get("pattern", {}).get("Regex") in SPLIT_PATTERNS


def _looks_around(token: dict[str, Any]) -> bool:
    """Whether finding an added token depends on what is beside a space."""
    return (
        token["lstrip"] or token["rstrip"] or token["single_word"] or bool(re.search(r"\s", token["content"]))
    )


def _text_of(text: str | bytes) -> str:
    """Return text as it is, or from bytes, if it is Unicode."""
    try:
        if isinstance(text, bytes | bytearray):
            return bytes(text).decode()
        text.encode()
    except UnicodeError as error:
        raise UsageError(
            f"this model's tokenizer reads text, and what stands at {error.start} is no Unicode: "  # type: ignore[attr-defined]
            "only a byte-level tokenizer takes any bytes"
        ) from error
    return text


def train_words(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Take the most frequent words of some texts as a vocabulary. The same texts give the same tokenizer.

    Letters, digits and underscores that stand together are a word, and so are other visible characters that do. Case
    counts. Id 0 is [UNK], which stands for every word that is left out; then come the words, the most frequent first,
    those that are equally frequent in the order of their characters.

    Args:
        texts: what to count in.
        vocab_size: V, [UNK] included.

    Raises:
        UsageError: the vocabulary is too small, or larger than the texts have words.
    """
    import tokenizers

    if not 2 <= vocab_size <= MAX_VOCAB:
        raise UsageError(f"a vocabulary of {vocab_size} words is not possible: give 2 to {MAX_VOCAB}")
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token=UNKNOWN))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.WordLevelTrainer(
        vocab_size=vocab_size, min_frequency=0, special_tokens=[UNKNOWN], show_progress=False
    )
    pieces = (piece for text in texts for piece in cut(_text_of(text), BETWEEN_WORDS))
    library.train_from_iterator(pieces, trainer)
    if (found := library.get_vocab_size()) < vocab_size:
        raise UsageError(
            f"a vocabulary of {vocab_size} words is more than this text has, which is {found} with {UNKNOWN}: ask for "
            f"at most {found} or give more text"
        )
    return TextTokenizer(parse_text(json.loads(library.to_str()), "the new tokenizer"))


def words_at_spaces(
    words: Sequence[str], unknown: str = UNKNOWN, bos: str | None = None, eos: str | None = None
) -> TextTokenizer:
    """Make a tokenizer of words that a text has between its spaces, whatever characters they are made of.

    Args:
        words: each once, without spaces, in the order of their ids.
        unknown: the one among them that stands for all others.
        bos: the one that is put before a text, if any.
        eos: the one that ends a text, if any.

    Raises:
        FormatError: words are too many or too long, or `unknown` is not among them.
    """
    vocab = {word: index for index, word in enumerate(words)}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    document = {
        "version": "1.0",
        "added_tokens": [
            {"id": index, "content": name, **plain}
            for index, name in sorted((vocab.get(name, 0), name) for name in (unknown, bos, eos) if name)
        ],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None if bos is None else template([bos], [], vocab),
        "model": {"type": "WordLevel", "unk_token": unknown, "vocab": vocab},
    }
    return TextTokenizer(parse_text(document, "the new tokenizer"), eos, bos)
