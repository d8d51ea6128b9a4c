"""The steps of a tokenizer.json around BPE: how text is cut into words before, and what is put around it after.

Each is checked against a list of what is allowed and written anew from the checked values, as tokenizer_file.py says.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from portlm.errors import FormatError
from portlm.files import shown

# Splitting patterns by name, since an arbitrary one could backtrack for ever.
SPLIT_PATTERNS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "cl100k_base",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}

BYTE_LEVEL_KEYS = {"type", "add_prefix_space", "trim_offsets", "use_regex"}


def fields(value: object, name: str, what: str, keys: set[str]) -> dict[str, Any]:
    """Return an object that has no key outside the list."""
    if not isinstance(value, dict):
        raise FormatError(f"{name}: {what} is not a JSON object")
    unknown = value.keys() - keys
    if unknown:
        raise FormatError(f"{name}: {what} has the unknown entry {shown(min(unknown))}")
    return value


def flag(holder: dict[str, Any], key: str, default: bool, name: str) -> bool:
    """Return an optional true or false."""
    value = holder.get(key, default)
    if not isinstance(value, bool):
        raise FormatError(f"{name}: {key} is {shown(value)}, not true or false")
    return value


def byte_level(use_regex: bool = True, add_prefix_space: bool = False) -> dict[str, Any]:
    """Return the byte-level step.

    Args:
        use_regex: also cut words (Radford et al. 2019).
        add_prefix_space: put a space before a text that does not begin with one.
    """
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def steps_of(value: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """Return the steps of a checked sequence, which lie under `key`, or the one step that stands for itself."""
    return value[key] if value["type"] == "Sequence" else [value]


def kinds_of(value: object) -> list[str]:
    """Return the type of a step that was not checked yet; of a sequence, those of its steps."""
    if not isinstance(value, dict):
        return []
    steps = [value]
    if value.get("type") == "Sequence":
        steps = next((inside for inside in value.values() if isinstance(inside, list)), [])
    kinds = [step.get("type") for step in steps if isinstance(step, dict)]
    return [kind for kind in kinds if isinstance(kind, str)]


def check_normalizer(value: object, name: str) -> None:
    """Check that nothing rewrites text before it is cut. A sequence without steps is nothing."""
    if value is None or value == {"type": "Sequence", "normalizers": []}:
        return
    kinds = ", ".join(map(shown, kinds_of(value))) or "of an unknown form"
    raise FormatError(
        f"{name}: the normalizer ({kinds}) rewrites text, so what is decoded would not be what was encoded"
    )


def check_pre_tokenizer(value: object, name: str) -> dict[str, Any]:
    """Check how text is cut into words: steps that only cut, then the byte level."""
    steps = [value]
    if isinstance(value, dict) and value.get("type") == "Sequence":
        steps = fields(value, name, "pre_tokenizer", {"type", "pretokenizers"}).get("pretokenizers") or [None]
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
        step = fields(value, name, "pre_tokenizer", BYTE_LEVEL_KEYS)
        flag(step, "trim_offsets", True, name)
        return byte_level(flag(step, "use_regex", True, name), flag(step, "add_prefix_space", True, name))
    if kind == "Digits":
        step = fields(value, name, "pre_tokenizer", {"type", "individual_digits"})
        return {"type": "Digits", "individual_digits": flag(step, "individual_digits", False, name)}
    if kind == "Split":
        step = fields(value, name, "pre_tokenizer", {"type", "pattern", "behavior", "invert"})
        pattern = fields(step.get("pattern"), name, "the split pattern", {"Regex"}).get("Regex")
        if not isinstance(pattern, str) or pattern not in SPLIT_PATTERNS:
            known = ", ".join(SPLIT_PATTERNS.values())
            raise FormatError(
                f"{name}: the split pattern {shown(pattern)} is unknown, known are those of {known}"
            )
        if step.get("behavior") != "Isolated" or flag(step, "invert", False, name):
            raise FormatError(f"{name}: a split must be Isolated and not inverted")
        return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    raise FormatError(f"{name}: the pre-tokenizer {shown(kind)} is none of ByteLevel, Digits and Split")


def check_post_processor(value: object, special: dict[str, int], name: str) -> dict[str, Any] | None:
    """Check what is put around a text: once at most, and every token there must be a control token."""
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if kind != "Sequence":
        return _post_processor_step(value, special, name)
    steps = fields(value, name, "post_processor", {"type", "processors"}).get("processors")
    if not isinstance(steps, list) or len(steps) > 4:
        raise FormatError(f"{name}: a sequence of post-processors has at most 4 steps")
    checked = [_post_processor_step(step, special, name) for step in steps]
    if len([step for step in checked if step["type"] != "ByteLevel"]) > 1:
        raise FormatError(f"{name}: a sequence of post-processors puts something around a text once")
    return {"type": kind, "processors": checked} if checked else None


def _post_processor_step(value: object, special: dict[str, int], name: str) -> dict[str, Any]:
    """Check one step and return it as the library writes it."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "ByteLevel":
        step = fields(value, name, "post_processor", BYTE_LEVEL_KEYS)
        return {"type": kind} | {
            key: flag(step, key, True, name) for key in sorted(BYTE_LEVEL_KEYS - {"type"})
        }
    if kind == "TemplateProcessing":
        return _template(
            fields(value, name, "post_processor", {"type", "single", "pair", "special_tokens"}), special, name
        )
    if kind == "BertProcessing":
        step = fields(value, name, "post_processor", {"type", "sep", "cls"})
        return {"type": kind} | {key: _end(step.get(key), special, name) for key in ("sep", "cls")}
    if kind == "RobertaProcessing":
        step = fields(
            value, name, "post_processor", {"type", "sep", "cls", "trim_offsets", "add_prefix_space"}
        )
        ends = {key: _end(step.get(key), special, name) for key in ("sep", "cls")}
        return (
            {"type": kind}
            | ends
            | {key: flag(step, key, True, name) for key in ("trim_offsets", "add_prefix_space")}
        )
    known = "ByteLevel, TemplateProcessing, BertProcessing and RobertaProcessing"
    raise FormatError(f"{name}: the post-processor {shown(kind)} is none of {known}")


def _end(value: object, special: dict[str, int], name: str) -> list[str | int]:
    """Check a control token and its id, as a pair."""
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
        raise FormatError(f"{name}: {shown(value)} is no pair of a control token and its id")
    if type(value[1]) is not int or special.get(value[0]) != value[1]:
        raise FormatError(f"{name}: {shown(value[0])} is not the control token {shown(value[1])}")
    return value


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
        if sorted(filter(None, used)) != (["A"] if key == "single" else ["A", "B"]):
            raise FormatError(f"{name}: the template {key} does not hold the texts it is for, each once")
        result[key] = pieces
    return result | {"special_tokens": declared}


def around(
    post_processor: dict[str, Any] | None, special: dict[str, int], pair: bool = False
) -> list[tuple[str | int, int]]:
    """Return what a checked post-processor makes of one text or of two: "A", "B" and ids, each with its type."""
    key = "pair" if pair else "single"
    for step in [] if post_processor is None else steps_of(post_processor, "processors"):
        if step["type"] == "TemplateProcessing":
            bodies = [(kind, body) for piece in step[key] for kind, body in piece.items()]
            return [
                (body["id"] if kind == "Sequence" else special[body["id"]], body["type_id"])
                for kind, body in bodies
            ]
        if step["type"] in ("BertProcessing", "RobertaProcessing"):
            begin, end = step["cls"][1], step["sep"][1]
            one: list[tuple[str | int, int]] = [(begin, 0), ("A", 0), (end, 0)]
            if not pair:
                return one
            if step["type"] == "BertProcessing":
                return [*one, ("B", 1), (end, 1)]
            return [*one, (end, 0), ("B", 0), (end, 0)]
    return [("A", 0), ("B", 1)] if pair else [("A", 0)]


def template(begin: Sequence[str], end: Sequence[str], ids: Mapping[str, int]) -> dict[str, Any]:
    """Return the post-processor that puts control tokens around a text.

    Args:
        begin: names of those before it.
        end: names of those after it.
        ids: the id of each.
    """

    def pieces(text: str, kind: int) -> list[dict[str, Any]]:
        around = [
            [{"SpecialToken": {"id": token, "type_id": kind}} for token in part] for part in (begin, end)
        ]
        return [*around[0], {"Sequence": {"id": text, "type_id": kind}}, *around[1]]

    used = {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in (*begin, *end)}
    return {
        "type": "TemplateProcessing", "single": pieces("A", 0), "pair": [*pieces("A", 0), *pieces("B", 1)],
        "special_tokens": used,
    }  # fmt: skip


def ids_around(post_processor: dict[str, Any] | None, special: dict[str, int]) -> tuple[list[int], list[int]]:
    """Return what a checked post-processor puts before and after one text."""
    pieces = [piece for piece, _ in around(post_processor, special)]
    text = pieces.index("A")
    return [i for i in pieces[:text] if isinstance(i, int)], [i for i in pieces[text:] if isinstance(i, int)]


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
