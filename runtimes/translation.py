"""What sessions of encoder-decoders do beside others: a prompt is a source that is read, and what is written is new."""

from collections.abc import Callable, Sequence
from typing import Any, Unpack, overload

import numpy as np
import numpy.typing as npt

from portlm.arguments import shown
from portlm.engine import Engine
from portlm.errors import ContextLengthError, UsageError
from portlm.memory import DECODER, read_sources, reads_sources
from portlm.runtimes.decoding import Decoding, Options
from portlm.runtimes.prompts import Ids, Prompt, token_ids
from portlm.runtimes.results import Generation

ATTENTION = "attention"  # the output of a decoder that says what it looks at
_TOKEN = {"input_ids", "attention_mask"}  # the inputs of such a decoder, each of one token


def aligns(engine: Engine) -> bool:
    """Say whether a model's decoder reads one token per call and says what of the source it looks at."""
    spec = engine.roles.get(DECODER)
    return (
        spec is not None
        and reads_sources(engine.roles)
        and any(item.name == ATTENTION and item.shape == ("batch", 1, "source") for item in spec.outputs)
        and all(item.name in _TOKEN and item.shape[1:] == (1,) for item in spec.inputs)
    )


def start_of(engine: Engine, start_ids: Sequence[int]) -> tuple[int, ...]:
    """Return the tokens that every target begins with, () for a model that has no encoder.

    Raises:
        UsageError: the model has one, and nothing says how its targets begin.
    """
    if not reads_sources(engine.roles):
        return ()
    if not start_ids:
        raise UsageError(
            "nothing says with which token this model begins to write: give decoder_start_token_id in its "
            "generation_config.json"
        )
    return tuple(start_ids)


def refuse_sources(engine: Engine, what: str) -> None:
    """Raise UsageError if a model reads sources, which what is asked does not do."""
    if reads_sources(engine.roles):
        raise UsageError(f"{what}, and this model writes a target for a source: use generate or translate")


class Translates:
    """The verbs `translate` and `align` of a Session.

    Attributes:
        engine: what computes.
        tokenizer: what turns text into token ids.
        start_ids: tokens that begin what the model writes.
        generate: the verb of the session that writes.
    """

    engine: Engine
    tokenizer: Any
    start_ids: tuple[int, ...]
    generate: Callable[..., Any]

    @overload
    def translate(  # type: ignore[overload-overlap]
        self,
        sources: str | Ids,
        *,
        prefix: str = ...,
        decoding: Decoding | None = ...,
        batch_size: int = ...,
        **options: Unpack[Options],
    ) -> Generation: ...

    @overload
    def translate(
        self,
        sources: Sequence[Prompt],
        *,
        prefix: str = ...,
        decoding: Decoding | None = ...,
        batch_size: int = ...,
        **options: Unpack[Options],
    ) -> list[Generation]: ...

    def translate(
        self,
        sources: Prompt | Sequence[Prompt],
        *,
        prefix: str = "",
        decoding: Decoding | None = None,
        batch_size: int = 16,
        **options: Unpack[Options],
    ) -> Generation | list[Generation]:
        """Write the target of one source or of several, with a model that has an encoder and a decoder.

        It is generate with such a model: what is said there of arguments, results and errors holds.

        Args:
            sources: a text, or several; in place of a text, a list or an array of token ids.
            prefix: put in front of every source that is a text, such as T5's "translate English to German: ".
            decoding: how targets are written; None for the defaults of the model.
            batch_size: sources that are computed together.
            options: fields of Decoding; num_beams and length_penalty are what translations are usually searched with.

        Raises:
            UsageError: the model has no encoder.
        """
        if not reads_sources(self.engine.roles):
            raise UsageError("this model has no encoder, so it translates nothing: use generate")
        if not isinstance(prefix, str):
            raise UsageError(f"prefix must be a text, got {shown(prefix)}")
        given: Any = sources
        if isinstance(sources, str):
            given = prefix + sources
        elif prefix and isinstance(sources, Sequence):
            given = [prefix + source if isinstance(source, str) else source for source in sources]
        found: Any = self.generate(given, decoding=decoding, batch_size=batch_size, **options)
        return found

    def align(self, source: Prompt, target: Prompt) -> npt.NDArray[np.float32]:
        """Say what of a source a model looks at before it writes each token of a target.

        Args:
            source: a text or token ids, as translate reads it.
            target: token ids, such as those of a Generation; or a text, without an end.

        Returns:
            (T, S) float32: row t is before token t of the target is written, and adds up to 1 over the source's tokens.

        Raises:
            UsageError: the model says nothing of the kind, a side is empty, or a token is none of the model's.
            ContextLengthError: a side is longer than the context.
        """
        if not aligns(self.engine):
            raise UsageError(
                "this model does not say what it looks at: its decoder has no output attention "
                "(families bahdanau and luong have)"
            )
        start, limit = start_of(self.engine, self.start_ids), self.engine.context_length
        sides: list[tuple[int, ...]] = []
        for name, given in (("the source", source), ("the target", target)):
            if isinstance(given, str):
                ids = tuple(self.tokenizer.encode(given, add_special_tokens=name == "the source"))
            else:
                ids = token_ids(name, given, self.engine.vocab_size, limit)
            if not ids:
                raise UsageError(f"{name} is empty: there is nothing to align")
            sides.append(ids)
        read = (*start, *sides[1][:-1])
        if len(read) > limit:
            raise ContextLengthError(len(read), limit, "the target behind the token that begins it")
        state = self.engine.start(DECODER, 1, read_sources(self.engine, sides[:1]))
        one, rows = np.ones((1, 1), np.int64), []
        for token in read:
            every = {"input_ids": np.full((1, 1), token, np.int64), "attention_mask": one}
            inputs = {item.name: every[item.name] for item in self.engine.roles[DECODER].inputs}
            outputs, state = self.engine.run(DECODER, inputs, state)
            rows.append(outputs[ATTENTION][0, 0])
        found: npt.NDArray[np.float32] = np.stack(rows[len(start) - 1 :])
        return found
