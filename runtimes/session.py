"""A loaded model: text in, text out, the same on every engine.

One loop serves every family and engine: the scheduler's, which lets rows join and leave a running batch. Neither the
padding nor the neighbours change what a row says. A session keeps nothing between calls: each call starts from an
empty state.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Protocol, Self, Unpack, overload

from portlm.arguments import flag, shown, whole
from portlm.engine import Engine, Placement
from portlm.errors import ContextLengthError, PortlmError, UsageError
from portlm.ops.token_scores import token_scores
from portlm.rows import Rows, pad
from portlm.runtimes.choosing import Choosing
from portlm.runtimes.decoding import DEFAULT_TOKENS, Decoding, Options
from portlm.runtimes.drafting import NewDrafter
from portlm.runtimes.guessing import Guesses
from portlm.runtimes.looking import Looks
from portlm.runtimes.no_tokenizer import NoTokenizer
from portlm.runtimes.prompts import Ids, Prompt, one_or_several, token_ids
from portlm.runtimes.results import Generation, Score, Stats
from portlm.runtimes.scheduler import PATIENCE, Scheduler
from portlm.runtimes.speculation import Speculation
from portlm.runtimes.stopping import StopScanner
from portlm.runtimes.stream import Row, StreamDecoder, TextStream
from portlm.runtimes.translation import Translates, refuse_sources, start_of
from portlm.runtimes.words import Words

PIECE_SECONDS = 0.02  # after which what a stream has is shown: faster than anybody reads


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

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Text to token ids, with those that the model's texts begin and end with unless they are not wanted."""
        ...

    def stream_decoder(self, skip_special: bool = False) -> StreamDecoder:
        """A decoder for one text, which can leave control tokens out."""
        ...


class Session(Looks, Guesses, Translates, Choosing, Words):
    """A model on an engine, with its tokenizer.

    Use it as a context manager, or call close(), to free the device early.

    Attributes:
        engine: what computes.
        tokenizer: what turns text into token ids and back.
        eos_ids: tokens that end a text.
        start_ids: tokens that begin what a model with an encoder writes, () for any other.
        defaults: options of generate that hold where a call says nothing, as the model's generation_config.json has
            them; and max_length, which bounds prompt and new tokens together where nothing says max_new_tokens.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: TextCoder,
        eos_ids: Iterable[int] = (),
        defaults: Mapping[str, Any] | None = None,
        start_ids: Sequence[int] = (),
    ):
        """Put a model together.

        Raises:
            UsageError: the tokenizer has more tokens than the model, or a default is out of range.
        """
        self.engine = engine
        self.tokenizer = tokenizer
        own = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        self.eos_ids = frozenset(whole("one of eos_ids", token, 0) for token in (*eos_ids, *own))
        self.start_ids = tuple(start_ids)
        self.defaults = dict(defaults or {})
        for name, value in self.defaults.items():
            Decoding.of(**{"max_new_tokens" if name == "max_length" else name: value})
        if tokenizer.vocab_size > engine.vocab_size:
            raise UsageError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, but the model only {engine.vocab_size}: "
                "load the tokenizer that the model was trained with"
            )

    @overload
    def generate(  # type: ignore[overload-overlap]
        self,
        prompts: str | Ids,
        *,
        image: Any = ...,
        decoding: Decoding | None = ...,
        batch_size: int = ...,
        add_special_tokens: bool = ...,
        lookup: bool | int = ...,
        draft: "Session | NewDrafter | None" = ...,
        **options: Unpack[Options],
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        image: Any = ...,
        decoding: Decoding | None = ...,
        batch_size: int = ...,
        add_special_tokens: bool = ...,
        lookup: bool | int = ...,
        draft: "Session | NewDrafter | None" = ...,
        **options: Unpack[Options],
    ) -> list[Generation]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        image: Any = None,
        decoding: Decoding | None = None,
        batch_size: int = 16,
        add_special_tokens: bool = True,
        lookup: bool | int = False,
        draft: "Session | NewDrafter | None" = None,
        **options: Unpack[Options],
    ) -> Generation | list[Generation]:
        """Continue one prompt or several; a model with an encoder reads them, and writes what belongs to them.

        Args:
            prompts: a text, or several; in place of a text, a list or an array of token ids. An empty text starts
                from what every text of the model begins with, or from the end-of-text token if that is nothing.
            image: a picture that the model is shown, which stands where the prompt has the name of its token, such as
                <image>: the path of a file, or (height, width, 3) uint8. For several prompts a list, None for none.
            decoding: how to continue them; None for the defaults of the model.
            batch_size: prompts that are computed together. It changes the speed and the memory, not the answers.
            add_special_tokens: put the tokens around a text that the model's texts begin and end with, if the
                tokenizer says that there are any. Token ids are taken as they are.
            lookup: guess that a text goes on as it did where its last tokens stood before, and read several guessed
                tokens in one pass (portlm.runtimes.speculation): the same tokens, sooner where a text repeats itself.
                A number bounds the tokens of a guess, which True leaves at 16.
            draft: guess with a smaller model of the same tokenizer, in a session of its own, or with what this
                function returns for a row (portlm.runtimes.drafting). One of lookup and draft may be given.
            options: fields of Decoding, which documents them, in place of what `decoding` or the model says.

        Returns:
            One Generation for a text or a flat list of token ids, a list of them for several.

        Raises:
            ContextLengthError: a prompt, or a prompt with max_new_tokens, has more tokens than the model's context.
            UsageError: an argument is out of range; `draft` has another tokenizer; or guesses were asked for together
                with a beam search, or of a model whose state cannot go back.
            PortlmError: the model gave logits that are not numbers.
        """
        wanted = self.decoding(decoding, **options)
        batch_size = whole("batch_size", batch_size, 1)
        several, single = one_or_several("prompt", prompts)
        speculation = self.speculation(lookup, draft)
        if speculation is not None and wanted.num_beams > 1:
            source = self._source(("num_beams",), options) if decoding is None else ""
            raise UsageError(
                f"a beam search takes no guesses: leave out lookup and draft, or num_beams{source}"
            )
        images = self.images_for(image, len(several), single)
        rows = self._rows(several, single, wanted, decoding is None, add_special_tokens, images)
        stats = Stats()
        if wanted.num_beams > 1:
            self._search(rows, batch_size, stats)
        else:
            for _ in self._run(rows, batch_size, stats, speculation):
                pass
        results = [row.generation(stats) for row in rows]
        return results[0] if single else results

    def stream(
        self,
        prompt: Prompt,
        *,
        image: Any = None,
        decoding: Decoding | None = None,
        add_special_tokens: bool = True,
        lookup: bool | int = False,
        draft: "Session | NewDrafter | None" = None,
        **options: Unpack[Options],
    ) -> TextStream:
        """Continue one prompt and return its text piece by piece: the text that generate would return.

        A piece is never empty, ends on a whole character, and holds no part of a stop string. Arguments and errors
        are those of generate; errors in the arguments are raised here, not at the first piece. A beam search has
        nothing to show before its end, so num_beams must be 1. Of a model without a tokenizer, and of any other, the
        result's ids() gives the token ids one by one.
        """
        wanted = self.decoding(decoding, **options)
        if wanted.num_beams > 1:
            source = self._source(("num_beams",), options) if decoding is None else ""
            raise UsageError(f"a beam search cannot be streamed: use generate, or num_beams = 1{source}")
        several, single = one_or_several("prompt", prompt)
        if several and not single:
            raise UsageError(f"a stream continues one prompt, got {len(several)} in a list: use generate")
        images = self.images_for(image, 1, True)
        rows = self._rows(several or [()], True, wanted, decoding is None, add_special_tokens, images)
        stats = Stats()
        speculation = self.speculation(lookup, draft)
        steps = self._run(rows, 1, stats, speculation, PIECE_SECONDS)
        return TextStream(steps, rows[0], stats, self.textless)

    @property
    def textless(self) -> str:
        """Why the model takes and gives token ids alone; "" if it has a tokenizer."""
        return self.tokenizer.why if isinstance(self.tokenizer, NoTokenizer) else ""

    def decoding(self, decoding: Decoding | None = None, **options: Unpack[Options]) -> Decoding:
        """Return the settings that generate uses for these arguments: those of the model where nothing is said.

        Raises:
            UsageError: an argument is out of range.
        """
        if decoding is not None:
            return Decoding.of(decoding, **options)
        own = {
            name: value
            for name, value in self.defaults.items()
            if name not in ("max_new_tokens", "max_length")
        }
        try:
            return Decoding.of(**{**own, **options})
        except UsageError as error:
            Decoding.of(**options)  # an error of the arguments alone is said without the model's
            raise UsageError(
                f"{error}{self._source(('num_beams', 'temperature', 'stop'), options)}"
            ) from None

    def _source(self, names: Iterable[str], options: Mapping[str, Any]) -> str:
        """Say which settings come from the model, for an error that the caller may not understand otherwise."""
        own = [name for name in names if name not in options and self.defaults.get(name)]
        values = ", ".join(f"{name} = {shown(self.defaults[name])}" for name in own)
        return f" ({values} is this model's default, from generation_config.json)" if own else ""

    @overload
    def score(  # type: ignore[overload-overlap]
        self, texts: str | Ids, *, batch_size: int = ..., add_special_tokens: bool = ...
    ) -> Score: ...

    @overload
    def score(
        self, texts: Sequence[Prompt], *, batch_size: int = ..., add_special_tokens: bool = ...
    ) -> list[Score]: ...

    def score(
        self, texts: Prompt | Sequence[Prompt], *, batch_size: int = 16, add_special_tokens: bool = True
    ) -> Score | list[Score]:
        """Return the log-probability of each token of a text, or of several, after its first.

        Args:
            texts: a text, or several; in place of a text, a list or an array of token ids. To score the first token
                of a text too, something must stand in front of it: see add_special_tokens.
            batch_size: texts that are computed together. It changes the speed and the memory, not the answers.
            add_special_tokens: put the tokens around a text that the model's texts begin and end with, if the
                tokenizer says that there are any. Token ids are taken as they are.

        Returns:
            One Score for a text or a flat list of token ids, a list of them for several.

        Raises:
            ContextLengthError: a text has more tokens than the model's context.
            UsageError: a text is empty, or batch_size is less than 1.
            PortlmError: the model gave logits that are not numbers.
        """
        batch_size = whole("batch_size", batch_size, 1)
        refuse_sources(self.engine, "a score is of a text that a model continues")
        several, single = one_or_several("text", texts)
        ids: dict[str, tuple[int, ...]] = {}
        for i, text in enumerate(several):
            name = "the text" if single else f"text {i}"
            tokens = self._encode(name, text, add_special_tokens)
            if not tokens or not len(text):
                raise UsageError(f"{name} is empty, so there is nothing to score")
            if len(tokens) > self.engine.context_length:
                raise ContextLengthError(len(tokens), self.engine.context_length, name)
            ids[name] = tokens
        scores: list[Score] = []
        for begin in range(0, len(ids), batch_size):
            scores += self._score(dict(list(ids.items())[begin : begin + batch_size]))
        return scores[0] if single else scores

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

    def _rows(
        self,
        prompts: list[Prompt],
        single: bool,
        decoding: Decoding,
        of_model: bool,
        add_special_tokens: bool,
        images: Sequence[Any],
    ) -> list[Row]:
        """Rows for prompts, checked.

        Args:
            prompts: texts or token ids.
            single: whether one was given by itself, for messages.
            decoding: of all.
            of_model: whether the model's own bounds hold where `decoding` has none.
            add_special_tokens: see generate.
            images: the picture of each, or None.
        """
        if decoding.stop and self.textless:
            raise UsageError(f"{self.textless}, so it writes no text that a stop string could be in")
        whole("top_k", decoding.top_k, 0, self.engine.vocab_size)
        bounds = self.defaults if of_model else {}
        eos_ids = frozenset() if decoding.ignore_eos else self.eos_ids
        settings = zip(prompts, decoding.draws(len(prompts)), decoding.per_row(len(prompts)), strict=True)
        rows, start = [], start_of(self.engine, self.start_ids)
        what = "source" if start else "prompt"
        for i, (prompt, (seed, stream), own) in enumerate(settings):
            name = f"the {what}" if single else f"{what} {i}"
            tokens = self._encode(name, prompt, add_special_tokens)
            if not tokens and start:
                raise UsageError(f"{name} is empty, and this model reads a source before it writes")
            tokens, picture = self.with_picture(name, tokens or self._start(name), images[i])
            source = tokens if start else ()
            tokens = start or tokens
            count = self._room(name, len(tokens), own.max_new_tokens, bounds)
            own = own if own.max_new_tokens == count else replace(own, max_new_tokens=count)
            decoder = self.tokenizer.stream_decoder(skip_special=True)
            scanner = StopScanner(own.stop)
            rows.append(
                Row(tokens, own, eos_ids, seed, stream, decoder, scanner, source=source, picture=picture)
            )
        return rows

    def _room(self, name: str, tokens: int, asked: Any, bounds: Mapping[str, Any]) -> int:
        """How many new tokens a prompt gets: those asked for, or what the model's bounds and context leave."""
        limit = self.engine.context_length
        if tokens > limit:
            raise ContextLengthError(tokens, limit, name)
        if asked is None:
            longest = bounds.get("max_length", limit)
            if "max_new_tokens" in bounds or "max_length" not in bounds:
                asked = bounds.get("max_new_tokens", DEFAULT_TOKENS)
            elif tokens < longest:
                asked = longest - tokens
            else:
                raise UsageError(
                    f"{name} has {tokens} tokens, and with max_length = {longest}, this model's default from "
                    "generation_config.json, there is no room for new ones: give max_new_tokens"
                )
            asked = max(1, min(asked, limit - tokens))
        if tokens + asked > limit:
            what = f"{name} ({tokens} tokens) with max_new_tokens = {asked}"
            room = limit - tokens
            advice = f"set max_new_tokens to at most {room}, shorten the prompt" if room else ""
            raise ContextLengthError(tokens + asked, limit, what, advice)
        return int(asked)

    def _start(self, name: str) -> tuple[int, ...]:
        if self.tokenizer.eos_id is None:
            raise UsageError(
                f"{name} is empty, and there is no end-of-text token to start from: give at least one token"
            )
        return (self.tokenizer.eos_id,)

    def _encode(self, name: str, text: Prompt, add_special_tokens: bool) -> tuple[int, ...]:
        if not isinstance(text, str):
            return token_ids(name, text, self.engine.vocab_size, self.engine.context_length)
        if (placed := self.encode_placed(text, flag("add_special_tokens", add_special_tokens))) is not None:
            return placed
        if add_special_tokens:
            return tuple(self.tokenizer.encode(text))
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def _run(
        self,
        rows: list[Row],
        batch_size: int,
        stats: Stats,
        speculation: Speculation | None,
        seconds: float = PATIENCE,
    ) -> Iterator[None]:
        """Generate for all rows; yield after each step, of so many seconds, with the rows brought up to date."""
        vocabulary = self.tokenizer.vocab_size
        scheduler = Scheduler(self.engine, batch_size, vocabulary, stats, seconds, speculation)
        scheduler.add(rows)
        while scheduler.busy:
            scheduler.step()
            yield

    def _search(self, rows: list[Row], batch_size: int, stats: Stats) -> None:
        """Give each row the best hypothesis of a beam search."""
        from portlm.runtimes.beam import Search, search

        began = time.perf_counter()
        prompts = max(1, batch_size // rows[0].decoding.num_beams) if rows else 1
        ordered = sorted(rows, key=lambda row: len(row.source or row.prompt))  # a batch ends with its longest
        for begin in range(0, len(ordered), prompts):
            batch = ordered[begin : begin + prompts]
            searches = [
                Search(row.prompt, row.decoding, row.eos_ids, source=row.source, picture=row.picture)
                for row in batch
            ]
            search(self.engine, searches, self.tokenizer.vocab_size)
            for row, found in zip(batch, searches, strict=True):
                for token in found.best.tokens:
                    row.push(token)
                stats.rows += 1
                stats.prompt_tokens += len(row.source or row.prompt)
                stats.new_tokens += len(row.tokens)
        stats.decode_seconds += time.perf_counter() - began

    def _score(self, named: Mapping[str, tuple[int, ...]]) -> list[Score]:
        names, texts = list(named), list(named.values())
        ids, real = pad(texts)
        B, T = ids.shape
        logprobs: list[list[float]] = [[] for _ in texts]
        greedy: list[list[bool]] = [[] for _ in texts]
        rows = Rows(self.engine, B)
        for begin, end in rows.chunks(B, T - 1, every=not rows.scores):
            part, targets = slice(begin, end), ids[:, begin + 1 : end + 1]
            if rows.scores:
                found, best = rows.score(ids[:, part], targets, real[:, part])
            else:
                logits = rows.read(ids[:, part], real[:, part], every=True)
                found, best = token_scores(logits.reshape(-1, logits.shape[-1]), targets.ravel())
                found, best = found.reshape(targets.shape), best.reshape(targets.shape)
            for b, tokens in enumerate(texts):
                first = max(0, T - len(tokens) - begin)
                if (best[b, first:] < 0).any():
                    where = f"{self.engine.name}:{self.engine.device}: {names[b]}"
                    raise PortlmError(
                        f"{where}: the logits are not numbers: check the weights for NaN or infinity"
                    )
                logprobs[b] += found[b, first:].tolist()
                greedy[b] += (best[b, first:] == targets[b, first:]).tolist()
        return [
            Score(tokens, tuple(p), tuple(g))
            for tokens, p, g in zip(texts, logprobs, greedy, strict=True)
        ]  # fmt: skip
