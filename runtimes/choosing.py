"""What a session does with a head that gives one number for a text: which of several answers goes with a context.

Radford et al., "Improving Language Understanding by Generative Pre-Training", 2018: the context is read with each
answer by itself, as the pair of texts that the tokenizer's template makes of them, and the softmax over their numbers
says how probable each answer is.
"""

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
from msgspec import Struct

from portlm.arguments import shown, whole
from portlm.errors import UsageError
from portlm.runtimes.answers import softmax
from portlm.runtimes.reading import Reading

FEWEST = 2  # answers: the share of one alone is 1, whatever it says


class Choice(Struct, frozen=True):
    """How probable each of several answers is.

    Attributes:
        answers: as they were given.
        scores: the probability of each, in the same order; their sum is 1.
    """

    answers: tuple[str, ...]
    scores: tuple[float, ...]

    @property
    def index(self) -> int:
        """The place of the most probable answer among those given; of equals, the first."""
        return self.scores.index(max(self.scores))

    @property
    def answer(self) -> str:
        """The most probable answer."""
        return self.answers[self.index]

    @property
    def score(self) -> float:
        """Its probability."""
        return self.scores[self.index]


class Choosing(Reading):
    """The verb of a session on a model with a head "choose", beside those of Reading."""

    @overload
    def choose(  # type: ignore[overload-overlap]
        self, contexts: str, answers: Sequence[str], *, batch_size: int = ...
    ) -> Choice: ...

    @overload
    def choose(
        self, contexts: Sequence[str], answers: Sequence[Sequence[str]], *, batch_size: int = ...
    ) -> list[Choice]: ...

    def choose(
        self,
        contexts: str | Sequence[str],
        answers: Sequence[str] | Sequence[Sequence[str]],
        *,
        batch_size: int = 32,
    ) -> Choice | list[Choice]:
        """Say which of several answers goes with a context, or do so for each of several contexts.

        Args:
            contexts: what is asked or continued; one text, or several.
            answers: at least two texts, or for several contexts as many lists of them. Nothing but what the tokenizer's
                template has stands between a context and an answer: a space belongs to the answer.
            batch_size: pairs that are computed together. It changes the speed and the memory, not the answers.

        Returns:
            The probability of each answer, or a list of these for several contexts.

        Raises:
            ContextLengthError: a context has with an answer more tokens than the model's context.
            UsageError: the model has no head for this, there are fewer than two answers, or an argument is out of
                range.
            PortlmError: the model gave numbers that are none.
        """
        reader, count = self._answering("head:choose", "choose among answers", 2)
        if count != 1:
            raise UsageError(
                f"this model cannot choose among answers: its head:choose gives {count} numbers for a text, not 1"
            )
        single = isinstance(contexts, str)
        asked = [contexts] if isinstance(contexts, str) else list(contexts)
        given: Any = [answers] if single else answers
        if isinstance(given, str) or len(given) != len(asked):
            raise UsageError(f"{len(asked)} contexts need as many lists of answers, got {shown(answers)}")
        pairs: list[tuple[str, str]] = []
        for i, (context, texts) in enumerate(zip(asked, given, strict=True)):
            name = "the context" if single else f"context {i}"
            if not isinstance(context, str):
                raise UsageError(f"{name} must be a text, got {shown(context)}")
            if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
                raise UsageError(f"the answers to {name} must be a list of texts, got {shown(texts)}")
            if len(texts) < FEWEST:
                raise UsageError(f"{name} needs at least {FEWEST} answers to choose from, got {len(texts)}")
            pairs += [(context, str(text)) for text in texts]
        rows = self._encoded([pair[0] for pair in pairs], False, [pair[1] for pair in pairs])
        numbers = np.zeros(len(rows), np.float32)
        for i, outputs in reader.read(rows, whole("batch_size", batch_size, 1)):
            numbers[i] = outputs["logits"][0]
        ends = np.cumsum([len(texts) for texts in given])[:-1]
        found = [
            Choice(tuple(texts), tuple(softmax(part).tolist()))
            for texts, part in zip(given, np.split(numbers, ends), strict=True)
        ]
        return found[0] if single else found
