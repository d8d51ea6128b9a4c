"""A loaded model: text in, text out, the same on every engine.

One loop serves every family and engine: the scheduler's, which lets rows join and leave a running batch. Neither the
padding nor the neighbours change what a row says. A session keeps nothing between calls: each call starts from an
empty state.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self, Unpack, overload

import numpy as np

from portlm.engine import Engine, Placement
from portlm.errors import ContextLengthError, PortlmError, UsageError
from portlm.ops.token_selection import check_filters
from portlm.rows import Rows, pad
from portlm.runtimes.beam import Search, search
from portlm.runtimes.decoding import Decoding, Options, at_least_one, whole
from portlm.runtimes.no_tokenizer import NoTokenizer
from portlm.runtimes.results import Generation, Score, Stats
from portlm.runtimes.scheduler import Scheduler
from portlm.runtimes.stopping import StopScanner

Prompt = str | Sequence[int]


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


@dataclass
class _Row:
    """One prompt and what has been said to it."""

    prompt: tuple[int, ...]
    decoding: Decoding  # of this row: max_new_tokens is one number
    eos_ids: frozenset[int]
    seed: int
    stream: int  # of random numbers
    decoder: StreamDecoder
    scanner: StopScanner
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: str | None = None

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
    def generate(  # type: ignore[overload-overlap]
        self,
        prompts: str,
        *,
        decoding: Decoding | None = ...,
        batch_size: int = ...,
        **options: Unpack[Options],
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        decoding: Decoding | None = ...,
        batch_size: int = ...,
        **options: Unpack[Options],
    ) -> list[Generation]: ...

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        *,
        decoding: Decoding | None = None,
        batch_size: int = 16,
        **options: Unpack[Options],
    ) -> Generation | list[Generation]:
        """Continue one prompt or several.

        Args:
            prompts: a text, or several; in place of a text, a sequence of token ids. An empty text starts from the
                end-of-text token, as every document in training did.
            decoding: how to continue them; None for the defaults.
            batch_size: prompts that are computed together. It changes the speed and the memory, not the answers.
            options: fields of Decoding, which documents them, in place of what `decoding` says.

        Returns:
            One Generation for a text, a list of them for a sequence.

        Raises:
            ContextLengthError: a prompt, or a prompt with max_new_tokens, has more tokens than the model's context.
            UsageError: an argument is out of range.
            PortlmError: the model gave logits that are not numbers.
        """
        wanted = Decoding.of(decoding, **options)
        batch_size = at_least_one("batch_size", batch_size)
        rows = self._rows(prompts, wanted)
        stats = Stats()
        if wanted.num_beams > 1:
            self._search(rows, batch_size, stats)
        else:
            for _ in self._run(rows, batch_size, stats):
                pass
        results = [row.generation(stats) for row in rows]
        return results[0] if isinstance(prompts, str) else results

    def stream(
        self, prompt: Prompt, *, decoding: Decoding | None = None, **options: Unpack[Options]
    ) -> TextStream:
        """Continue one prompt and return its text piece by piece: the text that generate would return.

        A piece is never empty, ends on a whole character, and holds no part of a stop string. Arguments and errors
        are those of generate; errors in the arguments are raised here, not at the first piece. A beam search has
        nothing to show before its end, so num_beams must be 1.
        """
        wanted = Decoding.of(decoding, **options)
        if wanted.num_beams > 1:
            raise UsageError("a beam search cannot be streamed: use generate, or num_beams = 1")
        rows = self._rows([prompt], wanted)
        stats = Stats()
        return TextStream(self._run(rows, 1, stats), rows[0], stats)

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
        batch_size = at_least_one("batch_size", batch_size)
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

    def _rows(self, prompts: str | Sequence[Prompt], decoding: Decoding) -> list[_Row]:
        several = _several("prompt", prompts)
        if decoding.stop and isinstance(self.tokenizer, NoTokenizer):
            raise UsageError(
                "this model has no tokenizer, so it writes no text that a stop string could be in"
            )
        check_filters(
            self.engine.vocab_size, decoding.temperature, decoding.top_k, decoding.top_p, decoding.min_p
        )
        eos_ids = frozenset() if decoding.ignore_eos else self.eos_ids
        settings = zip(several, decoding.draws(len(several)), decoding.per_row(len(several)), strict=True)
        rows = []
        for i, (prompt, (seed, stream), own) in enumerate(settings):
            tokens = self._encode("prompt", i, prompt) or self._start(i)
            limit = self.engine.context_length
            if len(tokens) > limit:
                raise ContextLengthError(len(tokens), limit, f"prompt {i}")
            assert isinstance(own.max_new_tokens, int)
            total = len(tokens) + own.max_new_tokens
            if total > limit:
                what = f"prompt {i} ({len(tokens)} tokens) with max_new_tokens = {own.max_new_tokens}"
                room = limit - len(tokens)
                advice = f"set max_new_tokens to at most {room}, shorten the prompt" if room else ""
                raise ContextLengthError(total, limit, what, advice)
            decoder = self.tokenizer.stream_decoder(skip_special=True)
            rows.append(_Row(tokens, own, eos_ids, seed, stream, decoder, StopScanner(own.stop)))
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
        tokens = tuple(whole(f"a token of {what} {index}", token) for token in text)
        for token in tokens:
            if not 0 <= token < self.engine.vocab_size:
                raise UsageError(
                    f"{what} {index} holds token {token}, but ids run from 0 to {self.engine.vocab_size - 1}"
                )
        return tokens

    def _run(self, rows: list[_Row], batch_size: int, stats: Stats) -> Iterator[None]:
        """Generate for all rows; yield after each step, with the rows brought up to date."""
        scheduler = Scheduler(self.engine, batch_size, self.tokenizer.vocab_size, stats)
        scheduler.add(rows)
        while scheduler.busy:
            scheduler.step()
            yield

    def _search(self, rows: list[_Row], batch_size: int, stats: Stats) -> None:
        """Give each row the best hypothesis of a beam search."""
        began = time.perf_counter()
        prompts = max(1, batch_size // rows[0].decoding.num_beams) if rows else 1
        for begin in range(0, len(rows), prompts):
            batch = rows[begin : begin + prompts]
            searches = [Search(row.prompt, row.decoding, row.eos_ids) for row in batch]
            search(self.engine, searches, self.tokenizer.vocab_size)
            for row, found in zip(batch, searches, strict=True):
                for token in found.best.tokens:
                    row.push(token)
                stats.rows += 1
                stats.prompt_tokens += len(row.prompt)
                stats.new_tokens += len(row.tokens)
        stats.decode_seconds += time.perf_counter() - began

    def _score(self, texts: list[tuple[int, ...]]) -> list[Score]:
        ids, real = pad(texts)
        B, T = ids.shape
        logprobs: list[list[float]] = [[] for _ in texts]
        greedy: list[list[bool]] = [[] for _ in texts]
        rows = Rows(self.engine, B)
        for begin, end in rows.chunks(B, T - 1, every=True):
            logits = rows.read(ids[:, begin:end], real[:, begin:end], every=True)
            for b, tokens in enumerate(texts):
                first = max(begin, T - len(tokens))
                if first >= end:
                    continue
                answers = logits[b, first - begin : end - begin].astype(np.float64)
                target = ids[b, first + 1 : end + 1]
                largest = answers.max(axis=1)
                if not np.isfinite(largest).all():
                    where = f"{self.engine.name}:{self.engine.device}: text {b}"
                    raise PortlmError(
                        f"{where}: the logits are not numbers: check the weights for NaN or infinity"
                    )
                normaliser = largest + np.log(np.exp(answers - largest[:, None]).sum(axis=1))
                chosen = answers[np.arange(len(answers)), target]
                logprobs[b] += (chosen - normaliser).tolist()
                greedy[b] += (answers.argmax(axis=1) == target).tolist()
        return [
            Score(tokens, tuple(p), tuple(g))
            for tokens, p, g in zip(texts, logprobs, greedy, strict=True)
        ]  # fmt: skip


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
