"""Stop strings: generated text ends before the first of them, and no part of one is ever shown.

Text arrives in pieces of any size. What may still turn out to begin a stop string is held back until the next piece
decides, so the text that comes out does not depend on where the pieces were cut.
"""

from collections.abc import Sequence


class StopScanner:
    """Lets text through up to the first stop string.

    First is the one that is complete first; of several complete at once, the longest. That does not depend on how
    the text was cut, as "begins first" would: of "bc" and "abcd", the text "abcd" holds "bc" before it holds "abcd".

    Attributes:
        found: the stop string that ended the text, or None so far.
    """

    def __init__(self, stops: Sequence[str]):
        self.found: str | None = None
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def push(self, text: str) -> str:
        """Take the next piece of text and return what is certain to lie before every stop string."""
        if self.found is not None:
            return ""
        text = self._held + text
        ends = [(begin + len(s), begin, s) for s in self._stops if (begin := text.find(s)) >= 0]
        if ends:
            _, begin, self.found = min(ends)
            self._held = ""
            return text[:begin]
        hold = self._length_of_possible_stop(text)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def flush(self) -> str:
        """Return what was held back: the text is over, so it began no stop string."""
        text, self._held = self._held, ""
        return text

    def _length_of_possible_stop(self, text: str) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(s.startswith(text[-length:]) for s in self._stops):
                return length
        return 0
