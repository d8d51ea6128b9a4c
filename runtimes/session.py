"""A loaded model: text in, text out, the same on every engine.

One loop serves every family and engine. A batch is padded on the left, so that all rows end at the same place; a
row that has finished stays where it is, masked out, until the longest one has finished too. Neither the padding nor
the neighbours change what a row says. A session keeps nothing between calls: each call starts from an empty state.

B rows, T tokens of the longest prompt, V vocabulary.
"""

import operator
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self, TypedDict, Unpack, overload

import numpy as np

from portlm.engine import Engine, Ids, Placement
from portlm.errors import ContextLengthError, PortlmError, UsageError
from portlm.ops.token_selection import check_filters, select_tokens
from portlm.runtimes.results import Generation, Score, Stats
from portlm.runtimes.stopping import StopScanner, check_stops

Prompt = str | Sequence[int]

# Engines answer every token of a step with V logits; a long prompt is read in steps of this many logits (64 MB).
LOGITS_PER_STEP = 1 << 24


class StreamDecoder(Protocol):
    """Turns token ids into text one at a time, holding back incomplete characters."""

    def push(self, token: int) -> str:
        """Take a token; return the text that is complete now."""
        ...

    def finish(self) -> str:
        """Return the rest, with U+FFFD for a character that never became complete."""
        ...


class TextCoder(Protocol):
    """What a session needs of a tokenizer; `portlm.tokenizer.Tokenizer` has it."""

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to this, exclusive."""
        ...

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, if there is one."""
        ...

    def encode(self, text: str) -> list[int]:
        """Text to token ids."""
        ...

    def stream_decoder(self, skip_special: bool = False) -> StreamDecoder:
        """A decoder for one text, which can leave control tokens out."""
        ...


class Options(TypedDict, total=False):
    """Arguments of Session.generate, which documents them."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int | Sequence[int]
    stop: str | Sequence[str]
    ignore_eos: bool
    batch_size: int


class TextStream:
    """Pieces of text as a model writes them. Closing it, or leaving the loop, stops the model.

    Attributes:
        generation: the whole result, once the stream has ended; None before.
    """

    def __init__(self, steps: Iterator[None], row: "_Row", stats: Stats):
        self.generation: Generation | None = None
        self._steps, self._row, self._stats, self._seen = steps, row, stats, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        for _ in self._steps:
            piece = "".join(self._row.pieces[self._seen :])
            self._seen = len(self._row.pieces)
            if piece:
                return piece
        if self._row.finish_reason is not None:
            self.generation = self._row.generation(self._stats)
        raise StopIteration

    def close(self) -> None:
        """Stop the model. The text so far stays with whoever read it."""
        close = getattr(self._steps, "close", None)
        if close is not None:
            close()


@dataclass(frozen=True)
class _Options:
    """Settings of one call, in range."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    stops: tuple[str, ...]
    eos_ids: frozenset[int]


@dataclass
class _Row:
    """One prompt and what has been said to it."""

    prompt: tuple[int, ...]
    seed: int
    stream: int  # of random numbers
    decoder: StreamDecoder
    scanner: StopScanner
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: str | None = None

    def push(self, token: int, options: _Options) -> None:
        """Take the next token, and notice whether it is the last."""
        self.tokens.append(token)
        if token in options.eos_ids:
            self._finish("eos")
            return
        self.pieces.append(self.scanner.push(self.decoder.push(token)))
        if self.scanner.found is not None:
            self.finish_reason = "stop"
        elif len(self.tokens) == options.max_new_tokens:
            self._finish("length")

    def _finish(self, reason: str) -> None:
        self.pieces += [self.scanner.push(self.decoder.finish()), self.scanner.flush()]
        self.finish_reason = reason if self.scanner.found is None else "stop"

    def generation(self, stats: Stats) -> Generation:
        """Return the result of a finished row."""
        assert self.finish_reason is not None
        text = "".join(self.pieces)
        return Generation(
            text, tuple(self.tokens), self.finish_reason, self.scanner.found, len(self.prompt), stats
        )


class Session:
    """A model on an engine, with its tokenizer.

    Use it as a context manager, or call close(), to free the device early.

    Attributes:
        engine: what computes.
        tokenizer: what turns text into token ids and back.
        eos_ids: tokens that end a text.
    """

    def __init__(self, engine: Engine, tokenizer: TextCoder, eos_ids: Iterable[int] = ()):
        self.engine = engine
        self.tokenizer = tokenizer
        own = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        self.eos_ids = frozenset((*eos_ids, *own))
        if tokenizer.vocab_size > engine.vocab_size:
            raise UsageError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, but the model only {engine.vocab_size}: "
                "load the tokenizer that the model was trained with"
            )

    @overload
    def generate(self, prompts: str, **options: Unpack[Options]) -> Generation: ...  # type: ignore[overload-overlap]

    @overload
    def generate(self, prompts: Sequence[Prompt], **options: Unpack[Options]) -> list[Generation]: ...

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | Sequence[int] = 0,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        batch_size: int = 16,
    ) -> Generation | list[Generation]:
        """Continue one prompt or several.

        Args:
            prompts: a text, or several; in place of a text, a sequence of token ids. An empty text starts from the
                end-of-text token, as every document in training did.
            max_new_tokens: at most this many for each prompt.
            temperature: 0 takes the most probable token, 1 samples from the model, more flattens it.
            top_k: sample among this many of the most probable tokens; 0 for all.
            top_p: sample among the most probable tokens that together reach this probability; 1 for all.
            min_p: sample among tokens at least this probable relative to the most probable one; 0 for all.
            seed: of the random numbers. With one seed, prompt i draws from the i-th stream of that seed, so equal
                prompts get different answers. With one seed for each prompt, each draws what it would draw alone.
            stop: end before any of these strings. At most 16, of 256 bytes.
            ignore_eos: let end-of-text pass like any other token.
            batch_size: prompts that are computed together. It changes the speed and the memory, not the answers.

        Returns:
            One Generation for a text, a list of them for a sequence.

        Raises:
            ContextLengthError: a prompt, or a prompt with max_new_tokens, has more tokens than the model's context.
            UsageError: an argument is out of range.
            PortlmError: the model gave logits that are not numbers.
        """
        options = self._options(max_new_tokens, temperature, top_k, top_p, min_p, stop, ignore_eos)
        batch_size = _at_least_one("batch_size", batch_size)
        rows = self._rows(prompts, seed, options)
        results: list[Generation] = []
        stats = Stats()
        for begin in range(0, len(rows), batch_size):
            batch = rows[begin : begin + batch_size]
            for _ in self._run(batch, options, stats):
                pass
            results += [row.generation(stats) for row in batch]
        return results[0] if isinstance(prompts, str) else results

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
    ) -> TextStream:
        """Continue one prompt and return its text piece by piece: the text that generate would return.

        A piece is never empty, ends on a whole character, and holds no part of a stop string. Arguments and errors
        are those of generate; errors in the arguments are raised here, not at the first piece.
        """
        options = self._options(max_new_tokens, temperature, top_k, top_p, min_p, stop, ignore_eos)
        rows = self._rows([prompt], seed, options)
        stats = Stats()
        return TextStream(self._run(rows, options, stats), rows[0], stats)

    @overload
    def score(self, texts: str, *, batch_size: int = ...) -> Score: ...  # type: ignore[overload-overlap]

    @overload
    def score(self, texts: Sequence[Prompt], *, batch_size: int = ...) -> list[Score]: ...

    def score(self, texts: str | Sequence[Prompt], *, batch_size: int = 16) -> Score | list[Score]:
        """Return the log-probability of each token of a text, or of several, after its first.

        Args:
            texts: a text, or several; in place of a text, a sequence of token ids. To score the first token too,
                put the end-of-text token in front of it.
            batch_size: texts that are computed together. It changes the speed and the memory, not the answers.

        Raises:
            ContextLengthError: a text has more tokens than the model's context.
            UsageError: a text is empty, or batch_size is less than 1.
            PortlmError: the model gave logits that are not numbers.
        """
        batch_size = _at_least_one("batch_size", batch_size)
        several = _several("text", texts)
        ids = [self._encode("text", i, text) for i, text in enumerate(several)]
        for i, tokens in enumerate(ids):
            if not tokens:
                raise UsageError(f"text {i} is empty, so there is nothing to score")
            if len(tokens) > self.engine.context_length:
                raise ContextLengthError(len(tokens), self.engine.context_length, f"text {i}")
        scores: list[Score] = []
        for begin in range(0, len(ids), batch_size):
            scores += self._score(ids[begin : begin + batch_size])
        return scores[0] if isinstance(texts, str) else scores

    def placement(self) -> Placement:
        """Return where each node of the model runs."""
        return self.engine.placement()

    def close(self) -> None:
        """Free the device. The session cannot be used afterwards; closing twice is harmless."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        e = self.engine
        return f"<portlm.Session {e.name}:{e.device} {e.profile} {e.precision}>"

    def _options(
        self,
        max_new_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        stop: str | Sequence[str],
        ignore_eos: bool,
    ) -> _Options:
        check_filters(self.engine.vocab_size, temperature, top_k, top_p, min_p)
        return _Options(
            _at_least_one("max_new_tokens", max_new_tokens),
            temperature,
            top_k,
            top_p,
            min_p,
            check_stops(stop),
            frozenset() if ignore_eos else self.eos_ids,
        )

    def _rows(
        self, prompts: str | Sequence[Prompt], seed: int | Sequence[int], options: _Options
    ) -> list[_Row]:
        several = _several("prompt", prompts)
        if isinstance(seed, Sequence) and not isinstance(seed, str):
            if len(seed) != len(several):
                raise UsageError(f"seed was given for {len(seed)} prompts, but there are {len(several)}")
            draws = [(s, 0) for s in seed]
        else:
            draws = [(seed, i) for i in range(len(several))]
        rows = []
        for i, (prompt, (own_seed, stream)) in enumerate(zip(several, draws, strict=True)):
            tokens = self._encode("prompt", i, prompt)
            if not tokens:
                tokens = self._start(i)
            limit = self.engine.context_length
            if len(tokens) > limit:
                raise ContextLengthError(len(tokens), limit, f"prompt {i}")
            total = len(tokens) + options.max_new_tokens
            if total > limit:
                what = f"prompt {i} ({len(tokens)} tokens) with max_new_tokens = {options.max_new_tokens}"
                room = limit - len(tokens)
                advice = f"set max_new_tokens to at most {room}, shorten the prompt" if room else ""
                raise ContextLengthError(total, limit, what, advice)
            if type(own_seed) is bool or not 0 <= _whole("seed", own_seed) < 2**64:
                raise UsageError(f"seed must be from 0 to 2^64 - 1, got {own_seed!r}")
            decoder = self.tokenizer.stream_decoder(skip_special=True)
            rows.append(_Row(tokens, own_seed, stream, decoder, StopScanner(options.stops)))
        return rows

    def _start(self, index: int) -> tuple[int, ...]:
        if self.tokenizer.eos_id is None:
            raise UsageError(
                f"prompt {index} is empty, and this tokenizer has no end-of-text token to start from: "
                "give at least one token"
            )
        return (self.tokenizer.eos_id,)

    def _encode(self, what: str, index: int, text: Prompt) -> tuple[int, ...]:
        if isinstance(text, str):
            return tuple(self.tokenizer.encode(text))
        tokens = tuple(_whole(f"a token of {what} {index}", token) for token in text)
        for token in tokens:
            if not 0 <= token < self.engine.vocab_size:
                raise UsageError(
                    f"{what} {index} holds token {token}, but ids run from 0 to {self.engine.vocab_size - 1}"
                )
        return tokens

    def _run(self, rows: list[_Row], options: _Options, stats: Stats) -> Iterator[None]:
        """Generate for one batch; yield after each token, with the rows brought up to date."""
        began = time.perf_counter()
        ids, mask, positions = _pad([row.prompt for row in rows], options.max_new_tokens)
        B, T = ids.shape
        stats.rows += B
        stats.prompt_tokens += sum(len(row.prompt) for row in rows)
        seeds, streams = [row.seed for row in rows], [row.stream for row in rows]
        state = self.engine.empty_state(B)
        for begin, end in self._spans(B, T):
            logits, state = self.engine.step(ids[:, begin:end], positions[:, begin:end], mask[:, :end], state)
        place = positions[:, -1:].copy()
        for count in range(options.max_new_tokens):
            last = np.array(logits[:, -1])
            last[:, self.tokenizer.vocab_size :] = -np.inf  # rows of the table that stand for no token
            last[[row.finish_reason is not None for row in rows]] = 0  # what a finished row says is ignored
            try:
                tokens = select_tokens(
                    last, options.temperature, options.top_k, options.top_p, options.min_p,
                    seeds, count, streams,
                )  # fmt: skip
            except UsageError:
                raise
            except PortlmError as error:
                raise PortlmError(
                    f"{self.engine.name}:{self.engine.device}: new token {count}: {error}"
                ) from None
            for row, token in zip(rows, tokens.tolist(), strict=True):
                if row.finish_reason is None:
                    row.push(token, options)
                    stats.new_tokens += 1
            going = np.array([row.finish_reason is None for row in rows])
            elapsed = time.perf_counter() - began
            if count == 0:
                stats.prefill_seconds += elapsed
            else:
                stats.decode_seconds += elapsed
            yield
            if not going.any():
                return
            began = time.perf_counter()
            mask[going, T + count] = 1
            place[going] += 1
            new = np.where(going, tokens, 0)[:, None]
            logits, state = self.engine.step(new, place, mask[:, : T + count + 1], state)

    def _score(self, texts: list[tuple[int, ...]]) -> list[Score]:
        ids, mask, positions = _pad(texts, 0)
        B, T = ids.shape
        logprobs: list[list[float]] = [[] for _ in texts]
        greedy: list[list[bool]] = [[] for _ in texts]
        state = self.engine.empty_state(B)
        for begin, end in self._spans(B, T - 1):
            logits, state = self.engine.step(ids[:, begin:end], positions[:, begin:end], mask[:, :end], state)
            for b, tokens in enumerate(texts):
                first = max(begin, T - len(tokens))
                if first >= end:
                    continue
                rows = logits[b, first - begin : end - begin].astype(np.float64)
                target = ids[b, first + 1 : end + 1]
                largest = rows.max(axis=1)
                if not np.isfinite(largest).all():
                    where = f"{self.engine.name}:{self.engine.device}: text {b}"
                    raise PortlmError(
                        f"{where}: the logits are not numbers: check the weights for NaN or infinity"
                    )
                normaliser = largest + np.log(np.exp(rows - largest[:, None]).sum(axis=1))
                chosen = rows[np.arange(len(rows)), target]
                logprobs[b] += (chosen - normaliser).tolist()
                greedy[b] += (rows.argmax(axis=1) == target).tolist()
        return [
            Score(tokens, tuple(p), tuple(g))
            for tokens, p, g in zip(texts, logprobs, greedy, strict=True)
        ]  # fmt: skip

    def _spans(self, B: int, T: int) -> Iterator[tuple[int, int]]:
        """Cut T tokens into steps of at most LOGITS_PER_STEP logits."""
        size = max(1, LOGITS_PER_STEP // (B * self.engine.vocab_size))
        for begin in range(0, T, size):
            yield begin, min(begin + size, T)


def _pad(rows: list[tuple[int, ...]], room: int) -> tuple[Ids, Ids, Ids]:
    """Pad on the left: ids (B, T), mask (B, T + room) with zeros where there is room for more, positions (B, T)."""
    B, T = len(rows), max(map(len, rows))
    ids, mask = np.zeros((B, T), np.int64), np.zeros((B, T + room), np.int64)
    for b, tokens in enumerate(rows):
        ids[b, T - len(tokens) :] = tokens
        mask[b, T - len(tokens) : T] = 1
    return ids, mask, np.maximum(np.cumsum(mask[:, :T], axis=1) - 1, 0)


def _several(what: str, texts: Any) -> list[Prompt]:
    """One text or several as a list; a bare list of token ids is ambiguous."""
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Sequence) or isinstance(texts, bytes | bytearray):
        raise UsageError(f"{what}s must be a text or a list of them, got {type(texts).__name__}")
    for i, text in enumerate(texts):
        if isinstance(text, int | np.integer):
            raise UsageError(
                f"{what} {i} is a number: put the token ids of one {what} in a list of their own"
            )
        if not isinstance(text, str | Sequence | np.ndarray) or isinstance(text, bytes | bytearray):
            raise UsageError(f"{what} {i} must be a text or a list of token ids, got {type(text).__name__}")
    return list(texts)


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise UsageError(f"{name} must be a whole number, got {value!r}") from None


def _at_least_one(name: str, value: Any) -> int:
    if isinstance(value, bool) or _whole(name, value) < 1:
        raise UsageError(f"{name} must be a whole number of at least 1, got {value!r}")
    return int(value)
