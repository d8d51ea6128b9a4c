"""One prompt while it is answered: its tokens, the text that they become, and where that ends."""

from collections.abc import Iterator
from typing import Any, Protocol

from msgspec import Struct

from portlm.errors import UsageError
from portlm.runtimes.decoding import Decoding
from portlm.runtimes.results import Generation, Stats
from portlm.runtimes.stopping import StopScanner


class StreamDecoder(Protocol):
    """Turns token ids into text one at a time, holding back incomplete characters."""

    def push(self, token: int) -> str:
        """Take a token; return the text that is complete now."""
        ...

    def finish(self) -> str:
        """Return the rest, with U+FFFD for a character that never became complete."""
        ...


class Row(Struct):
    """One prompt and what has been said to it.

    Attributes:
        source: what an encoder reads before; () for a model without one. The prompt then begins the target.
        picture: pixels (3, H, W) float32 whose rows are in the prompt (portlm.rows), None for a text alone.
    """

    prompt: tuple[int, ...]
    decoding: Decoding  # of this row: max_new_tokens is one number
    eos_ids: frozenset[int]
    seed: int
    stream: int  # of random numbers
    decoder: StreamDecoder
    scanner: StopScanner
    tokens: list[int] = []
    pieces: list[str] = []
    finish_reason: str | None = None
    source: tuple[int, ...] = ()
    picture: Any = None

    def push(self, token: int) -> None:
        """Take the next token, and notice whether it is the last."""
        self.tokens.append(token)
        if token in self.eos_ids:
            self._finish("eos")
            return
        self.pieces.append(self.scanner.push(self.decoder.push(token)))
        if self.scanner.found is not None:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.decoding.max_new_tokens:
            self._finish("length")

    def _finish(self, reason: str) -> None:
        self.pieces += [self.scanner.push(self.decoder.finish()), self.scanner.flush()]
        self.finish_reason = reason if self.scanner.found is None else "stop"

    def generation(self, stats: Stats) -> Generation:
        """Return the result of a finished row."""
        assert self.finish_reason is not None
        text = "".join(self.pieces)
        return Generation(
            text,
            tuple(self.tokens),
            self.finish_reason,
            self.scanner.found,
            len(self.source or self.prompt),
            stats,
        )


class TextStream:
    """Pieces of text as a model writes them. Closing it, or leaving the loop, stops the model.

    Attributes:
        generation: the whole result, once the stream has ended; None before.
    """

    def __init__(self, steps: Iterator[None], row: Row, stats: Stats, textless: str = ""):
        """Take over a row.

        Args:
            steps: each step brings the row up to date.
            row: with one prompt.
            stats: of the whole call.
            textless: why there is no text to iterate over, "" if there is.
        """
        self.generation: Generation | None = None
        self._steps, self._row, self._stats, self._textless = steps, row, stats, textless
        self._pieces = self._tokens = 0  # seen so far

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._textless:
            raise UsageError(f"{self._textless}; a stream has them in ids()")
        while True:
            piece = "".join(self._row.pieces[self._pieces :])
            self._pieces = len(self._row.pieces)
            if piece:
                return piece
            if not self._step():
                raise StopIteration

    def ids(self) -> Iterator[int]:
        """Iterate over token ids in place of text, those that end a text included."""
        while True:
            new = self._row.tokens[self._tokens :]
            self._tokens += len(new)
            yield from new
            if not self._step():
                return

    def close(self) -> None:
        """Stop the model. What it wrote so far stays with whoever read it."""
        close = getattr(self._steps, "close", None)
        if close is not None:
            close()

    def _step(self) -> bool:
        """Let the model write on; say whether it did."""
        for _ in self._steps:
            return True
        if self._row.finish_reason is not None:
            self.generation = self._row.generation(self._stats)
        return False
