"""What a tokenizer.json may say: byte-level BPE without surprises.

The Rust library that runs these files trusts them: a merge longer than any token or a template that names a
missing token makes it panic. So nothing of a file reaches it unread. Every part is checked here against a
list of what is allowed, and written anew from the checked values.

What is allowed is what keeps two promises: every byte string encodes and decodes to itself (all 256 byte
tokens exist, nothing rewrites the text), and text alone never becomes a control token (no merge leads to
one). That covers byte-level BPE as it is published today and what portlm trains (docs/tokenizer.md names files).
SentencePiece files normalise spaces and are refused.
"""

import re
from dataclasses import dataclass
from typing import Any

from portlm.errors import FormatError
from portlm.files import shown

MAX_FILE_BYTES = 64 * 2**20
MAX_VOCAB = 2**20
MAX_TOKEN_CHARS = 4096
MAX_ADDED = 1024  # each is looked for at every position of a text
MAX_ADDED_BYTES = 256

# Splitting patterns by name, since an arbitrary one could backtrack for ever.
SPLIT_PATTERNS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "cl100k_base"
}

_TOP_KEYS = {
    "version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor",
    "decoder", "model",
}  # fmt: skip
_MODEL_KEYS = {
    "type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk",
    "byte_fallback", "ignore_merges", "vocab", "merges",
}  # fmt: skip
_ADDED_KEYS = {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"}
_BYTE_LEVEL_KEYS = {"type", "add_prefix_space", "trim_offsets", "use_regex"}


def _byte_alphabet() -> list[str]:
    """Each byte's visible character (Radford et al. 2019): itself if it prints in Latin-1, else one from U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    chars = {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + i) for i, byte in enumerate(hidden)}
    return [chars[byte] for byte in range(256)]


BYTE_TO_CHAR = _byte_alphabet()
CHAR_TO_BYTE = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}
_BYTE_LEVEL = re.compile(f"[{re.escape(''.join(BYTE_TO_CHAR))}]+")


@dataclass(frozen=True)
class TokenizerFile:
    """A checked tokenizer.json.

    Attributes:
        vocab: BPE entries in the byte alphabet, and their ids.
        merges: pairs of entries, first merged first.
        ignore_merges: a word that is an entry as a whole is taken as it is.
        pre_tokenizer: how text is cut into words.
        special: control tokens and their ids.
        added: other tokens that are found in text before it is cut, and their ids.
        post_processor: what transformers puts around a text; kept for it, never applied here.
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


def byte_level(use_regex: bool = True) -> dict[str, Any]:
    """Return the byte-level step; with `use_regex` it also cuts words (Radford et al. 2019)."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def parse(document: object, name: str) -> TokenizerFile:
    """Check a whole tokenizer.json.

    Truncation and padding are dropped: nothing is ever cut or filled silently.

    Args:
        document: the parsed JSON.
        name: what to call the file in an error.

    Raises:
        FormatError: anything outside the list of what is allowed, or a contradiction.
    """
    top = _dict(document, name, "the file", _TOP_KEYS)
    if top.get("version") != "1.0":
        raise FormatError(f"{name}: version {shown(top.get('version'))} is unknown, this portlm reads 1.0")
    for key in ("truncation", "padding"):
        if not isinstance(top.get(key), dict | None):
            raise FormatError(f"{name}: {key} is neither an object nor null")
    if top.get("normalizer") is not None:
        raise FormatError(
            f"{name}: a normalizer rewrites text, so what is decoded would not be what was encoded"
        )
    decoder = _dict(top.get("decoder"), name, "decoder", _BYTE_LEVEL_KEYS)
    if decoder.get("type") != "ByteLevel":
        raise FormatError(f"{name}: the decoder is {shown(decoder.get('type'))}, only ByteLevel is supported")
    model = _dict(top.get("model"), name, "model", _MODEL_KEYS)
    ignore_merges = _check_model_options(model, name)
    vocab = _vocab(model.get("vocab"), name)
    merges = _merges(model.get("merges"), vocab, name)
    special, added = _added_tokens(top.get("added_tokens", []), vocab, name)
    _check_ids(vocab, special | added, name)
    _check_reach(vocab, merges, ignore_merges, special, added, name)
    return TokenizerFile(
        vocab=vocab,
        merges=merges,
        ignore_merges=ignore_merges,
        pre_tokenizer=_pre_tokenizer(top.get("pre_tokenizer"), name),
        special=special,
        added=added,
        post_processor=_post_processor(top.get("post_processor"), special, name),
    )


def _dict(value: object, name: str, what: str, keys: set[str]) -> dict[str, Any]:
    """Return an object that has no key outside the list."""
    if not isinstance(value, dict):
        raise FormatError(f"{name}: {what} is not a JSON object")
    unknown = value.keys() - keys
    if unknown:
        raise FormatError(f"{name}: {what} has the unknown entry {shown(min(unknown))}")
    return value


def _flag(holder: dict[str, Any], key: str, default: bool, name: str) -> bool:
    """Return an optional true or false."""
    value = holder.get(key, default)
    if not isinstance(value, bool):
        raise FormatError(f"{name}: {key} is {shown(value)}, not true or false")
    return value


def _check_model_options(model: dict[str, Any], name: str) -> bool:
    """Check all of the model but its vocabulary and merges; return ignore_merges."""
    if model.get("type", "BPE") != "BPE":  # files from before the library wrote a type are BPE
        raise FormatError(f"{name}: the model is {shown(model['type'])}, only byte-level BPE is supported")
    if model.get("dropout"):
        raise FormatError(f"{name}: dropout makes encoding random, remove it")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key) not in (None, ""):
            raise FormatError(f"{name}: {key} is {shown(model[key])}, byte-level BPE has none")
    if not isinstance(model.get("unk_token"), str | None):
        raise FormatError(f"{name}: unk_token is neither text nor null")
    _flag(model, "fuse_unk", False, name)
    if _flag(model, "byte_fallback", False, name):
        raise FormatError(f"{name}: byte_fallback belongs to SentencePiece, only byte-level BPE is supported")
    return _flag(model, "ignore_merges", False, name)


def _vocab(value: object, name: str) -> dict[str, int]:
    """Check the entries by themselves, and that all 256 bytes are among them."""
    if not isinstance(value, dict) or not 256 <= len(value) <= MAX_VOCAB:
        raise FormatError(f"{name}: vocab must have 256 to {MAX_VOCAB} entries, the bytes first of all")
    for entry, index in value.items():
        if not 1 <= len(entry) <= MAX_TOKEN_CHARS:
            raise FormatError(f"{name}: token {shown(index)} is empty or longer than {MAX_TOKEN_CHARS} bytes")
        if type(index) is not int or not 0 <= index < MAX_VOCAB:
            raise FormatError(f"{name}: token {shown(entry)} has the id {shown(index)}")
    missing = [byte for byte, char in enumerate(BYTE_TO_CHAR) if char not in value]
    if missing:
        raise FormatError(
            f"{name}: byte 0x{missing[0]:02x} has no token (of {len(missing)} bytes): this is not byte-level BPE"
        )
    return value


def _merges(value: object, vocab: dict[str, int], name: str) -> list[tuple[str, str]]:
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
        token = _dict(item, name, "an added token", _ADDED_KEYS)
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
        flags = {key: _flag(token, key, False, name) for key in sorted(_ADDED_KEYS - {"id", "content"})}
        if flags["special"]:
            special[content] = index
        elif flags["single_word"] or flags["lstrip"] or flags["rstrip"]:
            # Those swallow the spaces around them, or depend on them.
            raise FormatError(f"{name}: added token {shown(content)} depends on the text around it")
        else:
            added[content] = index
    return special, added


def _check_ids(vocab: dict[str, int], others: dict[str, int], name: str) -> None:
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


def _pre_tokenizer(value: object, name: str) -> dict[str, Any]:
    """Check how text is cut into words: steps that only cut, then the byte level."""
    steps = [value]
    if isinstance(value, dict) and value.get("type") == "Sequence":
        steps = _dict(value, name, "pre_tokenizer", {"type", "pretokenizers"}).get("pretokenizers") or [None]
        if not isinstance(steps, list) or len(steps) > 4:
            raise FormatError(f"{name}: a sequence of pre-tokenizers has 1 to 4 steps")
    checked = [_pre_tokenizer_step(step, name) for step in steps]
    if [step["type"] == "ByteLevel" for step in checked] != [False] * (len(checked) - 1) + [True]:
        raise FormatError(f"{name}: the last pre-tokenizer, and no other, must be ByteLevel")
    return checked[0] if len(checked) == 1 else {"type": "Sequence", "pretokenizers": checked}


def _pre_tokenizer_step(value: object, name: str) -> dict[str, Any]:
    """Check one step and return it as the library writes it."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "ByteLevel":
        step = _dict(value, name, "pre_tokenizer", _BYTE_LEVEL_KEYS)
        _flag(step, "trim_offsets", True, name)
        if _flag(step, "add_prefix_space", True, name):
            raise FormatError(f"{name}: add_prefix_space changes the text, only false is supported")
        return byte_level(_flag(step, "use_regex", True, name))
    if kind == "Digits":
        step = _dict(value, name, "pre_tokenizer", {"type", "individual_digits"})
        return {"type": "Digits", "individual_digits": _flag(step, "individual_digits", False, name)}
    if kind == "Split":
        step = _dict(value, name, "pre_tokenizer", {"type", "pattern", "behavior", "invert"})
        pattern = _dict(step.get("pattern"), name, "the split pattern", {"Regex"}).get("Regex")
        if not isinstance(pattern, str) or pattern not in SPLIT_PATTERNS:
            known = ", ".join(SPLIT_PATTERNS.values())
            raise FormatError(
                f"{name}: the split pattern {shown(pattern)} is unknown, known is that of {known}"
            )
        if step.get("behavior") != "Isolated" or _flag(step, "invert", False, name):
            raise FormatError(f"{name}: a split must be Isolated and not inverted")
        return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    raise FormatError(f"{name}: the pre-tokenizer {shown(kind)} is none of ByteLevel, Digits and Split")


def _post_processor(value: object, special: dict[str, int], name: str) -> dict[str, Any] | None:
    """Check what transformers will put around a text; every token in it must be a control token."""
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "Sequence":
        steps = _dict(value, name, "post_processor", {"type", "processors"}).get("processors")
        if not isinstance(steps, list) or not 1 <= len(steps) <= 4:
            raise FormatError(f"{name}: a sequence of post-processors has 1 to 4 steps")
        if any(isinstance(step, dict) and step.get("type") == "Sequence" for step in steps):
            raise FormatError(f"{name}: a post-processor may not nest sequences")
        return {"type": kind, "processors": [_post_processor(step or {}, special, name) for step in steps]}
    if kind == "ByteLevel":
        step = _dict(value, name, "post_processor", _BYTE_LEVEL_KEYS)
        return {"type": kind} | {
            key: _flag(step, key, True, name) for key in sorted(_BYTE_LEVEL_KEYS - {"type"})
        }
    if kind == "TemplateProcessing":
        return _template(
            _dict(value, name, "post_processor", {"type", "single", "pair", "special_tokens"}), special, name
        )
    raise FormatError(f"{name}: the post-processor {shown(kind)} is none of ByteLevel and TemplateProcessing")


def _template(value: dict[str, Any], special: dict[str, int], name: str) -> dict[str, Any]:
    """Check a template such as: <bos> $A."""
    declared = value.get("special_tokens")
    if not isinstance(declared, dict):
        raise FormatError(f"{name}: the template's special_tokens is not an object")
    for token, entry in declared.items():
        if token not in special or entry != {"id": token, "ids": [special[token]], "tokens": [token]}:
            raise FormatError(
                f"{name}: the template's token {shown(token)} is not the control token of that name"
            )
    result: dict[str, Any] = {"type": "TemplateProcessing"}
    for key in ("single", "pair"):
        pieces = value.get(key)
        if not isinstance(pieces, list) or not 1 <= len(pieces) <= 16:
            raise FormatError(f"{name}: the template {key} needs 1 to 16 pieces")
        used = [_template_piece(piece, declared, f"{name}: the template {key}") for piece in pieces]
        if {"A", "B"} & set(used) != ({"A"} if key == "single" else {"A", "B"}):
            raise FormatError(f"{name}: the template {key} does not hold the texts it is for")
        result[key] = pieces
    return result | {"special_tokens": declared}


def _template_piece(piece: object, declared: dict[str, Any], where: str) -> str | None:
    """Check one piece of a template; return which text it stands for, if any."""
    if not isinstance(piece, dict) or len(piece) != 1:
        raise FormatError(f"{where} has a malformed piece")
    kind, body = next(iter(piece.items()))
    if not isinstance(body, dict) or body.keys() != {"id", "type_id"} or not isinstance(body["id"], str):
        raise FormatError(f"{where} has a malformed piece")
    if type(body["type_id"]) is not int or not 0 <= body["type_id"] < 2**31:
        raise FormatError(f"{where} has the type_id {shown(body['type_id'])}")
    if kind == "Sequence" and body["id"] in ("A", "B"):
        return body["id"]
    if kind == "SpecialToken" and body["id"] in declared:
        return None
    raise FormatError(f"{where} names {shown(body['id'])}, which is not declared")
