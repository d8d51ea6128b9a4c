"""The compiled kernels, and the one switch that keeps every op from them. Loads no PyTorch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

try:
    from portlm import _C
except ImportError:  # a source tree that was not built: every op runs its reference
    _C = None  # type: ignore[assignment]

__all__ = ["available", "kernels", "without_kernels"]

kernels: Any = _C
"""The compiled kernels (``portlm._C``), or None where they were not built."""

# Read once, so that one process has one answer.
_enabled = os.environ.get("PORTLM_NO_KERNELS", "0") in ("", "0")


def available() -> bool:
    """Say whether ops may call kernels: they were built, PORTLM_NO_KERNELS is not set, and nobody switched them off."""
    return _enabled and kernels is not None


@contextmanager
def without_kernels() -> Iterator[None]:
    """Make every op run its reference inside the block: PyTorch's and NumPy's own operators, and nothing of ours.

    Affects the whole process, so it is for proofs and tests, not for serving.
    """
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before
