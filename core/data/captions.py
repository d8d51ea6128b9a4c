"""Pictures and what is said of them, read from a file."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from portlm.data.text import read_text
from portlm.errors import FormatError, UsageError
from portlm.files import safe_join

_KINDS = (".tsv", ".jsonl")
_COLUMNS = "a picture, a tab and a text are wanted, or a picture, a prompt and a text"


class Caption(NamedTuple):
    """A picture and a text.

    Attributes:
        picture: Its file.
        text: What is said of it.
        prompt: What stands between the two and is not learned; "" for nothing.
    """

    picture: Path
    text: str
    prompt: str = ""


def read_captions(path: str | Path) -> list[Caption]:
    """Read captions from a file.

    Args:
        path: Lines of ``picture<tab>text`` or ``picture<tab>prompt<tab>text`` (.tsv), or of JSON with "image", "text"
            and, where there is one, "prompt" (.jsonl). Pictures are named from the folder of the file on, with forward
            slashes, and lie in it.

    Raises:
        FormatError: The file cannot be read, a line is no caption, or a picture is missing or not in the folder.
        UsageError: A file of another kind.
    """
    kind = Path(path).suffix
    if kind not in _KINDS:
        raise UsageError(f"{path}: captions come from a file that ends in {' or '.join(_KINDS)}")
    read = _of_json if kind == ".jsonl" else _of_columns
    lines, found = read_text(str(path)).removesuffix("\n").split("\n"), []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        name, prompt, text = read(line, where)
        if not text.strip():
            raise FormatError(f"{where}: the text is empty")
        try:
            picture = safe_join(Path(path).parent, name)
        except FormatError as error:
            raise FormatError(f"{where}: {error}") from error
        if not picture.is_file():
            raise FormatError(f"{where}: there is no picture {picture}")
        found.append(Caption(picture, text, prompt))
    return found


def _of_columns(line: str, where: str) -> tuple[str, str, str]:
    columns = line.split("\t")
    if len(columns) not in (2, 3):
        raise FormatError(f"{where}: {_COLUMNS}, got {len(columns)} columns")
    return columns[0], columns[1] if len(columns) == 3 else "", columns[-1]


def _of_json(line: str, where: str) -> tuple[str, str, str]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise FormatError(f"{where}: no JSON ({error})") from error
    parts: list[Any] = (
        [found.get(key) for key in ("image", "prompt", "text")] if isinstance(found, dict) else [None]
    )
    if len(parts) == 3 and parts[1] is None:
        parts[1] = ""
    if not all(isinstance(part, str) for part in parts):
        raise FormatError(
            f'{where}: an object with "image" and "text", and "prompt" if there is one, is wanted'
        )
    name, prompt, text = map(str, parts)
    return name, prompt, text
