"""What a model's config.json says of the answers of its heads: the names of labels, and how their numbers are meant."""

from pathlib import Path
from typing import Any

from msgspec import Struct

from portlm.errors import ConfigError, FormatError
from portlm.files import read_json, shown

CONFIG = "config.json"
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
PROBLEMS = (SINGLE, MULTI, REGRESSION)  # values of problem_type
MAX_LABELS = 1 << 16
MAX_LABEL_CHARS = 1024
_MAX_CONFIG_BYTES = 1 << 20


class Labels(Struct, frozen=True):
    """How to read the numbers of a head.

    Attributes:
        names: of its numbers; () where nothing names them.
        problem: one of PROBLEMS, or None for what follows from the number of labels.
    """

    names: tuple[str, ...] = ()
    problem: str | None = None


def label_names(named: Any) -> tuple[str, ...]:
    """Return the names of id2label in order.

    Raises:
        ConfigError: It is no object from 0, 1, ... to texts.
    """
    by_id = {str(key): name for key, name in named.items()} if isinstance(named, dict) else {}
    names = [by_id.get(str(i)) for i in range(len(by_id))]
    wrong = [name for name in names if not isinstance(name, str) or not 1 <= len(name) <= MAX_LABEL_CHARS]
    if not 1 <= len(names) <= MAX_LABELS or wrong:
        raise ConfigError(f"id2label must name 0, 1, ... without a gap, each by a text, got {shown(named)}")
    return tuple(str(name) for name in names)


def check_problem(problem: Any) -> str | None:
    """Return problem_type.

    Raises:
        ConfigError: It is none of PROBLEMS, nor null.
    """
    if problem is not None and problem not in PROBLEMS:
        raise ConfigError(f"problem_type must be one of {', '.join(PROBLEMS)} or null, got {shown(problem)}")
    return None if problem is None else str(problem)


def read_labels(folder: Path) -> Labels:
    """Return what config.json of a model's folder says of labels, nothing if there is none.

    Raises:
        FormatError: It is damaged, or what it says cannot be.
    """
    path = folder / CONFIG
    if not path.exists():
        return Labels()
    data = read_json(path, max_bytes=_MAX_CONFIG_BYTES)
    if not isinstance(data, dict):
        raise FormatError(f"{path} must hold a JSON object")
    try:
        named = data.get("id2label")
        return Labels(() if named is None else label_names(named), check_problem(data.get("problem_type")))
    except ConfigError as error:
        raise FormatError(f"{path}: {error}") from error
