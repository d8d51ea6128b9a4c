"""What a session does with word vectors: which words are near a word, and which word completes an analogy.

The table is asked of the engine as any text is, all of its tokens in a row of rows, so every engine answers. It can be
asked at all of a model whose encoder takes token ids and nothing else: no positions, no mask, so a token has one vector
whatever stands beside it.

M width of a word vector, V vocabulary.
"""

import difflib
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from portlm.arguments import shown, whole
from portlm.engine import Engine
from portlm.errors import UsageError
from portlm.runtimes.reader import ENCODER, call

HIDDEN = "last_hidden_state"
TOKENS_PER_CALL = 1 << 16
SUGGESTED = 3

Floats = npt.NDArray[np.float64]


class Neighbour(Struct, frozen=True):
    """A word near another, or near where an analogy points.

    Attributes:
        word: as the tokenizer writes it.
        token: its id.
        cosine: of the angle between both vectors.
    """

    word: str
    token: int
    cosine: float


class Words:
    """Verbs of a session on word vectors.

    Attributes:
        engine: what computes.
        tokenizer: what turns text into token ids and back.
    """

    engine: Engine
    tokenizer: Any

    @overload
    def neighbours(  # type: ignore[overload-overlap]
        self, words: str, *, top: int = ...
    ) -> list[Neighbour]: ...

    @overload
    def neighbours(self, words: Sequence[str], *, top: int = ...) -> list[list[Neighbour]]: ...

    def neighbours(
        self, words: str | Sequence[str], *, top: int = 10
    ) -> list[Neighbour] | list[list[Neighbour]]:
        """Return the words whose vectors have the smallest angle to that of a word, or of each of several.

        Args:
            words: one, or several; each a single token of the model's vocabulary.
            top: how many, at most.

        Returns:
            The nearest first, without the word itself and without tokens whose vector is 0; a list of these for
            several words.

        Raises:
            UsageError: the model holds no word vectors, a word is not in its vocabulary or has no vector, or top is
                out of range.
            PortlmError: the model gave numbers that are none.
        """
        check_table(self.engine, "find the neighbours of words")
        top = whole("top", top, 1)
        several = [words] if isinstance(words, str) else list(words)
        if not several:
            raise UsageError("there is no word to find neighbours of: give at least one")
        tokens = [self._token(word) for word in several]
        vectors = self._directions(dict(zip(tokens, several, strict=True)))
        found = [self._nearest(vectors, vectors[token], [token], top) for token in tokens]
        return found[0] if isinstance(words, str) else found

    def analogy(self, a: str, b: str, c: str, *, top: int = 10) -> list[Neighbour]:
        """Return what is to c as b is to a: the words nearest to b - a + c, each vector made 1 long first.

        This is 3CosAdd (Mikolov et al., "Linguistic Regularities in Continuous Space Word Representations", 2013;
        Levy and Goldberg, 2014, gave it its name).

        Args:
            a: "man", say.
            b: "king".
            c: "woman".
            top: how many, at most.

        Returns:
            The nearest first, without a, b and c.

        Raises:
            UsageError: as for neighbours; or b - a + c is 0.
            PortlmError: the model gave numbers that are none.
        """
        check_table(self.engine, "complete analogies of words")
        top = whole("top", top, 1)
        tokens = [self._token(word) for word in (a, b, c)]
        vectors = self._directions(dict(zip(tokens, (a, b, c), strict=True)))
        first, second, third = (vectors[token] for token in tokens)
        point = second - first + third
        if (length := float(np.linalg.norm(point))) < 1e-6:  # of differences of float32 directions
            raise UsageError(f"{b} - {a} + {c} is 0, which points to no word")
        return self._nearest(vectors, point / length, tokens, top)

    def _directions(self, asked: dict[int, str]) -> Floats:
        """The vectors (V, M), each made 1 long; a vector of 0 stays so, and is an error of a word that is asked."""
        table = read_table(self.engine)
        lengths = np.linalg.norm(table, axis=1)
        for token, word in asked.items():
            if not lengths[token]:
                raise UsageError(f"{shown(word)} has the vector 0, which is near no word")
        return table / np.where(lengths > 0, lengths, 1.0)[:, None]

    def _nearest(self, vectors: Floats, point: Floats, without: list[int], top: int) -> list[Neighbour]:
        cosines = vectors @ point
        here = np.array(vectors.any(1), np.bool_)
        here[without] = False
        here[[i for i in self._no_words() if i < len(here)]] = False
        cosines[~here] = -np.inf
        order = np.argsort(-cosines, kind="stable")[: min(top, int(here.sum()))]
        return [Neighbour(self._name(int(i)), int(i), float(cosines[i])) for i in order]

    def _token(self, word: str) -> int:
        """The id of a word.

        Raises:
            UsageError: it is none of the vocabulary. The message has the words that are spelled most alike.
        """
        if not isinstance(word, str) or not word.strip():
            raise UsageError(f"a word must be text that is not empty, got {shown(word)}")
        ids = self.tokenizer.encode(word, add_special_tokens=False)
        if len(ids) == 1 and ids[0] not in self._no_words():
            return int(ids[0])
        near = difflib.get_close_matches(word, self._vocabulary(), SUGGESTED, 0.6)
        hint = f": did you mean {' or '.join(map(shown, near))}?" if near else ""
        if len(ids) > 1 and not {*ids} & self._no_words():
            raise UsageError(
                f"{shown(word)} is {len(ids)} tokens of this model, and each has its own vector{hint}"
            )
        raise UsageError(f"{shown(word)} is not in this model's vocabulary{hint}")

    def _no_words(self) -> set[int]:
        """Control tokens, and the one for unknown words."""
        unknown = getattr(self.tokenizer, "unknown_id", None)
        return {*getattr(self.tokenizer, "special", {}).values(), *(() if unknown is None else (unknown,))}

    def _vocabulary(self) -> list[str]:
        skipped = self._no_words()
        return [self._name(i) for i in range(self.tokenizer.vocab_size) if i not in skipped]

    def _name(self, token: int) -> str:
        """What a token is called; one behind those of the tokenizer has no name."""
        name: str = self.tokenizer.decode([token]) if token < self.tokenizer.vocab_size else ""
        return name.strip() or name


def check_table(engine: Engine, to_do: str) -> None:
    """Check that a model gives a token the same vector wherever it stands.

    Args:
        engine: what computes.
        to_do: what it is wanted for, for the error.

    Raises:
        UsageError: it has no encoder, or one that is told more than the tokens, and so asks what is around them.
    """
    role = engine.roles.get(ENCODER)
    if role is None:
        known = ", ".join(engine.roles) or "nothing"
        raise UsageError(f"this model cannot {to_do}: that takes word vectors, and this one has {known}")
    taken, given = [item.name for item in role.inputs], [item.name for item in role.outputs]
    if taken != ["input_ids"] or HIDDEN not in given or role.state:
        raise UsageError(
            f"this model cannot {to_do}: that takes word vectors, and this one's encoder reads tokens in their context "
            "(embed gives it whole texts)"
        )


def read_table(engine: Engine) -> Floats:
    """Return the vector of every token, (V, M) float64, of a model that `check_table` has passed.

    Raises:
        PortlmError: the model gave numbers that are none.
    """
    at_once = min(engine.context_length, TOKENS_PER_CALL)
    parts = [
        call(engine, ENCODER, {"input_ids": np.arange(begin, min(begin + at_once, engine.vocab_size))[None]})[
            HIDDEN
        ][0]
        for begin in range(0, engine.vocab_size, at_once)
    ]
    return np.concatenate(parts).astype(np.float64)
