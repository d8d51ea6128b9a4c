"""Alignments as a picture: for each token of a target, how much a model looked at which token of the source."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from portlm.errors import EngineUnavailableError, UsageError
from portlm.files import write_atomic

KINDS = (".png", ".svg", ".pdf")
_MOST = 64  # alignments in one picture
_CELL = 0.22  # inches


class Drawn(NamedTuple):
    """One alignment.

    Attributes:
        weights: (T, S), a row for each token of the target.
        source: S tokens as text.
        target: T tokens as text.
    """

    weights: np.ndarray
    source: Sequence[str]
    target: Sequence[str]


def check_kind(path: Path) -> None:
    """Raise UsageError unless a picture's name ends in a kind that can be drawn."""
    if path.suffix.lower() not in KINDS:
        raise UsageError(f"{path}: a picture's name ends in {', '.join(KINDS)}")


def draw_alignments(drawn: Sequence[Drawn], path: Path) -> None:
    """Draw alignments below each other: white is all, black is nothing.

    Raises:
        EngineUnavailableError: matplotlib is not installed.
        UsageError: another kind of picture, or more alignments than fit.
        StorageError: the disk refuses the picture.
    """
    check_kind(path)
    if not 0 < len(drawn) <= _MOST:
        raise UsageError(f"a picture has 1 to {_MOST} alignments, got {len(drawn)} sources")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EngineUnavailableError(
            "no picture: matplotlib is not installed, try pip install portlm[report]"
        ) from error
    width = 1.5 + _CELL * max(len(each.source) for each in drawn)
    heights = [1 + _CELL * len(each.target) for each in drawn]
    figure = Figure(figsize=(max(width, 3), sum(heights)), layout="constrained")
    places = figure.subplots(len(drawn), 1, squeeze=False, height_ratios=heights)
    for axes, each in zip(places[:, 0], drawn, strict=True):
        axes.imshow(each.weights, cmap="gray", vmin=0, vmax=1)
        axes.set_xticks(range(len(each.source)), [_shown(token) for token in each.source], rotation=90)
        axes.set_yticks(range(len(each.target)), [_shown(token) for token in each.target])
        axes.tick_params(labelsize=7, labeltop=True, labelbottom=False)
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:].lower(), dpi=120)
    write_atomic(path, content.getvalue())


def _shown(token: str) -> str:
    """A token as a label: a space can be seen, and nothing in it is a formula or a control character."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in token)
    return text.replace(" ", "\N{OPEN BOX}").replace("$", r"\$") or "\N{EMPTY SET}"
