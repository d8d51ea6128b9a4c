"""Which field of a file is wrong: what msgspec says of plain data that are no such struct, for whoever wrote them."""

import re
from typing import Any

import msgspec

from portlm.files import shown

__all__ = ["explain"]


def explain(data: Any, kind: type, message: str) -> str:
    """One line of what msgspec says of data that are no such struct: where, what was expected, and what is there.

    It names an entry of an object "[...]"; which one is found by converting with half of the entries, again and again,
    so that data are changed.
    """
    problem, _, place = message.partition(" - at ")
    value, where = data, ""
    steps: list[tuple[str, str]] = re.findall(r"\.(\w+)|\[(\d+|\.\.\.)\]", place)
    if place.startswith("`key`"):
        steps.append(("", "key"))
    for name, item in steps:
        if name:
            value, where = value[name], f"{where}.{name}".lstrip(".")
        elif item.isdigit():
            value, where = value[int(item)], f"{where}[{item}]"
        else:
            entries = list(value.items())
            while len(entries) > 1:
                value.clear()
                value.update(entries[: len(entries) // 2])
                fails = _message(data, kind) == message
                entries = list(value.items()) if fails else entries[len(entries) // 2 :]
            value.clear()
            value.update(entries)
            [(key, value)] = entries
            where = f"{where}[{shown(key)}]"
            if item == "key":
                value, where = key, f"the key {where}"
    where = where or "the file"
    if missing := re.fullmatch(r"Object missing required field `(.*)`", problem):
        return f"{where} lacks the key {missing[1]!r}"
    wanted = problem.partition(", got `")[0].replace("Expected", "must be")
    return f"{where} {wanted}, got {shown(value)}"


def _message(data: Any, kind: type) -> str:
    try:
        msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        return str(error)
    return ""
