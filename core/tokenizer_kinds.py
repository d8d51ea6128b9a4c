"""What a tokenizer.json of another kind than plain byte-level BPE may say: how text is rewritten, cut and put together.

These are the tokenizers that lose something of a text or spell it in pieces that are no bytes: SentencePiece's BPE
(LLaMA 2, Gemma) and Unigram (T5), WordPiece (BERT), WordLevel (whole words), BPE with an end of word (GPT), and
byte-level BPE that normalizes (Qwen, GPT-NeoX) or whose added tokens look at what stands around them (RoBERTa). As in
tokenizer_file.py nothing of a file reaches the library unread: each part is checked against a list of what is allowed
and written anew.
"""

import math
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from portlm.errors import FormatError
from portlm.files import shown
from portlm.tokenizer_file import (
    ADDED_KEYS,
    MAX_ADDED_BYTES,
    MAX_TOKEN_CHARS,
    MAX_VOCAB,
    MODEL_KEYS,
    TokenizerFile,
    check_ids,
    check_merges,
    check_vocab,
    kind_of,
    top_of,
)
from portlm.tokenizer_parts import NORMALIZERS, PRE_TOKENIZERS, checked_decoder, checked_steps, text_of
from portlm.tokenizer_steps import (
    SPLIT_PATTERNS,
    byte_level,
    check_post_processor,
    fields,
    flag,
    kinds_of,
    steps_of,
)

MAX_ADDED = 2**14  # the library looks for all of them at once
KINDS = {"BPE", "WordPiece", "Unigram", "WordLevel"}
AT_SPACES = (
    "BertPreTokenizer",
    "Whitespace",
    "WhitespaceSplit",
)  # pre-tokenizers that leave no space in a word

_SURROUNDED = ("single_word", "lstrip", "rstrip")  # the flags of a token that depends on the text around it


class TextFile(Struct, frozen=True):
    """A checked tokenizer.json.

    Attributes:
        tokens: what each id is called.
        added: the added tokens in the order of their ids, as the file writes them.
        special: control tokens and their ids.
        unknown: the id of what has no token, if the model has one.
        model, normalizer, pre_tokenizer, decoder, post_processor: the parts, written anew.
    """

    tokens: list[str]
    added: list[dict[str, Any]]
    special: dict[str, int]
    unknown: int | None
    model: dict[str, Any]
    normalizer: dict[str, Any] | None
    pre_tokenizer: dict[str, Any] | None
    decoder: dict[str, Any] | None
    post_processor: dict[str, Any] | None

    @property
    def byte_level(self) -> bool:
        """Whether tokens are bytes."""
        return self.decoder is not None and self.decoder["type"] == "ByteLevel"

    @property
    def prefixed(self) -> bool:
        """Whether the byte level puts a space before text that does not begin with one."""
        steps = [] if self.pre_tokenizer is None else steps_of(self.pre_tokenizer, "pretokenizers")
        return any(step["type"] == "ByteLevel" and step["add_prefix_space"] for step in steps)

    def with_prefix_space(self, wanted: bool) -> "TextFile":
        """Return the file with or without a space before the text, where the byte level alone cuts it."""
        if self.pre_tokenizer is None or self.pre_tokenizer["type"] != "ByteLevel":
            return self
        return replace(self, pre_tokenizer=self.pre_tokenizer | {"add_prefix_space": wanted})

    def document(self) -> dict[str, Any]:
        """Return the file again, in the library's format."""
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": self.added,
            "normalizer": self.normalizer,
            "pre_tokenizer": self.pre_tokenizer,
            "post_processor": self.post_processor,
            "decoder": self.decoder,
            "model": self.model,
        }

    def plain_document(self) -> dict[str, Any]:
        """Return the file for the library to run on text that may spell control tokens but holds none.

        WordPiece, WordLevel and Unigram look up whole pieces of text, so the names of control tokens get a space in
        front, which no piece has: text is cut at spaces or they are replaced.
        """
        kind, hidden = self.model["type"], self.special.keys() & set(self._vocabulary())
        whole = self.document() | {"post_processor": None}
        if kind == "BPE":
            return whole
        model, named = dict(self.model), {name: f" {name}" for name in hidden}
        if kind == "Unigram":
            model["vocab"] = [[named.get(entry, entry), score] for entry, score in model["vocab"]]
        else:
            model["vocab"] = {named.get(entry, entry): index for entry, index in model["vocab"].items()}
            model["unk_token"] = named.get(model["unk_token"], model["unk_token"])
        added = [token for token in self.added if token["content"] not in hidden]
        return whole | {"model": model, "added_tokens": added}

    def within(self, size: int) -> "TextFile | None":
        """Return the file without the tokens from an id on; None if one of them is no control token."""
        if any(name not in self.special for name in self.tokens[size:]):
            return None
        model, gone = dict(self.model), set(self.tokens[size:])
        if model["type"] == "Unigram":
            model["vocab"] = model["vocab"][:size]
        else:
            model["vocab"] = {entry: index for entry, index in model["vocab"].items() if index < size}
        if self.unknown is not None and self.unknown >= size:
            return None
        return replace(
            self,
            tokens=self.tokens[:size],
            added=[token for token in self.added if token["content"] not in gone],
            special={name: index for name, index in self.special.items() if index < size},
            model=model,
        )

    def _vocabulary(self) -> list[str]:
        vocab = self.model["vocab"]
        return [entry for entry, _ in vocab] if isinstance(vocab, list) else list(vocab)


def is_text_kind(document: object) -> bool:
    """Tell a file that this module reads from plain byte-level BPE, which tokenizer_file.py does, and from others."""
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        return False
    model, added = document["model"], document.get("added_tokens")
    kind = kind_of(model)
    if kind != "BPE":
        return kind in KINDS
    steps = {key: kinds_of(document.get(key)) for key in ("normalizer", "pre_tokenizer", "post_processor")}
    return bool(
        model.get("byte_fallback") is True
        or model.get("end_of_word_suffix")
        or steps["normalizer"]
        or not {"ByteLevel"} <= {*steps["pre_tokenizer"]} <= {"ByteLevel", "Digits", "Split"}
        or {"BertProcessing", "RobertaProcessing"} & {*steps["post_processor"]}
        or any(_is_surrounded(token) for token in (added if isinstance(added, list) else []))
    )


def _is_surrounded(token: object) -> bool:
    return isinstance(token, dict) and any(token.get(key) is True for key in _SURROUNDED)


def parse_text(document: object, name: str) -> TextFile:
    """Check a whole tokenizer.json. Truncation and padding are dropped: nothing is ever cut or filled silently.

    Args:
        document: the parsed JSON.
        name: what to call the file in an error.

    Raises:
        FormatError: anything outside the list of what is allowed, or a contradiction.
    """
    top = top_of(document, name)
    kind = kind_of(top["model"])
    readers = {"BPE": _bpe, "WordPiece": _word_piece, "WordLevel": _word_level, "Unigram": _unigram}
    model, vocab = readers[kind](top["model"], name)
    added = _added_tokens(top.get("added_tokens", []), vocab, name)
    special = {token["content"]: token["id"] for token in added if token["special"]}
    others = {token["content"]: token["id"] for token in added}
    check_ids(vocab, others, name)
    unknown = model["unk_id"] if kind == "Unigram" else (vocab | others).get(model["unk_token"])
    if kind == "BPE":
        _check_reach(model, special, name)
    pre_tokenizer = checked_steps(
        top.get("pre_tokenizer"), "pre_tokenizer", "pretokenizers", PRE_TOKENIZERS, name
    )
    if kind == "WordPiece" and "BertPreTokenizer" not in kinds_of(pre_tokenizer):
        raise FormatError(f"{name}: WordPiece is read with the pre-tokenizer BertPreTokenizer alone")
    if kind == "WordLevel" and not {*AT_SPACES} & {*kinds_of(pre_tokenizer)}:
        raise FormatError(
            f"{name}: WordLevel is read with one of the pre-tokenizers {', '.join(AT_SPACES)} alone"
        )
    if kind == "Unigram" and "Metaspace" not in kinds_of(pre_tokenizer):
        raise FormatError(f"{name}: Unigram is read with the pre-tokenizer Metaspace alone")
    decoder = checked_decoder(top.get("decoder"), name)
    _check_bytes(model, pre_tokenizer, decoder, name)
    return TextFile(
        tokens=[entry for entry, _ in sorted((vocab | others).items(), key=lambda item: item[1])],
        added=added,
        special=special,
        unknown=unknown,
        model=model,
        normalizer=checked_steps(top.get("normalizer"), "normalizer", "normalizers", NORMALIZERS, name),
        pre_tokenizer=pre_tokenizer,
        decoder=decoder,
        post_processor=check_post_processor(top.get("post_processor"), special, name),
    )


def qwen2(file: TokenizerFile | TextFile, add_prefix_space: bool, name: str) -> TokenizerFile | TextFile:
    """Return a byte-level file as transformers' Qwen2Tokenizer makes it anew: tokens, merges and template stay.

    Args:
        file: a checked file; one that is not byte-level is returned as it is.
        add_prefix_space: put a space before each piece that does not begin with one.
        name: what to call the file in an error.
    """
    if isinstance(file, TextFile) and not (file.byte_level and file.model["type"] == "BPE"):
        return file
    document = file.document()
    pattern = next(pattern for pattern, kind in SPLIT_PATTERNS.items() if kind == "qwen2")
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    document |= {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level(False, add_prefix_space)]},
        "decoder": byte_level(),
        "model": document["model"] | {"ignore_merges": False},
    }
    return parse_text(document, name)


def _bpe(value: dict[str, Any], name: str) -> tuple[dict[str, Any], dict[str, int]]:
    model = fields(value, name, "model", MODEL_KEYS)
    if model.get("dropout"):
        raise FormatError(f"{name}: dropout would give a text other ids each time")
    if model.get("continuing_subword_prefix"):
        raise FormatError(f"{name}: continuing_subword_prefix is for WordPiece, and here model is BPE")
    vocab = check_vocab(model.get("vocab"), name)
    unknown = model.get("unk_token")
    if unknown is not None and (not isinstance(unknown, str) or unknown not in vocab):
        raise FormatError(f"{name}: unk_token is {shown(unknown)}, which is not in vocab")
    suffix = text_of(model, "end_of_word_suffix", name) if model.get("end_of_word_suffix") else None
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": suffix,
        "fuse_unk": flag(model, "fuse_unk", False, name),
        "byte_fallback": flag(model, "byte_fallback", False, name),
        "ignore_merges": flag(model, "ignore_merges", False, name),
        "vocab": _by_id(vocab),
        "merges": [list(pair) for pair in check_merges(model.get("merges"), vocab, name)],
    }, vocab


def _word_piece(value: dict[str, Any], name: str) -> tuple[dict[str, Any], dict[str, int]]:
    keys = {"type", "unk_token", "continuing_subword_prefix", "max_input_chars_per_word", "vocab"}
    model = fields(value, name, "model", keys)
    vocab, unknown = _words(model, name)
    longest = model.get("max_input_chars_per_word", 100)
    if type(longest) is not int or not 1 <= longest <= MAX_TOKEN_CHARS:
        raise FormatError(f"{name}: max_input_chars_per_word is {shown(longest)}")
    return {
        "type": "WordPiece",
        "unk_token": unknown,
        "continuing_subword_prefix": text_of(model, "continuing_subword_prefix", name),
        "max_input_chars_per_word": longest,
        "vocab": _by_id(vocab),
    }, vocab


def _word_level(value: dict[str, Any], name: str) -> tuple[dict[str, Any], dict[str, int]]:
    model = fields(value, name, "model", {"type", "unk_token", "vocab"})
    vocab, unknown = _words(model, name)
    return {"type": "WordLevel", "unk_token": unknown, "vocab": _by_id(vocab)}, vocab


def _words(model: dict[str, Any], name: str) -> tuple[dict[str, int], str]:
    """Return a vocabulary of words and the one that stands for all others."""
    vocab, unknown = check_vocab(model.get("vocab"), name), model.get("unk_token")
    if not isinstance(unknown, str) or unknown not in vocab:
        raise FormatError(f"{name}: unk_token is {shown(unknown)}, which is not in vocab")
    return vocab, unknown


def _unigram(value: dict[str, Any], name: str) -> tuple[dict[str, Any], dict[str, int]]:
    model = fields(value, name, "model", {"type", "unk_id", "vocab", "byte_fallback"})
    entries, unknown = model.get("vocab"), model.get("unk_id")
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_VOCAB:
        raise FormatError(f"{name}: vocab must be a list of 1 to {MAX_VOCAB} pieces")
    vocab: dict[str, int] = {}
    for index, entry in enumerate(entries):
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise FormatError(f"{name}: piece {index} is not a text and its score")
        piece, score = entry
        if not 1 <= len(piece) <= MAX_TOKEN_CHARS or piece in vocab:
            raise FormatError(f"{name}: piece {index} is empty, too long, or listed twice")
        if type(score) not in (int, float) or not math.isfinite(score):
            raise FormatError(f"{name}: piece {index} has the score {shown(score)}")
        vocab[piece] = index
    if unknown is not None and (type(unknown) is not int or not 0 <= unknown < len(vocab)):
        raise FormatError(f"{name}: unk_id is {shown(unknown)}, and there are {len(vocab)} pieces")
    return {
        "type": "Unigram",
        "unk_id": unknown,
        "vocab": entries,
        "byte_fallback": flag(model, "byte_fallback", False, name),
    }, vocab


def _by_id(vocab: dict[str, int]) -> dict[str, int]:
    return dict(sorted(vocab.items(), key=lambda item: item[1]))


def _added_tokens(value: object, vocab: dict[str, int], name: str) -> list[dict[str, Any]]:
    """Return the added tokens by their ids, with all flags."""
    if not isinstance(value, list) or len(value) > MAX_ADDED:
        raise FormatError(f"{name}: added_tokens must be a list of at most {MAX_ADDED}")
    found: dict[str, dict[str, Any]] = {}
    for item in value:
        token = fields(item, name, "an added token", ADDED_KEYS)
        content, index = token.get("content"), token.get("id")
        if not isinstance(content, str) or not 1 <= len(content.encode()) <= MAX_ADDED_BYTES:
            raise FormatError(f"{name}: an added token needs a content of 1 to {MAX_ADDED_BYTES} bytes")
        if type(index) is not int or not 0 <= index < MAX_VOCAB:
            raise FormatError(f"{name}: added token {shown(content)} has the id {shown(index)}")
        if vocab.get(content, index) != index or content in found:
            raise FormatError(f"{name}: added token {shown(content)} has two ids or is listed twice")
        flags = {key: flag(token, key, False, name) for key in (*_SURROUNDED, "normalized", "special")}
        if content not in vocab and index < max(
            (t["id"] for c, t in found.items() if c not in vocab), default=0
        ):
            raise FormatError(f"{name}: added token {shown(content)} is listed after one with a larger id")
        found[content] = {"id": index, "content": content} | flags
    return sorted(found.values(), key=lambda token: token["id"])


def _check_reach(model: dict[str, Any], special: dict[str, int], name: str) -> None:
    """Check that no merges lead to a control token."""
    made = {left + right for left, right in model["merges"]}
    for content in special.keys() & model["vocab"].keys():
        whole = model["ignore_merges"] and content != model["unk_token"]
        if content in made or len(content) == 1 or whole:
            raise FormatError(f"{name}: ordinary text could become the control token {shown(content)}")


def _check_bytes(
    model: dict[str, Any], pre_tokenizer: dict[str, Any] | None, decoder: dict[str, Any] | None, name: str
) -> None:
    """Check that text becomes bytes where tokens are bytes, and nowhere else."""
    cuts = kinds_of(pre_tokenizer)
    if "ByteLevel" not in {*cuts, *kinds_of(decoder)}:
        return
    if "ByteLevel" not in kinds_of(decoder) or cuts.count("ByteLevel") != 1 or cuts[-1] != "ByteLevel":
        raise FormatError(f"{name}: ByteLevel must be the last pre-tokenizer, and no other, and the decoder")
    if model["type"] != "BPE" or model["byte_fallback"] or model["end_of_word_suffix"]:
        raise FormatError(f"{name}: byte-level BPE has no byte_fallback and no end_of_word_suffix")
