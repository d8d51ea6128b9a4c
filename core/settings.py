"""Settings: frozen dataclasses filled from defaults, presets, a TOML file and ``key=value`` overrides.

A settings class is a frozen dataclass whose fields are numbers, strings, booleans, tuples of those, or
further settings classes (sections). Three sources may fill it, the later one winning: a preset (a nested
dictionary), a TOML file, and overrides such as ``optimizer.lr=3e-4``. Nothing is guessed: an unknown key,
a wrong type or a value out of range is a :class:`~portlm.errors.ConfigError` that names the key, where it
came from and, for a misspelt key, the nearest ones that exist.
"""

import dataclasses
import difflib
import json
import math
import operator
import re
import tomllib
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from portlm.errors import ConfigError

T = TypeVar("T")
Tree = dict[str, Any]

_MAX_FILE_BYTES = 1 << 20
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_ERROR_PATH = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<where>[^`]*)`)?$", re.DOTALL)


def load(
    cls: type[T],
    *,
    file: str | Path | None = None,
    overrides: Iterable[str | tuple[str, Any]] = (),
    preset: Mapping[str, Any] | None = None,
) -> T:
    """Return an instance of the settings class ``cls``.

    Args:
        cls: A frozen dataclass, possibly with sections that are frozen dataclasses.
        file: A TOML file, or None.
        overrides: ``dotted.key=value`` strings, whose values are TOML or bare words for strings; or pairs of a
            dotted key and a value.
        preset: A nested dictionary applied before the file.

    Raises:
        ConfigError: An unknown key, a wrong type, a value out of range, or a file that is no TOML.
    """
    keys = known_keys(cls)
    tree: Tree = {}
    origin: dict[str, str] = {}
    sources: list[tuple[str, Tree]] = []
    if preset is not None:
        sources.append(("the given settings", _copy(preset)))
    if file is not None:
        sources.append((str(file), _read_toml(Path(file))))
    for name, source in sources:
        for key, value in _leaves(source, keys):
            _assign(tree, key, value, keys, name, origin)
    for override in overrides:
        if isinstance(override, tuple):
            _assign(tree, *override, keys, "an argument", origin)
            continue
        key, separator, value = override.partition("=")
        if not separator:
            raise ConfigError(f"override {override!r} has no '=': write key=value, for example seed=1")
        key = key.strip()
        _check_key(key, keys, f"override {override!r}")
        _assign(tree, key, parse_value(value.strip(), keys[key]), keys, f"override {override!r}", origin)
    return _convert(tree, cls, keys, origin)


def known_keys(cls: type) -> dict[str, Any]:
    """Return every dotted leaf key of a settings class with its annotated type, in order of declaration."""
    keys: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            keys.update(
                {f"{field.name}.{key}": inner for key, inner in known_keys(typing.cast(type, kind)).items()}
            )
        else:
            keys[field.name] = kind
    return keys


def parse_value(text: str, kind: Any) -> Any:
    """Read the right-hand side of an override: a TOML value, or a bare word for a string.

    A field of type str takes the text as it stands (unless it is quoted), so ``tokenizer=2048`` is a name
    there and not a number.
    """
    if kind is str and not text.startswith(('"', "'")):
        return text
    try:
        return tomllib.loads(f"value = {text}\n")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text


def to_dict(settings: Any) -> Tree:
    """Return the nested dictionary of a settings object, tuples as lists: what :func:`load` reads back."""
    tree: Tree = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        tree[field.name] = list(value) if isinstance(value, tuple) else value
    return tree


def to_toml(settings: Any) -> str:
    """Return the settings as TOML text that :func:`load` reads back to an equal object."""
    lines: list[str] = []
    _emit(to_dict(settings), (), lines)
    return "\n".join(lines).strip() + "\n"


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Return ``{dotted key: (old value, new value)}`` for every leaf where two settings objects differ."""
    pairs = {key: (look_up(old, key), look_up(new, key)) for key in known_keys(type(old))}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def look_up(settings: Any, key: str) -> Any:
    """Return the value of a dotted key."""
    return operator.attrgetter(key)(settings)


def require_range(
    name: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False
) -> None:
    """Raise ConfigError unless a value is finite and in [low, high], or in (low, high] with ``open_low``."""
    bound = f"above {low:g}" if open_low else f"at least {low:g}"
    if high != math.inf:
        bound += f" and at most {high:g}"
    inside = math.isfinite(value) and (low < value if open_low else low <= value) and value <= high
    if not inside:
        raise ConfigError(f"{name} must be {bound}, got {value!r}")


def _read_toml(path: Path) -> Tree:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigError(f"{path} is larger than {_MAX_FILE_BYTES} bytes: this is no configuration file")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give an existing TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _copy(tree: Mapping[str, Any]) -> Tree:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def _leaves(tree: Tree, keys: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        is_section = any(known.startswith(f"{key}.") for known in keys)
        if is_section and isinstance(value, dict):
            yield from _leaves(value, keys, f"{key}.")
        else:
            yield key, value


def _check_key(key: str, keys: Mapping[str, Any], source: str) -> None:
    if key in keys:
        return
    inside = [known for known in keys if known.startswith(f"{key}.")]
    if inside:
        raise ConfigError(f"{source}: {key} is a section, not a value; its keys are {', '.join(inside)}")
    near = difflib.get_close_matches(key, keys, n=3, cutoff=0.5)
    # A key under the wrong section is as common as a misspelt one: compare the last parts as well.
    last = key.rpartition(".")[2]
    near += [known for known in keys if known.rpartition(".")[2] == last and known not in near]
    hint = f"did you mean {' or '.join(near[:3])}?" if near else f"the keys are {', '.join(keys)}"
    raise ConfigError(f"{source}: unknown key {key!r}; {hint}")


def _assign(
    tree: Tree, key: str, value: Any, keys: Mapping[str, Any], source: str, origin: dict[str, str]
) -> None:
    _check_key(key, keys, source)
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
    node[leaf] = value
    origin[key] = source


def _convert(tree: Tree, cls: type[T], keys: Mapping[str, Any], origin: Mapping[str, str]) -> T:
    try:
        return msgspec.convert(tree, cls, strict=True)
    except msgspec.ValidationError as error:
        match = _ERROR_PATH.match(str(error))
        what, where = (match["what"], match["where"] or "") if match else (str(error), "")
        if isinstance(error.__cause__, ConfigError):
            raise ConfigError(what) from error
        key = where.partition("[")[0]
        choices = typing.get_args(keys.get(key)) if "enum" in what else ()
        if choices:
            what = f"expected one of {', '.join(map(str, choices))}, got {_reached(tree, key)!r}"
        source = f" (from {origin[key]})" if key in origin else ""
        raise ConfigError(f"{where}: {what[:1].lower()}{what[1:]}{source}") from error


def _reached(tree: Tree, key: str) -> Any:
    node: Any = tree
    for part in key.split("."):
        node = node[part]
    return node


def _emit(tree: Tree, path: tuple[str, ...], lines: list[str]) -> None:
    sections = {key: value for key, value in tree.items() if isinstance(value, dict)}
    if path:
        lines += ["", f"[{'.'.join(map(_toml_key, path))}]"]
    lines += [
        f"{_toml_key(key)} = {_toml_value(value)}" for key, value in tree.items() if key not in sections
    ]
    for key, value in sections.items():
        _emit(value, (*path, key), lines)


def _toml_key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _toml_string(key)


def _toml_string(text: str) -> str:
    # JSON escapes are TOML escapes, save that TOML also wants DEL escaped and knows no surrogates.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_value(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            return _toml_string(value)
        case list():
            return f"[{', '.join(map(_toml_value, value))}]"
    raise TypeError(f"no TOML form for a value of type {type(value).__name__}")
