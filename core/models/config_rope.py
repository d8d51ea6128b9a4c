"""The rotary positions of a config.json, which Hugging Face has kept in several places.

Transformers 4 read the base and the rotated share of a head beside the other keys, and scaling in rope_scaling;
transformers 5 reads all of it in rope_parameters, or in rope_scaling where that holds anything, and what is missing
there beside the other keys. Where several places speak they must agree, because versions differ in which they believe.
"""

import dataclasses
from typing import Any, NamedTuple

from portlm.errors import ConfigError
from portlm.files import shown
from portlm.models.config_json import Reader
from portlm.models.rope import ALL_KINDS, KINDS, Linear, Scaling

_BLOCKS = ("rope_scaling", "rope_parameters")
_OLD = {"su": "longrope"}  # what kinds were called once
_BASE, _SHARE, _ORIGINAL = "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"


class Rotation(NamedTuple):
    """What a config.json says of rotary positions.

    Attributes:
        theta: The base of the frequencies.
        share: Which share of each head is rotated.
        scaling: How they are stretched, None where they are not.
    """

    theta: float
    share: float
    scaling: Scaling | None


def rotary(
    read: Reader,
    context_length: int,
    *,
    base: str = _BASE,
    share: str = _SHARE,
    default_base: float = 10000.0,
    default_share: float = 1.0,
    kinds: tuple[str, ...] = tuple(KINDS),
) -> Rotation:
    """Return the rotary positions of a config.json.

    Args:
        read: The config.json.
        context_length: Stands in for a missing original length.
        base: The key beside the blocks that transformers reads for the base in this family.
        share: The same for the share.
        default_base: The base where nothing says it.
        default_share: The share where nothing says it.
        kinds: How this family's positions may be scaled.

    Raises:
        ConfigError: Positions scaled in another way, or places that contradict each other. They are named.
    """
    blocks = {key: _block(read, key, kinds) for key in _BLOCKS}
    theta = _agreed(read, blocks, _BASE, base, default_base)
    part = _agreed(read, blocks, _SHARE, share, default_share)
    said = {key: _scaling(key, block, context_length) for key, block in blocks.items() if _speaks(block)}
    if len(set(said.values())) > 1:
        raise ConfigError(
            f"rope_scaling = {shown(blocks['rope_scaling'])} and rope_parameters = {shown(blocks['rope_parameters'])} "
            "scale positions differently, and versions of transformers differ in which they believe: remove the wrong "
            "one"
        )
    return Rotation(theta, part, next(iter(said.values()), None))


def to_hf(theta: float, scaling: Scaling | None, *, base: str = _BASE, **more: float) -> dict[str, Any]:
    """Return the keys that say it.

    Transformers 4 and most other engines read ``base`` and rope_scaling, transformers 5 rope_parameters.
    """
    block = {"rope_type": "default"} if scaling is None else scaling.to_hf()
    scaled = {} if scaling is None else {"rope_scaling": block}
    return {base: theta, **scaled, "rope_parameters": {**block, _BASE: theta, **more}}


def _speaks(block: dict[str, Any]) -> bool:
    """Say whether a block says how positions are scaled."""
    return bool(block.keys() - {_BASE, _SHARE})


def _block(read: Reader, key: str, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Return what one of the blocks says, without nulls, after a look at its names."""
    what = f'rope_type "default"{"".join(f", {chr(34)}{kind}{chr(34)}" for kind in kinds)} and what belongs to it'
    value = read.raw(key, what)
    block = (
        {name: inner for name, inner in value.items() if inner is not None} if isinstance(value, dict) else {}
    )
    said = [block[name] for name in ("rope_type", "type") if name in block] or ["default"]
    kind = said[0] if all(name == said[0] for name in said) and isinstance(said[0], str) else ""
    kind = _OLD.get(kind, kind)
    known = {"rope_type", "type", _BASE, _SHARE}
    if kind in kinds:
        known |= {field.name for field in dataclasses.fields(ALL_KINDS[kind])}
    elif kind == "default" and block.get("factor", 1) == 1:
        known |= {"factor"}
    if not isinstance(value, dict | None) or block.keys() - known or kind not in ("default", *kinds):
        raise ConfigError(
            f"{key} = {shown(value)} is not supported: portlm computes rope_type 'default'"
            f"{''.join(f', {name!r}' for name in kinds)}, each with the keys that belong to it, and no others"
        )
    return block


def _scaling(key: str, block: dict[str, Any], context_length: int) -> Scaling | None:
    """Return what a block asks for."""
    name = block.get("rope_type", block.get("type", "default"))
    if name == "default":
        return None
    kind = ALL_KINDS[_OLD.get(name, name)]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values = {field: block[field] for field in fields if field in block}
    if _ORIGINAL in fields:
        values.setdefault(_ORIGINAL, context_length)
    missing = [n for n, f in fields.items() if n not in values and f.default is dataclasses.MISSING]
    if missing:
        raise ConfigError(f"{key} = {shown(block)} is not supported: {name} needs {', '.join(missing)}")
    try:
        scaling = kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{key} = {shown(block)} is not supported: {error}") from error
    return None if scaling == Linear(1) else scaling


def _agreed(read: Reader, blocks: dict[str, dict[str, Any]], inner: str, outer: str, default: float) -> float:
    """Return the number that transformers reads, after every other place was found to say the same."""
    places = {outer: read.optional_number(outer, f"a number; {default:g} if missing here and in the blocks")}
    if inner != outer:
        places[inner] = read.optional_number(inner, f"the same as {outer}")
    places |= {f"{key}.{inner}": Reader(block).optional_number(inner) for key, block in blocks.items()}
    block = next((key for key in _BLOCKS if blocks[key]), _BLOCKS[1])
    decisive = f"{block}.{inner}" if places[f"{block}.{inner}"] is not None else outer
    value, said = places[decisive], "is"
    if value is None:
        value, said = default, "is missing, which stands for"
    for place, other in places.items():
        if other is not None and other != value:
            raise ConfigError(
                f"{place} is {other:g}, but {decisive} {said} {value:g}, and versions of transformers differ in which "
                "they believe: make them equal, or remove the wrong one"
            )
    return value
