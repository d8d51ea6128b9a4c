"""The learning rate of each step: linear warm-up, then a fall to a floor, one without end, or a slanted triangle.

The cosine is that of SGDR without restarts (Loshchilov and Hutter 2017), as GPT-3 (Brown et al. 2020) used it; the line
is how GPT-1 and BERT were fine-tuned; the inverse square root is the Transformer's (Vaswani et al. 2017,
arXiv:1706.03762, section 5.3); the triangle is ULMFiT's (Howard and Ruder 2018, arXiv:1801.06146).
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class WarmupCosine:
    """Learning rate as a pure function of the step, so that a resumed run needs no state for it.

    Step ``s`` of the warm-up (counted from 0) uses ``peak * (s + 1) / warmup``: the first step already
    learns, and the last warm-up step reaches the peak. From there a cosine falls to ``floor``, which the
    last step uses; any later step stays on the floor.
    """

    peak: float
    floor: float
    warmup: int
    steps: int

    def __call__(self, step: int) -> float:
        """Return the learning rate of the step with this index (0 is the first)."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        done = _share_done(step, self.warmup, self.steps)
        return self.floor + 0.5 * (self.peak - self.floor) * (1.0 + math.cos(math.pi * done))


@dataclass(frozen=True)
class WarmupLinear:
    """As WarmupCosine, but the rate falls along a line."""

    peak: float
    floor: float
    warmup: int
    steps: int

    def __call__(self, step: int) -> float:
        """Return the learning rate of the step with this index (0 is the first)."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        return self.floor + (self.peak - self.floor) * (1.0 - _share_done(step, self.warmup, self.steps))


@dataclass(frozen=True)
class InverseSqrt:
    """As WarmupCosine up to the peak; from there the rate falls with the square root of the step, to no floor.

    Step n, counted from 1, has ``peak min(n / warmup, sqrt(warmup / n))``. That is the paper's
    ``d ** -0.5 min(n ** -0.5, n warmup ** -1.5)`` for a peak of ``(d warmup) ** -0.5``, d being the width.
    """

    peak: float
    warmup: int  # at least 1

    def __call__(self, step: int) -> float:
        """Return the learning rate of the step with this index (0 is the first)."""
        n = step + 1
        return self.peak * min(n / self.warmup, math.sqrt(self.warmup / n))


@dataclass(frozen=True)
class SlantedTriangle:
    """A short rise and a long fall: cut steps up from ``peak / ratio``, and down to it in all others.

    With T steps, ``p = t / cut`` for t < cut, else ``1 - (t - cut) / (T - cut)``, and the rate of step t is
    ``peak (1 + p (ratio - 1)) / ratio``. The paper writes ``cut (1 / cut_frac - 1)`` for ``T - cut``, which is the same
    where cut is T times cut_frac without rounding.
    """

    peak: float
    ratio: float
    cut: int
    steps: int

    def __call__(self, step: int) -> float:
        """Return the learning rate of the step with this index (0 is the first)."""
        falling = max(self.steps - self.cut, 1)
        p = step / self.cut if step < self.cut else max(1.0 - (step - self.cut) / falling, 0.0)
        return self.peak * (1.0 + p * (self.ratio - 1.0)) / self.ratio


def _share_done(step: int, warmup: int, steps: int) -> float:
    """How much of the way down is done, from 0 to 1."""
    # The peak itself belongs to the last warm-up step, or to step 0 when there is no warm-up.
    start = max(warmup - 1, 0)
    span = steps - 1 - start
    return min((step - start) / span, 1.0) if span > 0 else 1.0
