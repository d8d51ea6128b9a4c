"""Chooses between all threads and one for the steps of a model, by what is gained.

One step of decoding is a hundred small parallel loops, and each ends when the last of its threads does. On a machine
that does nothing else that is soon. Beside other busy programs the system sets threads aside for milliseconds at a
time, in every loop another one, and a step takes many times as long as on one thread, which waits for nobody.
"""

from collections.abc import Hashable

SLACK = 3.0  # a step that takes this many times as long as it should has lost nothing yet
TRIAL = 3  # steps on one thread that show whether it is better
STAY = 10.0  # times as long on one thread as was lost before
LONGEST_STAY = 5.0  # seconds
MOST_DOUBTS = 64.0
DRIFT = 1.002  # per step: those behind a longer context should take longer


class Governor:
    """The choice, from the times of the steps so far.

    A step should take as long as the fastest of its kind. Once steps with all threads have lost more than it can cost
    to try, a few steps run on one. Were those no faster, all threads go on, and twice as much must be lost before the
    next trial. Otherwise one thread goes on for ten times as long as was lost before all are tried again, and twice as
    long whenever they fail at once. So trying costs a small part of what it can bring, and nothing where nothing is
    lost.

    Attributes:
        alone: whether the next step should run on one thread.
    """

    def __init__(self, threads: int):
        """Begin with all threads, of which there are so many."""
        self.alone = False
        self._threads = threads
        self._should: dict[Hashable, float] = {}  # seconds, by kind of step
        self._doubts, self._patience, self._stay = 1.0, STAY, 0.0
        self._pace_of_all = 0.0
        self._turn(alone=False)

    def _turn(self, alone: bool) -> None:
        self.alone = alone
        self._spent, self._lost = 0.0, 0.0  # seconds since then
        self._steps, self._pace = 0, 0.0  # pace: how many times as long as they should steps take of late

    def took(self, kind: Hashable, seconds: float, alone: bool) -> None:
        """Take in a step.

        Args:
            kind: steps of one kind should take about equally long.
            seconds: of the wall clock.
            alone: what `alone` was when it began.
        """
        should = min(seconds, self._should.get(kind, seconds) * DRIFT)
        self._should[kind] = should
        if alone != self.alone:
            return  # begun before the last turn, on another thread of the program
        self._steps += 1
        self._spent += seconds
        self._pace += (seconds / should - self._pace) / min(self._steps, 8)
        if alone:
            self._weigh_one()
        else:
            self._lost = max(0.0, self._lost + seconds - SLACK * should)
            if self._lost > self._doubts * self._threads * should:
                self._leave_all()

    def _leave_all(self) -> None:
        at_once = self._spent - self._lost < self._stay
        self._patience = 2 * self._patience if at_once else STAY
        self._stay = min(self._patience * self._lost, LONGEST_STAY)
        self._pace_of_all = self._pace
        self._turn(alone=True)

    def _weigh_one(self) -> None:
        if self._steps < TRIAL:
            return
        if self._steps == TRIAL:
            better = self._pace < self._pace_of_all
            self._doubts = 1.0 if better else min(2 * self._doubts, MOST_DOUBTS)
            self._stay = self._stay if better else 0.0
        if self._spent >= self._stay:
            self._turn(alone=False)
