"""What is looked at before anything is exported: what is asked for, where it comes from and where it goes."""

import math
from collections.abc import Sequence
from pathlib import Path

from portlm.artifact import FORMAT, MANIFEST, half_weights, read_manifest
from portlm.compile.forms import PROFILES
from portlm.compile.halves import AUTO, FLOAT32
from portlm.compile.quantize import Scheme
from portlm.errors import FormatError, UsageError
from portlm.files import read_json
from portlm.models import CONFIG
from portlm.quantization import CACHES


def check_profiles(profiles: Sequence[str]) -> None:
    """Raise UsageError unless these are names of profiles, at least one."""
    if not profiles or set(profiles) - PROFILES.keys():
        raise UsageError(f"profiles must be among {', '.join(PROFILES)}, got {', '.join(profiles) or 'none'}")


def check_cache(cache: str | None) -> None:
    """Raise UsageError unless this is what keys and values may be kept in, or None."""
    if cache not in (None, FLOAT32, *CACHES):
        raise UsageError(f"cache must be {' or '.join((FLOAT32, *CACHES))}, got {cache!r}")


def carried(source: Path, weights: str, cache: str | None) -> tuple[str, str | None]:
    """Return in what weights and cache are to be, where a folder may be an artifact and says so by itself.

    What is not asked for is as the artifact's graphs have it: its checkpoint says nothing of a cache, and may be one of
    16 bits whose graphs were widened.

    Args:
        source: a checkpoint or an artifact.
        weights: of compile/halves.py.
        cache: one of CACHES, "float32", or None for what the artifact has.

    Returns:
        Weights, and the cache: one of CACHES, or None for float32.
    """
    path = source / MANIFEST
    said = read_json(path) if path.exists() else None
    if isinstance(said, dict) and said.get("format") == FORMAT:
        manifest = read_manifest(source)
        if weights == AUTO and not half_weights(manifest):
            weights = FLOAT32
        if cache is None and manifest.cache is not None:
            cache = manifest.cache.kind
    return weights, None if cache == FLOAT32 else cache


def stored_bytes(shape: Sequence[int], scheme: Scheme | None, bits: float = 32.0) -> int:
    """How many bytes of the weight file a parameter takes, about; `bits` of a number that is not quantized."""
    if scheme is not None and len(shape) == 2:
        bits = scheme.bits + 40 / scheme.group
    return math.ceil(math.prod(shape) * bits / 8)


def check_unquantized(source: Path) -> None:
    """Raise UsageError if a folder holds weights that are quantized already."""
    path = source / MANIFEST
    said = read_json(path) if path.exists() else None
    if isinstance(said, dict) and said.get("format") == FORMAT and said.get("quantization") is not None:
        raise UsageError(
            f"{source} is an artifact with quantized weights, which nothing else can be made of: give its checkpoint"
        )
    config = read_json(source / CONFIG)
    if isinstance(config, dict) and config.get("quantization_config") is not None:
        raise UsageError(
            f"{source / CONFIG} has a quantization_config: its weights are quantized already, give those before"
        )


def check_target(source: Path | None, target: Path) -> None:
    """Raise UsageError unless an artifact may be written to a folder: it is new, empty, or holds an artifact."""
    if source and (target.resolve() == source.resolve() or target.resolve() in source.resolve().parents):
        raise UsageError(f"{target} holds the checkpoint itself: choose another output folder")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target} exists and is not a folder: choose another output folder")
    if target.is_dir() and any(target.iterdir()):
        try:
            read_manifest(target)
        except FormatError as error:
            raise UsageError(
                f"{target} is not empty and not an artifact: choose another output folder, or empty this one"
            ) from error
