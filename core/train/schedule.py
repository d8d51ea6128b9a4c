"""The learning rate of each step: linear warm-up, then half a cosine or a straight line down to a floor.

The cosine is that of SGDR without restarts (Loshchilov and Hutter 2017), as GPT-3 (Brown et al. 2020) used it; the
line is word2vec's (Mikolov et al. 2013).
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
        # The peak itself belongs to the last warm-up step, or to step 0 when there is no warm-up.
        start = max(self.warmup - 1, 0)
        span = self.steps - 1 - start
        done = min((step - start) / span, 1.0) if span > 0 else 1.0
        return self.floor + (self.peak - self.floor) * self._left(done)

    @staticmethod
    def _left(done: float) -> float:
        """The share of the way down that is left when a share of the time is over."""
        return 0.5 * (1.0 + math.cos(math.pi * done))


@dataclass(frozen=True)
class WarmupLinear(WarmupCosine):
    """The same with a straight line in place of the cosine."""

    @staticmethod
    def _left(done: float) -> float:
        return 1.0 - done


SCHEDULES = {"cosine": WarmupCosine, "linear": WarmupLinear}
