"""What an artifact holds, as its manifest says: the model, in which numbers, and the engines that run it here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from portlm.artifact import Manifest, ParityRow, half_weights, read_manifest
from portlm.flows.targets import Target
from portlm.flows.verify import ready_targets
from portlm.quantization import described, described_cache


@dataclass(frozen=True)
class Contents:
    """An artifact, and what this machine has engines for.

    Attributes:
        manifest: of the artifact.
        targets: every engine that runs here and has what it needs in the artifact.
    """

    manifest: Manifest
    targets: tuple[Target, ...]

    def certificate(self, target: Target, role: str = "decoder") -> ParityRow | None:
        """Return the row of the certificate for an engine; None if it was never measured."""
        wanted = (target.engine, target.device, target.profile, role)
        rows = (
            row for row in self.manifest.parity if (row.engine, row.device, row.profile, row.role) == wanted
        )
        return next(rows, None)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        manifest, engines = self.manifest, []
        for target in self.targets:
            place = {"engine": target.engine, "device": target.device, "profile": target.profile}
            for role in manifest.roles:
                row = self.certificate(target, role)
                engines.append({**place, "role": role, "certificate": row and msgspec.to_builtins(row)})
        return {
            "model": msgspec.to_builtins(manifest.model),
            "weights": weights(manifest),
            "quantization": manifest.quantization and msgspec.to_builtins(manifest.quantization),
            "cache": "float32" if manifest.cache is None else manifest.cache.kind,
            "engines": engines,
        }


def contents(folder: str | Path, note: Callable[[str], None] = lambda message: None) -> Contents:
    """Read what an artifact holds. Its files are not looked into.

    Args:
        folder: the artifact.
        note: called with a line for each engine that it was compiled for and that cannot run it here.

    Raises:
        FormatError: it has no manifest, or a damaged one.
    """
    manifest = read_manifest(folder)
    return Contents(manifest, tuple(ready_targets(manifest, note)))


def weights(manifest: Manifest) -> str:
    """Return the type of an artifact's matrices: int4, int8, float16, bfloat16 or float32, several joined by "and"."""
    if manifest.quantization is not None:
        return f"int{manifest.quantization.bits}"
    return " and ".join(half_weights(manifest)) or "float32"


def described_numbers(manifest: Manifest) -> list[str]:
    """Return lines for people: what weights and cache are where they are not float32, and what that costs."""
    lines = [] if manifest.quantization is None else described(manifest.quantization)
    if manifest.cache is not None:
        lines += described_cache(manifest.cache)
    if halves := half_weights(manifest):
        lines.append(f"weights of 16 bits ({' and '.join(halves)}), computed with in float32")
    return lines
