"""Settings: frozen dataclasses filled from defaults, presets, a TOML file and ``key=value`` overrides.

A settings class is a frozen dataclass whose fields are numbers, strings, booleans, tuples of those, or
further settings classes (sections). The keys of a section may depend on one of them (:class:`Variants`).
Three sources may fill it, the later one winning: a preset (a nested dictionary), a TOML file, and overrides
such as ``optimizer.lr=3e-4``. Nothing is guessed: an unknown key, a wrong type or a value out of range is a
:class:`~portlm.errors.ConfigError` that names the key, where it came from and, for a misspelt key, the nearest
ones that exist.
"""

import abc
import dataclasses
import difflib
import json
import math
import operator
import re
import tomllib
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import msgspec

from portlm.errors import ConfigError

T = TypeVar("T")
Tree = dict[str, Any]

_MAX_FILE_BYTES = 1 << 20
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_ERROR_PATH = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<where>[^`]*)`)?$", re.DOTALL)


class Variants(abc.ABC):
    """A section whose keys depend on the value of one of them, its tag: ``[model]`` on ``family``.

    A settings class has a field of a subclass of this one; the values of that field are instances of the classes
    that :meth:`variant` returns. A key that only another variant knows is an error, unless it has its default there,
    which says nothing: so a file written with the keys of all variants is read as well.

    Attributes:
        tag: The field that chooses.
    """

    tag: ClassVar[str]

    @classmethod
    @abc.abstractmethod
    def variants(cls) -> tuple[str, ...]:
        """Return the values of the tag, the default first."""

    @classmethod
    @abc.abstractmethod
    def variant(cls, name: str) -> type:
        """Return the class for one of them: a frozen dataclass, a subclass of this, with the tag as a field."""


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
    sections = _sections(cls)
    given: list[_Given] = []
    if preset is not None:
        given += _leaves(_copy(preset), sections, "the given settings")
    if file is not None:
        given += _leaves(_read_toml(Path(file)), sections, str(file))
    given += [_override(override) for override in overrides]
    chosen = _choose(sections, given)
    keys = known_keys(cls, chosen)
    tree: Tree = {}
    origin: dict[str, str] = {}
    for item in given:
        if item.key not in keys and _is_default_elsewhere(item, sections, chosen):
            continue
        _check_key(item.key, keys, item.source)
        _assign(tree, item.key, item.read(keys[item.key]))
        origin[item.key] = item.source
    return _convert(tree, cls, sections, chosen, keys, origin)


def said(
    cls: type, key: str, *, file: str | Path | None = None, overrides: Iterable[str | tuple[str, Any]] = ()
) -> Any:
    """Return the value that :func:`load` would take for a key from a file and overrides, None if they say nothing.

    It is not checked. For presets that depend on it.

    Raises:
        ConfigError: A file that is no TOML, or an override that is none.
    """
    given = [] if file is None else [*_leaves(_read_toml(Path(file)), _sections(cls), str(file))]
    given += [_override(override) for override in overrides]
    found = [item.read(known_keys(cls)[key]) for item in given if item.key == key]
    return found[-1] if found else None


def known_keys(cls: type, chosen: Mapping[str, str] = {}, prefix: str = "") -> dict[str, Any]:
    """Return every dotted leaf key of a settings class with its annotated type, in order of declaration.

    Args:
        cls: The settings class.
        chosen: Dotted name of a section with variants to the one that counts; the default one otherwise.
        prefix: In front of every key.
    """
    keys: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, key = hints[field.name], f"{prefix}{field.name}"
        if _has_variants(kind):
            kind = kind.variant(chosen.get(key, kind.variants()[0]))
        if dataclasses.is_dataclass(kind):
            keys.update(known_keys(typing.cast(type, kind), chosen, f"{key}."))
        else:
            keys[key] = kind
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
    """Return ``{dotted key: (old value, new value)}`` for every leaf where two settings objects differ.

    The value of a key that only the other one has is None.
    """
    before, after = dict(_values(old)), dict(_values(new))
    pairs = {key: (before.get(key), after.get(key)) for key in {**before, **after}}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def look_up(settings: Any, key: str) -> Any:
    """Return the value of a dotted key."""
    return operator.attrgetter(key)(settings)


def default(cls: type, key: str) -> Any:
    """Return the default value of a dotted key of a settings class, without making anything but its own section."""
    name, _, rest = key.partition(".")
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    if not rest:
        return field.default
    assert field.default_factory is not dataclasses.MISSING, "a section has a default factory"
    return look_up(field.default_factory(), rest)


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


@dataclasses.dataclass(frozen=True)
class _Given:
    """One value that a source gives to a key; as text where only the key's type can tell how to read it."""

    key: str
    value: Any
    source: str
    is_text: bool = False

    def read(self, kind: Any) -> Any:
        """Return the value for a key of this type."""
        return parse_value(self.value, kind) if self.is_text else self.value


def _override(override: str | tuple[str, Any]) -> _Given:
    if isinstance(override, tuple):
        return _Given(*override, "an argument")
    key, separator, value = override.partition("=")
    if not separator:
        raise ConfigError(f"override {override!r} has no '=': write key=value, for example seed=1")
    return _Given(key.strip(), value.strip(), f"override {override!r}", is_text=True)


def _leaves(tree: Tree, sections: Mapping[str, type], source: str, prefix: str = "") -> Iterator[_Given]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in sections and isinstance(value, dict):
            yield from _leaves(value, sections, source, f"{key}.")
        else:
            yield _Given(key, value, source)


def _has_variants(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Variants)


def _sections(cls: type, prefix: str = "") -> dict[str, type]:
    """Return the class of every section by its dotted name."""
    sections: dict[str, type] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, key = hints[field.name], f"{prefix}{field.name}"
        if _has_variants(kind):
            sections[key] = kind
        elif dataclasses.is_dataclass(kind):
            sections |= {key: typing.cast(type, kind), **_sections(typing.cast(type, kind), f"{key}.")}
    return sections


def _choose(sections: Mapping[str, type], given: Iterable[_Given]) -> dict[str, str]:
    """Return which variant of each section that has some is asked for."""
    chosen = {}
    for section, kind in sections.items():
        if not issubclass(kind, Variants):
            continue
        names, source = kind.variants(), ""
        value: Any = names[0]
        for item in given:
            if item.key == f"{section}.{kind.tag}":
                value, source = item.read(str), item.source
        if value not in names:
            raise ConfigError(
                f"{section}.{kind.tag}: expected one of {', '.join(names)}, got {value!r} (from {source})"
            )
        chosen[section] = value
    return chosen


def _is_default_elsewhere(item: _Given, sections: Mapping[str, type], chosen: Mapping[str, str]) -> bool:
    """Say whether an unknown key is one of another variant, with its default there.

    Raises:
        ConfigError: It is one of another variant, with another value.
    """
    section, _, name = item.key.rpartition(".")
    if section not in chosen:
        return False
    kind = typing.cast(type[Variants], sections[section])
    classes: list[Any] = [kind.variant(other) for other in kind.variants()]
    fields = [field for cls in classes for field in dataclasses.fields(cls) if field.name == name]
    if fields and all(item.read(type(field.default)) != field.default for field in fields):
        raise ConfigError(
            f"{item.key} does not apply to the {kind.tag} {chosen[section]}: leave it out (from {item.source})"
        )
    return bool(fields)


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


def _assign(tree: Tree, key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
    node[leaf] = value


def _convert(
    tree: Tree,
    cls: type[T],
    sections: Mapping[str, type],
    chosen: Mapping[str, str],
    keys: Mapping[str, Any],
    origin: Mapping[str, str],
) -> T:
    for section, name in chosen.items():
        *outer, last = section.split(".")
        node = tree
        for part in outer:
            node = node.setdefault(part, {})
        kind = typing.cast(type[Variants], sections[section]).variant(name)
        node[last] = _convert_one(node.get(last, {}), kind, f"{section}.", keys, origin)
    return _convert_one(tree, cls, "", keys, origin)


def _convert_one(
    tree: Tree, cls: type[T], prefix: str, keys: Mapping[str, Any], origin: Mapping[str, str]
) -> T:
    try:
        return msgspec.convert(tree, cls, strict=True)
    except msgspec.ValidationError as error:
        match = _ERROR_PATH.match(str(error))
        what, where = (match["what"], match["where"] or "") if match else (str(error), "")
        if isinstance(error.__cause__, ConfigError):
            raise ConfigError(what) from error
        key = where.partition("[")[0]
        choices = typing.get_args(keys.get(f"{prefix}{key}")) if "enum" in what else ()
        if choices:
            what = f"expected one of {', '.join(map(str, choices))}, got {_reached(tree, key)!r}"
        source = f" (from {origin[prefix + key]})" if prefix + key in origin else ""
        raise ConfigError(f"{prefix}{where}: {what[:1].lower()}{what[1:]}{source}") from error


def _values(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf of a settings object under its dotted key, in order of declaration."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from _values(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


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
