"""What sessions of encoder-decoders do beside others: a prompt is a source that is read, and what is written is new."""

from collections.abc import Callable, Sequence
from typing import Any, Unpack, overload

from portlm.arguments import shown
from portlm.engine import Engine
from portlm.errors import UsageError
from portlm.memory import reads_sources
from portlm.runtimes.decoding import Decoding, Options
from portlm.runtimes.prompts import Ids, Prompt
from portlm.runtimes.results import Generation


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
    """The verb `translate` of a Session.

    Attributes:
        engine: what computes.
        generate: the verb of the session that writes.
    """

    engine: Engine
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
