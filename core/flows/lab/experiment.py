"""What an experiment of the lab is: a claim of a paper at a size that one core computes in minutes, and its bars."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

_RELATIONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
}


@dataclass(frozen=True)
class Bar:
    """What a figure must reach with every seed.

    Attributes:
        figure: Its name in what :meth:`Experiment.run` returns.
        relation: One of >=, <=, >, < and ==.
        bound: What it is compared with.

    Raises:
        ValueError: Another relation, or a bound that is not finite.
    """

    figure: str
    relation: str
    bound: float

    def __post_init__(self) -> None:
        if self.relation not in _RELATIONS:
            raise ValueError(
                f"the bar of {self.figure}: relation must be one of {', '.join(_RELATIONS)}, got {self.relation!r}"
            )
        if not math.isfinite(self.bound):
            raise ValueError(f"the bar of {self.figure}: bound must be finite, got {self.bound}")

    def met(self, value: float) -> bool:
        """Say whether a figure is on the right side of the bound; NaN never is."""
        return _RELATIONS[self.relation](value, self.bound)

    def __str__(self) -> str:
        return f"{self.figure} {self.relation} {self.bound:g}"


class Experiment(Protocol):
    """One claim, the models that are compared for it, and what must come out.

    An instance holds no state: everything that is drawn at random follows from the seed that :meth:`run` is given.
    """

    name: ClassVar[str]
    """Of ``portlm lab NAME``: lower case, words joined by hyphens."""
    shows: ClassVar[str]
    """The claim, in one sentence."""
    source: ClassVar[str]
    """The paper that makes it."""
    seeds: ClassVar[tuple[int, ...]]
    """What it is run with; every one must meet every bar."""
    bars: ClassVar[tuple[Bar, ...]]
    """At least one."""

    def run(self, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
        """Measure with one seed.

        Args:
            seed: Of everything random.
            tell: Takes a line about how far it has come.

        Returns:
            What JSON can hold: the figures by name, those of the bars among them, and what the picture needs.
        """

    def draw(self, results: Mapping[int, dict[str, Any]], path: Path) -> None:
        """Draw what was measured, by seed, as a PNG file."""


@runtime_checkable
class DataExperiment(Experiment, Protocol):
    """One whose data no generator draws: they are in a folder that ``--data`` names."""

    needs: ClassVar[str]
    """What the folder must hold, as the end of a sentence."""

    digest: str
    """What identifies the data, once they are given."""

    def given(self, data: Path, work: Path) -> DataExperiment:
        """Return the experiment with its data.

        Args:
            data: The folder of the data.
            work: A folder for what is not finished, from which a call that was interrupted goes on.

        Raises:
            UsageError: The folder holds something else.
        """
