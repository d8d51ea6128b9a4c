"""Tokenizers in GGUF's metadata: a list of tokens, what each is, and merges or scores; to tokenizer.json and back.

llama.cpp knows the words of byte-level BPE by the name of their pattern (tokenizer.ggml.pre), and SentencePiece's BPE
by the scores of its pieces, of which merges follow: a pair merges the earlier, the better the piece that it makes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from portlm.errors import FormatError
from portlm.files import shown
from portlm.text_tokenizer import TextTokenizer
from portlm.tokenizer import Tokenizer
from portlm.tokenizer_file import parse
from portlm.tokenizer_kinds import parse_text
from portlm.tokenizer_steps import SPLIT_PATTERNS, byte_level, template

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
_MARK = "\u2581"
_PREFIX = "tokenizer.ggml."
_NFC = {"type": "NFC"}


def _split(name: str) -> dict[str, Any]:
    regex = next(pattern for pattern, known in SPLIT_PATTERNS.items() if known == name)
    cut = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, byte_level(use_regex=False)]}


_DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level()]}
# tokenizer.ggml.pre -> the pre-tokenizer, the normalizer, whether whole words are looked up first. The first with a
# form is what is written for it.
PATTERNS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, bool]] = {
    "gpt-2": (byte_level(), None, False),
    "llama-bpe": (_split("cl100k_base"), None, True),
    "dbrx": (_split("cl100k_base"), None, False),
    "qwen2": (_split("qwen2"), _NFC, False),
    "smollm": (_DIGITS, None, False),
    **dict.fromkeys(("mpt", "olmo", "jais"), (byte_level(), None, False)),
    **dict.fromkeys(("llama3", "llama-v3"), (_split("cl100k_base"), None, True)),
    "smaug-bpe": (_split("cl100k_base"), None, False),
    **dict.fromkeys(("starcoder", "refact", "command-r"), (_DIGITS, None, False)),
}
_BEGINS = {
    "llama-bpe",
    "llama3",
    "llama-v3",
}  # llama.cpp puts a beginning before a text unless the file says no


def read_tokenizer(entries: Mapping[str, Any], path: object) -> Tokenizer:
    """Make the tokenizer that the metadata of a GGUF file describes.

    Args:
        entries: all of the metadata.
        path: of the file, for errors.

    Raises:
        FormatError: it is of a kind that portlm does not read, or contradicts itself.
    """
    kind, tokens = entries.get(f"{_PREFIX}model"), entries.get(f"{_PREFIX}tokens")
    if kind not in ("gpt2", "llama"):
        raise FormatError(f"{path}: {_PREFIX}model is {shown(kind)}, and portlm reads gpt2 and llama")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise FormatError(f"{path}: {_PREFIX}tokens is no list of texts")
    types = entries.get(f"{_PREFIX}token_type", [NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens) or not all(type(t) is int for t in types):
        raise FormatError(f"{path}: {_PREFIX}token_type is no list of as many numbers as there are tokens")
    while types and types[-1] == UNUSED:  # they fill the table up to the model's size
        tokens, types = tokens[:-1], types[:-1]
    if len(set(tokens)) != len(tokens):
        raise FormatError(f"{path}: {_PREFIX}tokens holds a token twice")
    roles = {name: _id(entries, name, len(tokens), path) for name in ("bos", "eos", "unknown")}
    for name in ("bos", "eos"):
        if (index := roles[name]) is not None and types[index] not in (CONTROL, UNKNOWN):
            roles[name] = None  # ordinary text becomes it
    document = (_byte_level if kind == "gpt2" else _sentence_piece)(entries, tokens, types, roles, path)
    pre = entries.get(f"{_PREFIX}pre")
    begin = _flag(entries, "add_bos_token", kind == "llama" or pre in _BEGINS, path)
    around = [tokens[roles["bos"]]] if begin and roles["bos"] is not None else []
    end = (
        [tokens[roles["eos"]]]
        if _flag(entries, "add_eos_token", False, path) and roles["eos"] is not None
        else []
    )
    document["post_processor"] = (
        template(around, end, {name: tokens.index(name) for name in (*around, *end)})
        if around or end
        else None
    )
    eos, bos = (None if index is None else tokens[index] for index in (roles["eos"], roles["bos"]))
    where = f"{path}: the tokenizer"
    if kind == "gpt2" and document["normalizer"] is None:
        return Tokenizer(parse(document, where), eos, bos)
    return TextTokenizer(parse_text(document, where), eos, bos)


def _document(tokens: list[str], types: list[int], model: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """Put a tokenizer.json together; control and user-defined tokens are its added tokens."""
    added = [
        {"id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": kind != USER}
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind not in (NORMAL, BYTE)
    ]  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "model": model,
    } | parts


def _byte_level(
    entries: Mapping[str, Any],
    tokens: list[str],
    types: list[int],
    roles: dict[str, int | None],
    path: object,
) -> dict[str, Any]:
    pre = entries.get(f"{_PREFIX}pre")
    if pre is None and entries.get("general.architecture") in ("gpt2", "gptneox"):
        pre = "gpt-2"  # files from before patterns had names
    if pre not in PATTERNS:
        raise FormatError(f"{path}: {_PREFIX}pre is {shown(pre)}, and portlm reads {', '.join(PATTERNS)}")
    pre_tokenizer, normalizer, whole_words = PATTERNS[pre]
    vocab = {
        token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind in (NORMAL, BYTE)
    }
    model = {
        "type": "BPE",
        "ignore_merges": whole_words,
        "vocab": vocab,
        "merges": entries.get(f"{_PREFIX}merges"),
    }
    return _document(
        tokens, types, model, normalizer=normalizer, pre_tokenizer=pre_tokenizer, decoder=byte_level()
    )


def _sentence_piece(
    entries: Mapping[str, Any],
    tokens: list[str],
    types: list[int],
    roles: dict[str, int | None],
    path: object,
) -> dict[str, Any]:
    scores = entries.get(f"{_PREFIX}scores")
    if (
        not isinstance(scores, list)
        or len(scores) < len(tokens)
        or not all(isinstance(s, float) for s in scores)
    ):
        raise FormatError(f"{path}: {_PREFIX}scores is no list of as many numbers as there are tokens")
    if _flag(entries, "remove_extra_whitespaces", False, path):
        raise FormatError(f"{path}: {_PREFIX}remove_extra_whitespaces is not supported")
    unknown = (
        roles["unknown"]
        if roles["unknown"] is not None
        else (types.index(UNKNOWN) if UNKNOWN in types else None)
    )
    if unknown is None:
        raise FormatError(f"{path}: no token stands for what is unknown ({_PREFIX}unknown_token_id)")
    vocab = {token: index for index, token in enumerate(tokens)}
    pieces = {token: index for token, index in vocab.items() if types[index] == NORMAL}
    model = {
        "type": "BPE", "unk_token": tokens[unknown], "fuse_unk": True, "byte_fallback": BYTE in types,
        "vocab": vocab, "merges": _merges(pieces, scores),
    }  # fmt: skip
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _MARK}
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _MARK}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}
    ]  # fmt: skip
    normalizer: dict[str, Any] = spaces
    if _flag(entries, "add_space_prefix", True, path):
        normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _MARK}, spaces]}
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    decoder = {"type": "Sequence", "decoders": steps}
    return _document(tokens, types, model, normalizer=normalizer, pre_tokenizer=None, decoder=decoder)


def _merges(pieces: dict[str, int], scores: list[float]) -> list[list[str]]:
    """Return the pairs that make each piece, the best piece first; of one piece, as transformers orders them."""
    found = []
    for piece, index in pieces.items():
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        local = [(left, right, scores[index]) for left, right in pairs if left in pieces and right in pieces]
        found += sorted(local, key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))
    found.sort(key=lambda pair: (pair[2], len(pair[0]), len(pair[1])), reverse=True)
    return [[left, right] for left, right, _ in found]


def _id(entries: Mapping[str, Any], name: str, count: int, path: object) -> int | None:
    value = entries.get(f"{_PREFIX}{name}_token_id")
    if value is not None and (type(value) is not int or not 0 <= value < count):
        raise FormatError(f"{path}: {_PREFIX}{name}_token_id is {shown(value)}, and there are {count} tokens")
    return value


def _flag(entries: Mapping[str, Any], name: str, default: bool, path: object) -> bool:
    value = entries.get(f"{_PREFIX}{name}", default)
    if not isinstance(value, bool):
        raise FormatError(f"{path}: {_PREFIX}{name} is {shown(value)}, not true or false")
    return value


def tokenizer_entries(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Return the metadata that describes a tokenizer, for a model of so many ids.

    Raises:
        FormatError: llama.cpp has no tokenizer that would give the same ids.
    """
    document = json.loads(tokenizer.to_json())
    model, added = document["model"], {token["id"]: token for token in document["added_tokens"]}
    if model["type"] != "BPE" or model["end_of_word_suffix"]:
        raise FormatError("only BPE is written to GGUF")
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added.values()):
        raise FormatError("GGUF cannot say that an added token depends on the text around it")
    names: list[str] = [""] * tokenizer.vocab_size
    for name, index in model["vocab"].items():
        names[index] = name
    types = [NORMAL] * len(names)
    for index, token in added.items():
        names[index], types[index] = token["content"], CONTROL if token["special"] else USER
    found = (
        _written_bytes(document)
        if document["decoder"]["type"] == "ByteLevel"
        else _written_pieces(document, names, types)
    )
    for index in range(len(names), vocab_size):
        names.append(f"[PAD{index}]")
        types.append(UNUSED)
    if f"{_PREFIX}scores" in found:
        found[f"{_PREFIX}scores"] += [-1e4] * (vocab_size - len(found[f"{_PREFIX}scores"]))
    begin, end = tokenizer.begin_ids, tokenizer.end_ids
    if begin not in ([], [tokenizer.bos_id]) or end not in ([], [tokenizer.eos_id]):
        raise FormatError("GGUF puts only the tokens that begin and end a text around it")
    found |= {f"{_PREFIX}tokens": names, f"{_PREFIX}token_type": types}
    found |= {f"{_PREFIX}add_bos_token": bool(begin), f"{_PREFIX}add_eos_token": bool(end)}
    for name, index in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        if index is not None:
            found[f"{_PREFIX}{name}_token_id"] = index
    return found


def _written_bytes(document: dict[str, Any]) -> dict[str, Any]:
    """Return what is said of byte-level BPE."""
    model, cut = document["model"], document["pre_tokenizer"]
    if not model["merges"]:
        cut = byte_level()  # words do not matter where nothing merges
    wanted = cut, document["normalizer"], model["ignore_merges"]
    pre = next((name for name, form in PATTERNS.items() if form == wanted), None)
    if pre is None and wanted == (_split("qwen2"), None, False):
        pre = "qwen2"
    if pre is None:
        raise FormatError("llama.cpp has no name for the way in which this tokenizer cuts words")
    return {
        f"{_PREFIX}model": "gpt2",
        f"{_PREFIX}pre": pre,
        f"{_PREFIX}merges": [" ".join(pair) for pair in model["merges"]],
    }


def _written_pieces(document: dict[str, Any], names: list[str], types: list[int]) -> dict[str, Any]:
    """Return what is said of SentencePiece's BPE, and set the types of its bytes and of the unknown token.

    Raises:
        FormatError: the merges do not follow from scores.
    """
    model, normal = document["model"], document["normalizer"]
    steps = [] if normal is None else normal.get("normalizers", [normal])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _MARK}
    prefixed = steps == [{"type": "Prepend", "prepend": _MARK}, replace]
    if not prefixed and steps != [replace]:
        raise FormatError("llama.cpp does not rewrite text as this tokenizer does")
    for index, name in enumerate(names):
        if model["byte_fallback"] and len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            types[index] = BYTE
        if name == model["unk_token"]:
            types[index] = UNKNOWN
    best: dict[str, int] = {}
    for rank, (left, right) in enumerate(model["merges"]):
        best.setdefault(left + right, rank)
    scores = [-float(best.get(name, len(model["merges"]))) for name in names]
    pieces = {name: index for index, name in enumerate(names) if types[index] == NORMAL}
    if sorted(map(list, model["merges"])) != sorted(_merges(pieces, scores)):
        raise FormatError("the merges of this tokenizer do not follow from scores, by which llama.cpp goes")
    ranks = [best[left + right] for left, right in model["merges"]]
    if ranks != sorted(ranks):
        raise FormatError("the merges of this tokenizer are in an order that no scores give")
    return {
        f"{_PREFIX}model": "llama",
        f"{_PREFIX}pre": "default",
        f"{_PREFIX}scores": scores,
        f"{_PREFIX}add_space_prefix": prefixed,
        f"{_PREFIX}unknown_token_id": names.index(model["unk_token"]),
    }
