"""How many guessed tokens are worth reading at once, from what passes took and how often guesses were right.

A pass over the weights for one token of each row, or for several, costs nearly the same where reading the weights is
all there is to do, and several times as much where it is not. Which of the two it is depends on the model, the
engine, the machine and the context, so it is measured where it happens, while it happens.
"""

import math
from collections.abc import Sequence

OVERHEAD = 100e-6  # seconds that a call costs an engine's own loop of generation beside its tokens
PASS = 150e-6  # seconds that a pass costs which Python asks for, beside its tokens, where plain tokens need no Python
SHARE = 0.01  # of the time of plain decoding that may go into guesses which are not read, the first one, too
FAIR = 0.5  # how often a guess is right of which nothing is known
MEMORY = 8  # of how many guesses what is known of a kind consists
STEPS = 4  # of how many passes
FIRST_SLOPE = 0.25  # of a pass that each further token costs it, while that is not known
DOUBT = 0.995  # what is left, at each guess that is not read, of the belief that longer passes are slow
MARGIN = 1.03  # by which a longer pass has to be faster: what is measured is a little wrong
FIRST_PLAIN = 4  # tokens at least whose time is taken before the first guess
LONGEST_PLAIN = 4096  # tokens until guesses are judged again


class Pace:
    """Chooses the length of passes.

    Each guess is judged by the tokens that came, whether the model read it or not. So on a text where guesses are
    wrong none is read, and when they become right that is seen at no cost of the model's.
    """

    def __init__(self, loop: bool = False) -> None:
        """Begin with nothing known.

        Args:
            loop: whether the engine decodes plainly in a loop of its own, so that each return from it costs something,
                and each pass beside it.
        """
        self._loop = loop
        # (kind, place in the guess): how often that token was right where all before it were.
        self._right: dict[tuple[int, int], float] = {}
        self._seconds: dict[int, dict[int, float]] = {}  # by rows, and by tokens of each row in a pass
        self._belief = 1.0  # in what longer passes took beyond one of a single token
        self._guessing = 0.0  # seconds of making the guesses of a pass

    def judge(self, kind: int, guess: Sequence[int], came: Sequence[int]) -> None:
        """Compare a guess with the tokens that came."""
        right = FAIR
        for place, (guessed, token) in enumerate(zip(guess, came, strict=False)):
            right = self._right.get((kind, place), right)  # what is unknown is as right as the place before
            self._right[kind, place] = right + ((guessed == token) - right) / MEMORY
            if guessed != token:
                return

    def took(self, rows: int, tokens: int, seconds: float) -> None:
        """Take in that a pass over so many tokens of each row took so long, guessing included."""
        known = self._seconds.setdefault(rows, {})
        seconds = max(seconds, 1e-9)  # no clock is finer
        old = known.get(tokens, seconds)
        # Of a pass that another program interrupted, little is believed.
        known[tokens] = old + (min(max(seconds, old / 2), 2 * old) - old) / STEPS
        if tokens > 1:
            self._belief = 1.0

    def knows(self, rows: int) -> bool:
        """Say whether it is known how long plain decoding takes with so many rows."""
        return 1 in self._seconds.get(rows, {})

    def guessed(self, seconds: float) -> None:
        """Take in that making guesses took so long."""
        self._guessing += (seconds - self._guessing) / (STEPS if self._guessing else 1)

    def length(self, rows: int, guesses: Sequence[tuple[int, int]]) -> int:
        """Return how many tokens of each guess a pass should read; 0: plain decoding is faster.

        Args:
            rows: B.
            guesses: (kind, tokens) of the rows that have one.
        """
        if not self.knows(rows):
            return 0
        known = self._seconds[rows]
        longest = max((tokens for _, tokens in guesses), default=0)
        # Twice as long as what was tried, at most: beyond, the time is a guess itself. What a pass costs by itself is
        # paid for by as many tokens more.
        longest = min(longest, 2 * max(known) + math.ceil(min(self._extra / known[1], longest)))
        best, speed = 0, MARGIN * rows / known[1]
        gained, right, sure = 0.0, [FAIR] * len(guesses), [1.0] * len(guesses)
        for place in range(longest):
            for i, (kind, tokens) in enumerate(guesses):
                right[i] = self._right.get((kind, place), right[i])
                sure[i] *= right[i] if place < tokens else 0.0
            gained += sum(sure)
            this = (rows + gained) / self._time(known, place + 2)
            if this > speed:
                best, speed = place + 1, this
        return best

    def reach(self, rows: int, most: int) -> int:
        """Return how long a guess is worth making, of whatever kind: one more than is read, so that it is judged."""
        kinds = {kind for kind, _ in self._right} or {0}
        return min(most, 1 + max(self.length(rows, [(kind, most)] * rows) for kind in kinds))

    def trial(self) -> tuple[int, float]:
        """Return how many tokens to decode plainly, and in which time at most, so that it is known how long that takes.

        An engine's own loop goes on until coming back from it costs a small part of that time.
        """
        return (LONGEST_PLAIN, OVERHEAD / SHARE) if self._loop else (FIRST_PLAIN, math.inf)

    def first(self, rows: int, seconds: float) -> int:
        """Return how many tokens to decode plainly before the first guess, which is expected to take so long."""
        each = self._seconds[rows][1]
        wait = math.ceil((seconds + OVERHEAD * self._loop) / (SHARE * each))
        return min(max(FIRST_PLAIN, wait), LONGEST_PLAIN)

    def plain(self, rows: int) -> int:
        """Return how many tokens to decode plainly before the next guess.

        So many that what a guess costs is a small part of their time: where guesses are almost free, one.
        """
        self._belief *= DOUBT  # so that they are tried again some day
        each = self._seconds.get(rows, {}).get(1)
        if not each:
            return FIRST_PLAIN
        cost = self._guessing + OVERHEAD * self._loop
        return min(max(1, math.ceil(cost / (SHARE * each))), LONGEST_PLAIN)

    @property
    def _extra(self) -> float:
        """Seconds that a pass of several tokens costs at least beside them."""
        return PASS * self._loop

    def _time(self, known: dict[int, float], tokens: int) -> float:
        """Seconds of a pass; of one that was never made, the least it can take: those of a shorter one.

        Behind all that were made, each further token costs what one cost so far.
        """
        below = max(t for t in known if t <= tokens)
        slope, extra = 0.0, self._extra if below == 1 else 0.0
        if below == max(known):
            slope = (
                (known[below] - known[1] - self._extra) / (below - 1) if below > 1 else FIRST_SLOPE * known[1]
            )
        seconds = known[below] + extra + max(slope, 0.0) * (tokens - below)
        return known[1] + (seconds - known[1]) * self._belief
