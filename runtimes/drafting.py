"""Who guesses what a text says next: its own earlier words, or a smaller model.

A guess costs little and may be wrong: the model itself reads all of it in one pass and says how far it is right
(portlm.runtimes.speculation). So nothing here decides what is written, only how fast.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from portlm.engine import Engine, Logits, RowChoice, goes_back
from portlm.ops.token_selection import select_tokens
from portlm.rows import Rows
from portlm.runtimes.decoding import Decoding

MATCHES = (
    8,
    4,
    2,
    1,
)  # tokens that agree; what goes on behind 8 is right nine times in ten, behind 1 once in six


class Draft(NamedTuple):
    """Tokens that may come next.

    Attributes:
        tokens: the guess, the next one first; empty for none.
        kind: how often guesses of one kind are right is counted apart from those of others.
    """

    tokens: Sequence[int]
    kind: int = 0


class Drafter(Protocol):
    """Guesses how one text goes on, and is told how it did."""

    def propose(self, new: Sequence[int], count: int) -> Draft:
        """Guess the next tokens of the text.

        Args:
            new: what the text has got since the last call, at least one token; at the first call, all of it. Where the
                last guess was right, this begins with it.
            count: tokens of the guess, at most.
        """
        ...


class Row(Protocol):
    """What a drafter may know of a text beside its tokens: how they are chosen."""

    tokens: list[int]
    decoding: Decoding
    seed: int
    stream: int


NewDrafter = Callable[[Row], Drafter]


class Lookup:
    """Guesses that a text goes on as it did where its last tokens stood before, the most recent time.

    Prompt lookup decoding (Saxena 2023), and before it LLMA (Yang et al. 2023, "Inference with Reference"): a text that
    is edited, summarised or quoted says much of itself again. The longest match counts, of 8, 4, 2 tokens or 1, and is
    the kind of the guess. A guess that reaches the end of the text goes on into itself, so what repeats with a short
    period is guessed at any length. A new token costs an entry for each of the four, however long the text is.
    """

    @staticmethod
    def first_seconds(tokens: int) -> float:
        """Return about how long the first guess for a text takes."""
        return 50e-6 + 0.5e-6 * tokens

    def __init__(self) -> None:
        self._text: list[int] = []
        # By length of match: where the text went on behind the last tokens that were these.
        self._behind: dict[int, dict[tuple[int, ...], int]] = {n: {} for n in MATCHES}

    def propose(self, new: Sequence[int], count: int) -> Draft:
        """Guess the next tokens of the text; see Drafter."""
        text = self._text
        begin = len(
            text
        )  # what ends at the last token is entered by the next call: it would be its own match
        text += new
        for n, behind in self._behind.items():
            end = max(begin, n)
            if end < len(text):
                windows = zip(*(text[end - n + i : len(text) - n + i] for i in range(n)), strict=True)
                behind.update(zip(windows, range(end, len(text)), strict=True))
        for n, behind in self._behind.items():
            place = behind.get(tuple(text[-n:]))
            if place is not None:
                return Draft(_from(text, place, count), n)
        return Draft(())


def _from(text: Sequence[int], place: int, count: int) -> list[int]:
    """Return `count` tokens of a text from a place in it on, which go on into themselves where the text ends."""
    found = list(text[place : place + count])
    period = len(text) - place
    while len(found) < count:
        found.append(found[-period])
    return found


class SmallModel:
    """Guesses what a smaller model would write.

    Speculative decoding (Leviathan et al. 2023; Chen et al. 2023). The small model draws with the settings and the
    random numbers of the text: where both find the same tokens probable, one number mostly picks the same one. It has
    a state of its own, which goes back to where its guess was wrong. A state that is replaced at every token cannot,
    but is small: there the guess is written with a copy, and all that the text got is read.
    """

    @staticmethod
    def first_seconds(tokens: int) -> float:
        """Return what the first guess for a text takes at least: some passes, which Python asks for."""
        return 0.5e-3

    def __init__(self, engine: Engine, vocabulary: int, row: Row):
        """Start from an empty text.

        Args:
            engine: of the small model.
            vocabulary: ids from here on stand for no token.
            row: whose text it is.
        """
        self._engine, self._vocabulary, self._row = engine, vocabulary, row
        self._rows = self._ahead = Rows(engine, 1)  # the text, and it with the guess
        self._copies = not goes_back(engine.roles["decoder"])
        self._text: list[int] = []
        self._guess: list[int] = []  # read behind the text, all but the last
        self._lost = False

    def propose(self, new: Sequence[int], count: int) -> Draft:
        """Guess the next tokens of the text; see Drafter.

        Nothing, once the text does not fit the small model's context, or has a token that it does not know.
        """
        agreed = 0
        if not self._copies:
            while agreed < min(len(self._guess), len(new) - 1) and self._guess[agreed] == new[agreed]:
                agreed += 1
        read = int(self._rows.lengths[0])
        known = min(len(self._text) + agreed, read)
        self._text += new
        self._guess = []
        count = min(count, self._engine.context_length - len(self._text) + 1)
        self._lost = self._lost or count < 1 or max(new) >= self._engine.vocab_size
        if self._lost:
            return Draft(())
        if known < read:
            self._rows.crop([known])
        first = self._draw(self._rows.read_texts([self._text[known:]]), 0)
        self._ahead = self._rows.copy() if self._copies and count > 1 else self._rows
        self._guess = [first]
        while len(self._guess) < count:
            self._guess += self._more(count - len(self._guess))
        return Draft(self._guess)

    def _more(self, count: int) -> list[int]:
        """Read the last token of the guess, and draw the next: several, where the engine has a loop of its own."""
        ahead, last = len(self._guess), self._guess[-1:]
        choices = [self._choice(ahead)]
        drawn = self._ahead.advance(last, choices, self._vocabulary, frozenset(), count, math.inf)
        if drawn is not None:
            return [int(token) for token in drawn[:, 0]]
        return [self._draw(self._ahead.next(last), ahead)]

    def _draw(self, logits: Logits, ahead: int) -> int:
        """Draw a token of the guess, `ahead` of the text's next one, from logits (1, V)."""
        c, logits = self._choice(ahead), logits[:, : self._vocabulary]
        filters = c.temperature, c.top_k, c.top_p, c.min_p
        return int(select_tokens(logits, *filters, c.seed, c.step, [c.stream])[0])

    def _choice(self, ahead: int) -> RowChoice:
        d, row = self._row.decoding, self._row
        top_k = min(d.top_k, self._vocabulary)
        return RowChoice(
            d.temperature, top_k, d.top_p, d.min_p, row.seed, row.stream, len(row.tokens) + ahead
        )
