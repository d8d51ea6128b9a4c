"""Several tokens for one pass over the weights: guesses for the rows of a running batch, and when to make them.

A guess is read behind the row's next token, in one pass, which answers each place in it. Then the row is given the
tokens that those answers say, one after the other, by the function, the step numbers and the rules of plain decoding,
for as long as the token given is the one that was guessed there; the state forgets the rest of the guess. So a row gets
what plain decoding gives it, at any temperature, with filters, penalties and stop strings. What can differ is how a
pass over several tokens rounds from how a pass over one does, as between two engines.

Rejection sampling, by which Leviathan et al. (2023) and Chen et al. (2023) keep the distribution, is not needed for
that. A token is a function of its logits and of a random number which its place in the text alone decides; comparing it
with the guess keeps the very sample, and with it the distribution. A guess that was not drawn, as a lookup's, is
accepted as often either way, with the model's probability of it. One that a small model drew would be accepted a little
more often there; drawing it with the same random number makes up for most of that.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from msgspec import Struct

from portlm.arguments import wholes
from portlm.runtimes import drafting
from portlm.runtimes.drafting import Draft, Drafter, NewDrafter
from portlm.runtimes.pace import Pace

MOST = 16  # tokens of a guess
MOST_GUESSED = 256  # that a caller may ask for
NOTHING = Draft(())


class Row(drafting.Row, Protocol):
    """A row of the scheduler's."""

    prompt: tuple[int, ...]


class _Text(Struct):
    """What has been guessed of a row."""

    row: Row
    drafter: Drafter
    told: int = 0  # tokens of the row that the drafter knows
    draft: Draft = NOTHING


class Speculation:
    """Decides at each step of a batch whether guesses are read, and how long ones."""

    def __init__(
        self,
        drafter: NewDrafter,
        vocabulary: int,
        loop: bool,
        most: int = MOST,
        first: Callable[[int], float] = lambda tokens: 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Begin with a batch of which nothing is known.

        Args:
            drafter: makes the drafter of a row.
            vocabulary: guesses hold ids below this.
            loop: whether the engine has a loop of its own for plain decoding.
            most: tokens of a guess.
            first: seconds that the first guess for a text of so many tokens is expected to take.
            clock: seconds.
        """
        self.clock = clock
        self.plain = 0  # tokens to decode plainly before the next guess
        self.seconds = math.inf  # in which to do so
        self._drafter, self._vocabulary, self._loop, self._most = drafter, vocabulary, loop, most
        self._first, self._began, self._decoded = first, False, 0
        self._pace = Pace(loop)
        self._texts: dict[int, _Text] = {}
        self._guessing = 0.0  # seconds that the last guesses took

    @property
    def hurries(self) -> bool:
        """Whether the next token of a text is a plain one that need not be timed: finding that out costs, too."""
        return self._began and self.plain > 1 and not self._loop

    def guesses(self, rows: Sequence[Row], room: int) -> list[Sequence[int]]:
        """Return what to read behind the next token of each row, nothing for some; [] for plain decoding.

        Args:
            rows: of the batch, each with a token that it has not read.
            room: tokens of each row that a pass can have.

        Raises:
            UsageError: a drafter guessed what is no token.
        """
        B = len(rows)
        if self.plain <= 0:
            self.plain, self.seconds = self._before(rows)
        if self.plain > 0:
            return []
        began = self.clock()
        texts = [self._texts.get(id(row)) or _Text(row, self._drafter(row)) for row in rows]
        self._texts = {id(text.row): text for text in texts}
        first = any(text.told == 0 for text in texts)  # who sees a text for the first time reads all of it
        most = min(self._most, room - 1)
        if most > 0:
            most = self._pace.reach(B, most)
        for text in texts:
            self._guess(text, most)
        length = self._pace.length(B, [(text.draft.kind, len(text.draft.tokens)) for text in texts])
        self._guessing = self.clock() - began
        if not first:
            self._pace.guessed(self._guessing)
        if length == 0:
            self.plain = self._pace.plain(B)
            return []
        return [text.draft.tokens[:length] for text in texts]

    def took(self, rows: int, tokens: int, seconds: float, passes: int = 1) -> None:
        """Take in what a step took: one pass over so many tokens of each row, or several passes over one."""
        if tokens > 1:
            self._pace.took(rows, tokens, seconds + self._guessing)
        else:
            self._pace.took(rows, 1, seconds / passes)
            self.plain -= passes
            self._decoded += passes
            if self.seconds < math.inf:
                self.plain = 0

    def _before(self, rows: Sequence[Row]) -> tuple[int, float]:
        """Return how many tokens to decode plainly before a guess may be made, and in how long a time; 0: it may."""
        B = len(rows)
        if not self._pace.knows(B):
            return self._pace.trial()
        if self._began:
            return 0, math.inf
        self._began = True  # once the next plain tokens are there
        return self._pace.first(B, sum(map(self._expected, rows))) - self._decoded, math.inf

    def _expected(self, row: Row) -> float:
        return self._first(len(row.prompt) + len(row.tokens))

    def _guess(self, text: _Text, most: int) -> None:
        """Judge the last guess for a text, and make the next."""
        row, draft = text.row, text.draft
        assert isinstance(row.decoding.max_new_tokens, int)
        self._pace.judge(draft.kind, draft.tokens, row.tokens[text.told :])
        text.draft = NOTHING
        most = min(most, row.decoding.max_new_tokens - len(row.tokens) - 1)
        if most < 1:
            return  # the drafter hears of these tokens with the next
        new = row.tokens[text.told :] if text.told else self._words([*row.prompt, *row.tokens])
        text.told = len(row.tokens)
        tokens, kind = text.drafter.propose(new, most)
        text.draft = Draft(wholes("the guessed tokens", tokens, self._vocabulary - 1)[:most], kind)

    def _words(self, text: list[int]) -> list[int]:
        """Return what of a text is behind the last id that stands for no token, such as the rows of a picture."""
        last = next((i for i in range(len(text), 0, -1) if text[i - 1] >= self._vocabulary), 0)
        return text[last:]
