"""A running batch: rows join it and leave it while the others go on (continuous batching).

Prompts are read in groups of like length, so that padding costs little, and the groups join one state. A row that is
finished leaves at once, and with it the slots that only it had; its place goes to a row that waits. What a row says
depends on neither its neighbours nor on when it came: they share a call of the engine, nothing else.
"""

import math
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from portlm.engine import Array, Engine, Ids, Logits, RowChoice
from portlm.errors import PortlmError, UsageError
from portlm.memory import given_for
from portlm.ops.token_selection import select_tokens
from portlm.rows import Rows
from portlm.runtimes.decoding import Decoding
from portlm.runtimes.penalties import nothing_left, penalise
from portlm.runtimes.results import Stats
from portlm.runtimes.speculation import Speculation

# Reading one more row to the same length costs as much as this many tokens: below it, weights are read for nothing.
WASTE_TOKENS = 32
WASTE_SHARE = 4  # a quarter of a group may be padding

MOST_TOKENS = 1024  # of a row, without coming back
PATIENCE = 0.1  # seconds that an engine may write by itself: signals and stop strings wait for so long


class Row(Protocol):
    """What the scheduler needs of a row. `push` takes its next token and may set finish_reason, which ends it."""

    prompt: tuple[int, ...]
    source: tuple[int, ...]
    picture: Array | None
    tokens: list[int]
    decoding: Decoding
    eos_ids: frozenset[int]
    seed: int
    stream: int
    finish_reason: str | None

    def push(self, token: int) -> None: ...  # noqa: D102


class Scheduler:
    """Rows that wait, and rows that run together.

    Args:
        engine: with a role "decoder", which may be given what another role makes of each row's source or picture.
        batch_size: rows that run together at most.
        vocabulary: ids from here on stand for no token and are never drawn.
        stats: counts tokens and time.
        seconds: that a step may go on writing tokens, if the engine can by itself.
        speculation: guesses for the rows, None for plain decoding.
    """

    def __init__(
        self,
        engine: Engine,
        batch_size: int,
        vocabulary: int,
        stats: Stats,
        seconds: float = PATIENCE,
        speculation: Speculation | None = None,
    ):
        self._engine, self._batch_size, self._vocabulary = engine, batch_size, vocabulary
        self._seconds = seconds
        self._speculation = speculation
        self._stats = stats
        self._waiting: deque[Row] = deque()
        self._running: list[Row] = []
        self._rows: Rows | None = None

    def add(self, rows: Iterable[Row]) -> None:
        """Let rows wait for a place."""
        for row in rows:
            self._waiting.append(row)
            self._stats.rows += 1
            self._stats.prompt_tokens += len(row.source or row.prompt)

    @property
    def busy(self) -> bool:
        """Whether there is a row that is not finished."""
        return bool(self._running or self._waiting)

    def step(self) -> None:
        """Give every running row one more token or several, or read the prompts of those that can join.

        Raises:
            PortlmError: the logits are not numbers, or the engine failed.
        """
        began = time.perf_counter()
        free = self._batch_size - len(self._running)
        # Joining copies the state of all, so rows come several at a time.
        if self._waiting and (not self._running or free >= max(1, self._batch_size // 4)):
            self._admit([self._waiting.popleft() for _ in range(min(free, len(self._waiting)))])
            self._stats.prefill_seconds += time.perf_counter() - began
            return
        assert self._rows is not None
        running = self._running
        staying = self._write(running) if self._speculation is None else self._speculate(running)
        if len(staying) < len(running):
            self._running = [running[i] for i in staying]
            if staying:
                self._rows.keep(staying)
            else:
                self._rows = None
        self._stats.decode_seconds += time.perf_counter() - began

    def _write(self, rows: Sequence[Row], most: int = MOST_TOKENS, seconds: float = math.inf) -> list[int]:
        """Give each row its next token, or in so many seconds up to `most` of them; return the rows that go on."""
        assert self._rows is not None
        staying = self._advance(rows, most, min(seconds, self._seconds))
        if staying is None:
            staying = self._choose(rows, self._rows.next([row.tokens[-1] for row in rows]))
            self._stats.passes += 1
        return staying

    def _speculate(self, rows: Sequence[Row]) -> list[int]:
        """Give the rows tokens from a pass over guesses, or where that does not pay, plainly."""
        assert self._rows is not None
        assert self._speculation is not None
        speculation, before = self._speculation, self._stats.passes
        if speculation.hurries:
            speculation.plain -= 1
            return self._write(rows)
        guesses = speculation.guesses(rows, self._rows.room)
        began = speculation.clock()
        staying = (
            self._verify(rows, guesses)
            if guesses
            else self._write(rows, speculation.plain, speculation.seconds)
        )
        tokens = 1 + max(map(len, guesses), default=0)
        speculation.took(len(rows), tokens, speculation.clock() - began, self._stats.passes - before)
        return staying

    def _verify(self, rows: Sequence[Row], guesses: Sequence[Sequence[int]]) -> list[int]:
        """Read a guess for each row in one pass, and give the row tokens for as long as they are those of the guess.

        A row whose guess is shorter than another's reads its next token again in the places left, and forgets them.
        """
        assert self._rows is not None
        T = 1 + max(map(len, guesses))
        texts = [[row.tokens[-1], *guess] for row, guess in zip(rows, guesses, strict=True)]
        ids = np.array([text + text[:1] * (T - len(text)) for text in texts], np.int64)
        logits = self._rows.read(ids, every=True)
        self._stats.passes += 1
        self._stats.drafted += sum(map(len, guesses))
        agreed = list(range(len(rows)))
        for place in range(T):
            said = logits[:, place] if len(agreed) == len(rows) else logits[agreed, place]
            going = self._choose([rows[b] for b in agreed], said)
            right = [b for b in agreed if rows[b].tokens[-1:] == texts[b][place + 1 : place + 2]]
            self._stats.accepted += len(right)
            agreed = sorted({agreed[i] for i in going} & set(right))
            if not agreed:
                break
        self._rows.crop([len(row.prompt) + len(row.tokens) - 1 for row in rows])
        return [b for b, row in enumerate(rows) if row.finish_reason is None]

    def _advance(self, rows: Sequence[Row], most: int, seconds: float) -> list[int] | None:
        """Give the rows tokens until one of them ends or the time is up, at most so many; return those that go on.

        None if the engine cannot choose by itself, or has too little to go by. A stop string shows in the text alone,
        so a row may have been given tokens behind it; they are dropped, and the row is not asked again.
        """
        assert self._rows is not None
        if any(row.decoding.penalises for row in rows):
            return None
        choices, count = [], min(most, MOST_TOKENS)
        for row in rows:
            d = row.decoding
            assert isinstance(d.max_new_tokens, int)
            count = min(count, d.max_new_tokens - len(row.tokens))
            choices.append(
                RowChoice(d.temperature, d.top_k, d.top_p, d.min_p, row.seed, row.stream, len(row.tokens))
            )
        ends = frozenset().union(*(row.eos_ids for row in rows))
        last = [row.tokens[-1] for row in rows]
        drawn = self._rows.advance(last, choices, self._vocabulary, ends, count, seconds)
        if drawn is None:
            return None
        self._stats.passes += len(drawn)
        for row, tokens in zip(rows, drawn.T.tolist(), strict=True):
            for token in tokens:
                row.push(token)
                self._stats.new_tokens += 1
                if row.finish_reason is not None:
                    break
        return [i for i, row in enumerate(rows) if row.finish_reason is None]

    def _admit(self, rows: Sequence[Row]) -> None:
        """Read the prompts of rows, give each its first token, and let those that go on join."""
        parts = [] if self._rows is None else [self._rows]
        for group in groups([len(row.source or row.prompt) for row in rows]):
            members = [rows[i] for i in group]
            given = given_for(self._engine, [row.source for row in members], [row.picture for row in members])
            part = Rows(self._engine, len(members), given=given)
            staying = self._choose(members, part.read_texts([row.prompt for row in members]))
            if not staying:
                continue
            if len(staying) < len(members):
                part.keep(staying)
            self._running = [*self._running, *(members[i] for i in staying)]
            parts.append(part)
        if parts:
            self._rows = parts[0]
            if len(parts) > 1:
                self._rows.join(parts[1:])

    def _choose(self, rows: Sequence[Row], logits: Logits) -> list[int]:
        """Give each row the token that its logits (B, V) say; return the rows that go on."""
        if logits.shape[1] > self._vocabulary or any(row.decoding.penalises for row in rows):
            logits = np.array(logits)
            logits[:, self._vocabulary :] = -np.inf  # rows of the table that stand for no token
            for row, scores in zip(rows, logits, strict=True):
                if row.decoding.penalises:
                    penalise(scores, (*row.prompt, *row.tokens), row.decoding)
                    if row.decoding.no_repeat_ngram_size and np.isneginf(scores).all():
                        raise nothing_left(row.decoding)
        for row, token in zip(rows, self._select(rows, logits).tolist(), strict=True):
            row.push(token)
        self._stats.new_tokens += len(rows)
        return [i for i, row in enumerate(rows) if row.finish_reason is None]

    def _select(self, rows: Sequence[Row], logits: Logits) -> Ids:
        """Draw one token for each row, those of like settings and count together."""
        together: dict[tuple[float, int, float, float, int], list[int]] = {}
        for i, row in enumerate(rows):
            d = row.decoding
            count = len(row.tokens) if d.temperature else 0
            together.setdefault((d.temperature, d.top_k, d.top_p, d.min_p, count), []).append(i)
        tokens = np.empty(len(rows), np.int64)
        for (temperature, top_k, top_p, min_p, count), members in together.items():
            part = logits if len(members) == len(rows) else logits[members]
            seeds, streams = [rows[i].seed for i in members], [rows[i].stream for i in members]
            try:
                tokens[members] = select_tokens(part, temperature, top_k, top_p, min_p, seeds, count, streams)
            except UsageError:
                raise
            except PortlmError as error:
                where = f"{self._engine.name}:{self._engine.device}: new token {len(rows[members[0]].tokens)}"
                raise PortlmError(f"{where}: {error}") from None
        return tokens


def groups(lengths: Sequence[int]) -> list[list[int]]:
    """Put prompts of like length together; return the indices of each group.

    A group may grow as long as the padding that it needs costs less than one more call of the engine.
    """
    found: list[list[int]] = []
    total = 0
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        length = lengths[index]
        if found:
            padding = (len(found[-1]) + 1) * length - total - length
            if padding <= WASTE_TOKENS + (total + length) // WASTE_SHARE:
                found[-1].append(index)
                total += length
                continue
        found.append([index])
        total = length
    return [sorted(group) for group in found]
