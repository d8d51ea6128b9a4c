"""The rotary positions of a config.json, which Hugging Face has kept in several places.

Transformers 4 read the base and the rotated share of a head beside the other keys, and scaling in rope_scaling;
transformers 5 reads all of it in rope_parameters, or in rope_scaling where that holds anything, and what is missing
there beside the other keys. Where several places speak they must agree, because versions differ in which they believe.
"""

from typing import Any

from portlm.errors import ConfigError
from portlm.files import shown
from portlm.models.config_json import Reader

_BLOCKS = ("rope_scaling", "rope_parameters")
_BASE, _SHARE = "rope_theta", "partial_rotary_factor"


def rotary(read: Reader, *, base: str, share: str, default_share: float) -> tuple[float, float]:
    """Return the base of the frequencies, and which share of each head is rotated.

    Args:
        read: The config.json.
        base: The key beside the blocks that transformers reads for the base in this family.
        share: The same for the share.
        default_share: The share where nothing says it.

    Raises:
        ConfigError: Scaled positions, or places that contradict each other. They are named.
    """
    blocks = {key: _block(read, key) for key in _BLOCKS}
    return _agreed(read, blocks, _BASE, base, 10000.0), _agreed(read, blocks, _SHARE, share, default_share)


def _block(read: Reader, key: str) -> dict[str, Any]:
    """Return what one of the blocks says of base and share, after a look at its type."""
    value = read.raw(key, 'unscaled: rope_type "default", or "linear" by a factor of 1')
    block = (
        {name: inner for name, inner in value.items() if inner is not None} if isinstance(value, dict) else {}
    )
    kinds = [block[name] for name in ("rope_type", "type") if name in block] or ["default"]
    factor = block.get("factor", None if "linear" in kinds else 1)
    known = {"rope_type", "type", "factor", _BASE, _SHARE}
    one_kind = kinds[0] in ("default", "linear") and all(kind == kinds[0] for kind in kinds)
    unscaled = one_kind and type(factor) in (int, float) and factor == 1
    if not isinstance(value, dict | None) or block.keys() - known or not unscaled:
        raise ConfigError(
            f"{key} = {shown(value)} is not supported: portlm computes unscaled rotary positions only, rope_type "
            "'default', or 'linear' by a factor of 1"
        )
    return block


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
