"""What a tokenizer.json may say: byte-level BPE without surprises.

The Rust library that runs these files trusts them: a merge longer than any token or a template that names a
missing token makes it panic. So nothing of a file reaches it unread. Every part is checked here against a
list of what is allowed, and written anew from the checked values.

What is allowed is what keeps two promises: a text's bytes become tokens that stand for exactly these bytes (nothing
rewrites the text; a file may add one space before it, and says so), and text alone never becomes a control token (no
merge leads to one). That covers plain byte-level BPE as it is published and what portlm trains (docs/tokenizer.md
names files); tokenizer_kinds.py reads the kinds that cannot keep the first promise.
"""

import re
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from portlm.errors import FormatError
from portlm.files import shown
from portlm.tokenizer_steps import (
    BYTE_LEVEL_KEYS,
    byte_level,
    check_normalizer,
    check_post_processor,
    check_pre_tokenizer,
    fields,
    flag,
    steps_of,
)

MAX_FILE_BYTES = 64 * 2**20
MAX_VOCAB = 2**20
MAX_TOKEN_CHARS = 4096
MAX_ADDED = 1024  # each is looked for at every position of a text
MAX_ADDED_BYTES = 256
# Of JSON: an entry of the vocabulary is one, a merge written as a pair is three, and some lie inside the tokens.
MAX_FILE_VALUES = 5 * MAX_VOCAB

TOP_KEYS = {
    "version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor",
    "decoder", "model",
}  # fmt: skip
MODEL_KEYS = {
    "type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk",
    "byte_fallback", "ignore_merges", "vocab", "merges",
}  # fmt: skip
ADDED_KEYS = {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"}


def _byte_alphabet() -> list[str]:
    """Each byte's visible character (Radford et al. 2019): itself if it prints in Latin-1, else one from U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    chars = {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + i) for i, byte in enumerate(hidden)}
    return [chars[byte] for byte in range(256)]


BYTE_TO_CHAR = _byte_alphabet()
CHAR_TO_BYTE = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}
_BYTE_LEVEL = re.compile(f"[{re.escape(''.join(BYTE_TO_CHAR))}]+")


class TokenizerFile(Struct, frozen=True):
    """A checked tokenizer.json.

    Attributes:
        vocab: BPE entries in the byte alphabet, and their ids.
        merges: pairs of entries, first merged first.
        ignore_merges: a word that is an entry as a whole is taken as it is.
        pre_tokenizer: how text is cut into words.
        special: control tokens and their ids.
        added: other tokens that are found in text before it is cut, and their ids.
        post_processor: what is put around a text that a model is asked to read.
    """

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    ignore_merges: bool
    pre_tokenizer: dict[str, Any]
    special: dict[str, int]
    added: dict[str, int]
    post_processor: dict[str, Any] | None = None

    def tokens(self) -> list[bytes]:
        """Return the bytes each id stands for."""
        literal = self.added | self.special
        table = {index: content.encode() for content, index in literal.items()}
        for entry, index in self.vocab.items():
            if entry not in literal:
                table[index] = bytes(map(CHAR_TO_BYTE.__getitem__, entry))
        return [table[index] for index in range(len(table))]

    @property
    def prefixed(self) -> bool:
        """Whether a space is put before text that does not begin with one."""
        return any(step.get("add_prefix_space") for step in steps_of(self.pre_tokenizer, "pretokenizers"))

    def with_prefix_space(self, wanted: bool) -> "TokenizerFile":
        """Return the file with or without a space before the text, where the byte level alone cuts it."""
        if self.pre_tokenizer["type"] != "ByteLevel":
            return self
        return replace(self, pre_tokenizer=self.pre_tokenizer | {"add_prefix_space": wanted})

    def document(self, runnable: bool = False) -> dict[str, Any]:
        """Return the file again, in the library's format.

        Args:
            runnable: leave out what is handled in Python, for the library to run.
        """
        added = [
            {"id": index, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": content in self.special}
            for content, index in sorted((self.added | self.special).items(), key=lambda item: item[1])
        ]  # fmt: skip
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [] if runnable else added,
            "normalizer": None,
            "pre_tokenizer": self.pre_tokenizer,
            "post_processor": None if runnable else self.post_processor,
            "decoder": byte_level(),
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": self.ignore_merges,
                "vocab": dict(sorted(self.vocab.items(), key=lambda item: item[1])),
                "merges": [list(pair) for pair in self.merges],
            },
        }


def top_of(document: object, name: str) -> dict[str, Any]:
    """Return a tokenizer.json whose version is known, and in which nothing is unknown but inside its parts."""
    top = fields(document, name, "the file", TOP_KEYS)
    if top.get("version") != "1.0":
        raise FormatError(f"{name}: version {shown(top.get('version'))} is unknown, this portlm reads 1.0")
    for key in ("truncation", "padding"):
        if not isinstance(top.get(key), dict | None):
            raise FormatError(f"{name}: {key} is neither an object nor null")
    return top


def parse(document: object, name: str) -> TokenizerFile:
    """Check a whole tokenizer.json.

    Truncation and padding are dropped: nothing is ever cut or filled silently.

    Args:
        document: the parsed JSON.
        name: what to call the file in an error.

    Raises:
        FormatError: anything outside the list of what is allowed, or a contradiction.
    """
    top = top_of(document, name)
    if not isinstance(top.get("model"), dict):
        raise FormatError(f"{name}: model is not a JSON object")
    _check_kind(top, name)
    check_normalizer(top.get("normalizer"), name)
    decoder = fields(top.get("decoder"), name, "decoder", BYTE_LEVEL_KEYS)
    if decoder.get("type") != "ByteLevel":
        raise FormatError(f"{name}: the decoder is {shown(decoder.get('type'))}, only ByteLevel is supported")
    model = fields(top["model"], name, "model", MODEL_KEYS)
    ignore_merges = _check_model_options(model, name)
    vocab = check_vocab(model.get("vocab"), name)
    merges = check_merges(model.get("merges"), vocab, name)
    special, added = _added_tokens(top.get("added_tokens", []), vocab, name)
    check_ids(vocab, special | added, name)
    _check_reach(vocab, merges, ignore_merges, special, added, name)
    return TokenizerFile(
        vocab=vocab,
        merges=merges,
        ignore_merges=ignore_merges,
        pre_tokenizer=check_pre_tokenizer(top.get("pre_tokenizer"), name),
        special=special,
        added=added,
        post_processor=check_post_processor(top.get("post_processor"), special, name),
    )


def _check_kind(top: dict[str, Any], name: str) -> None:
    """Refuse a tokenizer of another kind by its name, before something is missed that only byte-level BPE has."""
    kind = kind_of(top["model"])
    if kind == "BPE":
        return
    raise FormatError(
        f"{name}: this is a tokenizer of the kind {shown(kind)}, and portlm reads BPE, WordPiece, WordLevel and "
        "Unigram only"
    )


def kind_of(model: dict[str, Any]) -> str:
    """Return the type of a model; files from before the library wrote one show it in what else they hold."""
    if "type" in model:
        return str(model["type"])
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    return "WordPiece" if "max_input_chars_per_word" in model else "BPE"


def _check_model_options(model: dict[str, Any], name: str) -> bool:
    """Check all of the model but its vocabulary and merges; return ignore_merges."""
    if model.get("dropout"):
        raise FormatError(f"{name}: dropout makes encoding random, remove it")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key) not in (None, ""):
            raise FormatError(f"{name}: {key} is {shown(model[key])}, byte-level BPE has none")
    if not isinstance(model.get("unk_token"), str | None):
        raise FormatError(f"{name}: unk_token is neither text nor null")
    flag(model, "fuse_unk", False, name)
    if flag(model, "byte_fallback", False, name):
        raise FormatError(f"{name}: byte_fallback belongs to SentencePiece, byte-level BPE has none")
    return flag(model, "ignore_merges", False, name)


def check_vocab(value: object, name: str) -> dict[str, int]:
    """Check the entries by themselves. Some of the 256 bytes may be missing, those that no text has."""
    if not isinstance(value, dict) or not 1 <= len(value) <= MAX_VOCAB:
        raise FormatError(f"{name}: vocab must be an object of 1 to {MAX_VOCAB} entries")
    for entry, index in value.items():
        if not 1 <= len(entry) <= MAX_TOKEN_CHARS:
            raise FormatError(f"{name}: token {shown(index)} is empty or longer than {MAX_TOKEN_CHARS} bytes")
        if type(index) is not int or not 0 <= index < MAX_VOCAB:
            raise FormatError(f"{name}: token {shown(entry)} has the id {shown(index)}")
    return value


def check_merges(value: object, vocab: dict[str, int], name: str) -> list[tuple[str, str]]:
    """Check the merges, written as "a b" or ["a", "b"]: both sides and the result must be tokens."""
    if not isinstance(value, list) or len(value) > MAX_VOCAB:
        raise FormatError(f"{name}: merges must be a list of at most {MAX_VOCAB} pairs")
    merges = []
    for number, item in enumerate(value):
        pair = item.split(" ") if isinstance(item, str) else item
        if not isinstance(pair, list) or len(pair) != 2:
            raise FormatError(f"{name}: merge {number} is not a pair of tokens: {shown(item)}")
        left, right = pair
        if not isinstance(left, str) or not isinstance(right, str):
            raise FormatError(f"{name}: merge {number} is not a pair of tokens: {shown(item)}")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise FormatError(f"{name}: merge {number} needs a token that is not in vocab: {shown(item)}")
        merges.append((left, right))
    if len(set(merges)) != len(merges):
        raise FormatError(f"{name}: a merge is listed twice")
    return merges


def _added_tokens(value: object, vocab: dict[str, int], name: str) -> tuple[dict[str, int], dict[str, int]]:
    """Return the control tokens and the other added tokens."""
    if not isinstance(value, list) or len(value) > MAX_ADDED:
        raise FormatError(f"{name}: added_tokens must be a list of at most {MAX_ADDED}")
    special: dict[str, int] = {}
    added: dict[str, int] = {}
    for item in value:
        token = fields(item, name, "an added token", ADDED_KEYS)
        content, index = token.get("content"), token.get("id")
        if not isinstance(content, str) or not 1 <= len(content.encode()) <= MAX_ADDED_BYTES:
            raise FormatError(f"{name}: an added token needs a content of 1 to {MAX_ADDED_BYTES} bytes")
        if type(index) is not int or not 0 <= index < MAX_VOCAB:
            raise FormatError(f"{name}: added token {shown(content)} has the id {shown(index)}")
        if vocab.get(content, index) != index:
            raise FormatError(
                f"{name}: added token {shown(content)} has the ids {index} and {vocab[content]}"
            )
        if content in special or content in added:
            raise FormatError(f"{name}: added token {shown(content)} is listed twice")
        flags = {key: flag(token, key, False, name) for key in sorted(ADDED_KEYS - {"id", "content"})}
        if flags["special"]:
            special[content] = index
        elif flags["single_word"] or flags["lstrip"] or flags["rstrip"]:
            # Those swallow the spaces around them, or depend on them.
            raise FormatError(f"{name}: added token {shown(content)} depends on the text around it")
        else:
            added[content] = index
    return special, added


def check_ids(vocab: dict[str, int], others: dict[str, int], name: str) -> None:
    """Check that ids are 0, 1, 2, ... and that each has one meaning."""
    ids = sorted((vocab | others).values())
    if len(ids) > MAX_VOCAB:
        raise FormatError(f"{name}: {len(ids)} tokens are too many, the limit is {MAX_VOCAB}")
    for expected, index in enumerate(ids):
        if index != expected:
            problem = f"id {index} is given twice" if index < expected else f"id {expected} has no token"
            raise FormatError(f"{name}: {problem}, ids must run from 0 without a gap")


def _check_reach(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    ignore_merges: bool,
    special: dict[str, int],
    added: dict[str, int],
    name: str,
) -> None:
    """Check that BPE can write each of its entries, and none of the control tokens."""
    made = {left + right for left, right in merges}
    for content in special.keys() & vocab.keys():
        if content in made or content in CHAR_TO_BYTE or ignore_merges:
            raise FormatError(f"{name}: ordinary text could become the control token {shown(content)}")
    for entry in vocab:
        if not _BYTE_LEVEL.fullmatch(entry) and entry not in special and entry not in added:
            raise FormatError(f"{name}: token {shown(entry)} is not written in the byte alphabet")
    for content in added.keys() & vocab.keys():
        # One id, two meanings: found in text it stands for its characters, made by BPE for its bytes.
        if [CHAR_TO_BYTE.get(char) for char in content] != list(content.encode()):
            raise FormatError(f"{name}: added token {shown(content)} means other bytes in vocab")
