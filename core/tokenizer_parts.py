"""The steps of a tokenizer.json that is no plain byte-level BPE: what rewrites text, cuts it, and joins it again.

Each is checked against a list of what is allowed and written anew from the checked values, as tokenizer_kinds.py says.
"""

from collections.abc import Callable
from typing import Any

from portlm.errors import FormatError
from portlm.files import shown
from portlm.tokenizer_charsmap import check_charsmap
from portlm.tokenizer_steps import BYTE_LEVEL_KEYS, SPLIT_PATTERNS, byte_level, fields, flag

MAX_STEPS = 16
MAX_STEP_CHARS = 256

_SPLITS = {*SPLIT_PATTERNS, r"\s+", r"\d", r"\d{1,3}", r"[0-9]{1,3}", " ?[^(\\s|[.,!?…。，、।۔،])]+"}
_REPLACED = {" {2,}", r"\s+"}  # patterns of normalizers, which take linear time
_BEHAVIORS = {"Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"}
_SCHEMES = {"always", "never", "first"}


def text_of(holder: dict[str, Any], key: str, name: str, least: int = 1) -> str:
    """Return a short text."""
    value = holder.get(key)
    if not isinstance(value, str) or not least <= len(value) <= MAX_STEP_CHARS:
        raise FormatError(
            f"{name}: {key} is {shown(value)}, not a text of {least} to {MAX_STEP_CHARS} characters"
        )
    return value


def _one_of(holder: dict[str, Any], key: str, allowed: set[str], default: str | None, name: str) -> str:
    value = holder.get(key, default)
    if not isinstance(value, str) or value not in allowed:
        raise FormatError(f"{name}: {key} is {shown(value)}, none of {', '.join(sorted(allowed))}")
    return value


def _pattern(step: dict[str, Any], allowed: set[str], name: str) -> dict[str, str]:
    """Check what is looked for: a text, or a regular expression that is known to take linear time."""
    pattern = fields(step.get("pattern"), name, "a pattern", {"String", "Regex"})
    if list(pattern) == ["String"]:
        return {"String": text_of(pattern, "String", name)}
    regex = pattern.get("Regex")
    if len(pattern) != 1 or not isinstance(regex, str) or regex not in allowed:
        raise FormatError(f"{name}: the pattern {shown(regex)} is unknown, and others could take for ever")
    return {"Regex": regex}


Check = Callable[[dict[str, Any], str], dict[str, Any]]


def _alone(step: dict[str, Any], name: str) -> dict[str, Any]:
    return {"type": fields(step, name, "a step", {"type"})["type"]}


def _flags(what: str, **defaults: bool) -> Check:
    def check(step: dict[str, Any], name: str) -> dict[str, Any]:
        fields(step, name, what, {"type", *defaults})
        return {"type": step["type"]} | {
            key: flag(step, key, default, name) for key, default in defaults.items()
        }

    return check


def _bert_normalizer(step: dict[str, Any], name: str) -> dict[str, Any]:
    keys = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True}
    fields(step, name, "the BertNormalizer", {"type", *keys})
    result: dict[str, Any] = {"type": "BertNormalizer"}
    for key, default in keys.items():
        value = step.get(key, default)
        if not isinstance(value, bool) and not (key == "strip_accents" and value is None):
            raise FormatError(f"{name}: {key} is {shown(value)}, not true or false")
        result[key] = value
    return result


def _prepend(step: dict[str, Any], name: str) -> dict[str, Any]:
    return {
        "type": "Prepend",
        "prepend": text_of(fields(step, name, "Prepend", {"type", "prepend"}), "prepend", name),
    }


def _replace(step: dict[str, Any], name: str) -> dict[str, Any]:
    fields(step, name, "Replace", {"type", "pattern", "content"})
    return {
        "type": "Replace",
        "pattern": _pattern(step, _REPLACED, name),
        "content": text_of(step, "content", name, least=0),
    }


def _precompiled(step: dict[str, Any], name: str) -> dict[str, Any]:
    fields(step, name, "Precompiled", {"type", "precompiled_charsmap"})
    return {
        "type": "Precompiled",
        "precompiled_charsmap": check_charsmap(step.get("precompiled_charsmap"), name),
    }


def _metaspace(step: dict[str, Any], name: str) -> dict[str, Any]:
    fields(
        step,
        name,
        "Metaspace",
        {"type", "replacement", "add_prefix_space", "prepend_scheme", "split", "str_rep"},
    )
    replacement = text_of(step, "replacement", name) if "replacement" in step else "\u2581"
    if len(replacement) != 1 or replacement == " " or step.get("str_rep", replacement) != replacement:
        raise FormatError(
            f"{name}: Metaspace replaces a space by {shown(replacement)}, not by one other character"
        )
    scheme = _one_of(step, "prepend_scheme", _SCHEMES, "always", name)
    if not flag(step, "add_prefix_space", True, name):
        scheme = "never"
    return {
        "type": "Metaspace",
        "replacement": replacement,
        "prepend_scheme": scheme,
        "split": flag(step, "split", True, name),
    }


def _split(step: dict[str, Any], name: str) -> dict[str, Any]:
    fields(step, name, "Split", {"type", "pattern", "behavior", "invert"})
    return {
        "type": "Split",
        "pattern": _pattern(step, _SPLITS, name),
        "behavior": _one_of(step, "behavior", _BEHAVIORS, None, name),
        "invert": flag(step, "invert", False, name),
    }


def _punctuation(step: dict[str, Any], name: str) -> dict[str, Any]:
    fields(step, name, "Punctuation", {"type", "behavior"})
    return {"type": "Punctuation", "behavior": _one_of(step, "behavior", _BEHAVIORS, "Isolated", name)}


def _byte_level(step: dict[str, Any], name: str) -> dict[str, Any]:
    fields(step, name, "ByteLevel", BYTE_LEVEL_KEYS)
    flag(step, "trim_offsets", True, name)
    return byte_level(flag(step, "use_regex", True, name), flag(step, "add_prefix_space", True, name))


NORMALIZERS: dict[str, Check] = {
    **dict.fromkeys(("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt"), _alone),
    "BertNormalizer": _bert_normalizer,
    "Prepend": _prepend,
    "Replace": _replace,
    "Strip": _flags("Strip", strip_left=True, strip_right=True),
    "Precompiled": _precompiled,
}
PRE_TOKENIZERS: dict[str, Check] = {
    **dict.fromkeys(("BertPreTokenizer", "Whitespace", "WhitespaceSplit"), _alone),
    "ByteLevel": _byte_level,
    "Digits": _flags("Digits", individual_digits=False),
    "Metaspace": _metaspace,
    "Punctuation": _punctuation,
    "Split": _split,
}


def _steps(value: object, what: str, key: str, name: str) -> list[dict[str, Any]]:
    """Return the steps of a sequence, or the one that stands for itself, each with its type."""
    steps = [value]
    if isinstance(value, dict) and value.get("type") == "Sequence":
        steps = fields(value, name, what, {"type", key}).get(key)  # type: ignore[assignment]
    if not isinstance(steps, list) or len(steps) > MAX_STEPS:
        raise FormatError(f"{name}: the {what} has more than {MAX_STEPS} steps, or none that can be read")
    found: list[dict[str, Any]] = []
    for step in steps:
        if not isinstance(step, dict) or not isinstance(step.get("type"), str):
            raise FormatError(f"{name}: a step of the {what} is not an object with a type")
        found.append(step)
    return found


def checked_steps(
    value: object, what: str, key: str, known: dict[str, Check], name: str
) -> dict[str, Any] | None:
    """Check the steps of a part that may be missing."""
    if value is None:
        return None
    checked = []
    for step in _steps(value, what, key, name):
        if step["type"] not in known:
            raise FormatError(
                f"{name}: the {what} {shown(step['type'])} is none of {', '.join(sorted(known))}"
            )
        checked.append(known[step["type"]](step, name))
    if not checked:
        return None
    return checked[0] if len(checked) == 1 else {"type": "Sequence", key: checked}


def _word_piece_decoder(step: dict[str, Any], name: str) -> dict[str, Any]:
    fields(step, name, "the WordPiece decoder", {"type", "prefix", "cleanup"})
    return {
        "type": "WordPiece",
        "prefix": text_of(step, "prefix", name),
        "cleanup": flag(step, "cleanup", True, name),
    }


def _bpe_decoder(step: dict[str, Any], name: str) -> dict[str, Any]:
    fields(step, name, "the BPEDecoder", {"type", "suffix"})
    return {"type": "BPEDecoder", "suffix": text_of(step, "suffix", name)}


def _strip(step: dict[str, Any], name: str) -> dict[str, Any]:
    fields(step, name, "Strip", {"type", "content", "start", "stop"})
    content, start = text_of(step, "content", name), step.get("start")
    if (
        len(content) != 1
        or type(start) is not int
        or not 0 <= start <= MAX_STEP_CHARS
        or step.get("stop") != 0
    ):
        raise FormatError(f"{name}: the decoder Strip takes one character from the beginning of a text alone")
    return {"type": "Strip", "content": content, "start": start, "stop": 0}


def _replace_text(step: dict[str, Any], name: str) -> dict[str, Any]:
    checked = _replace(step, name)
    if "Regex" in checked["pattern"]:
        raise FormatError(f"{name}: the decoder Replace takes a text, not a pattern")
    return checked


_DECODERS: dict[str, Check] = {
    "ByteLevel": _byte_level,
    "WordPiece": _word_piece_decoder,
    "Metaspace": _metaspace,
    "BPEDecoder": _bpe_decoder,
}
_DECODER_STEPS: dict[str, Check] = {
    "Replace": _replace_text,
    "ByteFallback": _alone,
    "Fuse": _alone,
    "Strip": _strip,
}
_ORDER = list(_DECODER_STEPS)


def checked_decoder(value: object, name: str) -> dict[str, Any] | None:
    """Check how tokens become text: one decoder, or the steps of SentencePiece's in their order."""
    if value is None:
        return None
    steps = _steps(value, "decoder", "decoders", name)
    if len(steps) == 1 and steps[0]["type"] in _DECODERS:
        return _DECODERS[steps[0]["type"]](steps[0], name)
    for step in steps:
        if step["type"] not in _DECODER_STEPS:
            known = ", ".join(sorted({*_DECODERS, *_DECODER_STEPS}))
            raise FormatError(
                f"{name}: the decoder {shown(step['type'])}, alone or in its place, is none of {known}"
            )
    checked = [_DECODER_STEPS[step["type"]](step, name) for step in steps]
    places = [_ORDER.index(step["type"]) for step in checked]
    once = [place for place in places if place > 0]
    if places != sorted(places) or len(set(once)) != len(once) or (3 in places and 2 not in places):
        raise FormatError(
            f"{name}: the decoder's steps are not Replace, ByteFallback, Fuse and Strip in this order"
        )
    return {"type": "Sequence", "decoders": checked}
