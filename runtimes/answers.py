"""What heads say, in words: labels, tagged words, passages, fillings. Plain arithmetic on the numbers of a head."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from portlm.labels import MULTI, REGRESSION, Labels

Floats = npt.NDArray[np.float32]


class Label(Struct, frozen=True):
    """One of the answers of a head.

    Attributes:
        name: of the label.
        score: its probability; of a regression, the number itself.
    """

    name: str
    score: float


class Classification(Struct, frozen=True):
    """What a text is.

    Attributes:
        labels: all of them, the highest score first; among equals, the one with the lower number.
    """

    labels: tuple[Label, ...]

    @property
    def label(self) -> str:
        """The name with the highest score."""
        return self.labels[0].name

    @property
    def score(self) -> float:
        """The highest score."""
        return self.labels[0].score


class Tag(Struct, frozen=True):
    """A word of a text, or a token, and its label.

    Attributes:
        text: as it stands in the text.
        begin: its first character.
        end: the character behind it.
        label: the most probable one, of a word's first token.
        score: the probability of that.
    """

    text: str
    begin: int
    end: int
    label: str
    score: float


class Passage(Struct, frozen=True):
    """The part of a text that answers a question.

    Attributes:
        text: as it stands in the text; "" for no answer.
        begin: its first character.
        end: the character behind it.
        score: the probability of its start times that of its end; of no answer, those of the text's first token.
    """

    text: str
    begin: int
    end: int
    score: float


class Filling(Struct, frozen=True):
    """A token that a mask may stand for.

    Attributes:
        token: its text.
        token_id: its id.
        score: its probability.
    """

    token: str
    token_id: int
    score: float


def softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """Probabilities (..., N) of logits (..., N), in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    shares: npt.NDArray[np.float64] = shifted / shifted.sum(-1, keepdims=True)
    return shares


def scores_of(logits: Floats, problem: str | None) -> npt.NDArray[np.float64]:
    """Scores (N,) of the N answers for a text.

    One of several labels is a softmax, several at a time are a sigmoid each, and so is one alone if nothing else is
    said; numbers of a regression are as they are.
    """
    if problem == REGRESSION:
        return logits.astype(np.float64)
    if problem == MULTI or (problem is None and len(logits) == 1):
        return 0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64)))
    return softmax(logits)


def classification(logits: Floats, names: Sequence[str], problem: str | None) -> Classification:
    """Every label with its score, from logits (N,)."""
    scores = scores_of(logits, problem)
    order = np.argsort(-scores, kind="stable")
    return Classification(tuple(Label(names[i], float(scores[i])) for i in order))


def names_for(labels: Labels, count: int) -> tuple[str, ...] | None:
    """The names of a head's answers, LABEL_0 and so on where nothing names them; None if they are another number."""
    names = labels.names or tuple(f"LABEL_{i}" for i in range(count))
    return names if len(names) == count else None


def best_passage(
    start: Floats, end: Floats, allowed: npt.NDArray[np.bool_], longest: int
) -> tuple[int, int, float, float]:
    """The passage for which start + end is largest, of at most so many tokens.

    Args:
        start: (T,) logits.
        end: (T,) logits.
        allowed: (T,) tokens that it may begin and end with, at least one.
        longest: tokens of a passage.

    Returns:
        Its first and last token, and the logarithms of its probability and of that of no answer, which is said by the
        first token: the probability of a start times that of an end, each among the allowed tokens and the first. Among
        equals the passage that begins, and then ends, first.
    """
    seen = allowed.copy()
    seen[0] = True
    starts, ends = (_log_shares(logits, seen) for logits in (start, end))
    T = len(start)
    both = starts[:, None] + ends[None, :]
    first, last = np.arange(T)[:, None], np.arange(T)[None, :]
    both[~(allowed[:, None] & allowed[None, :] & (first <= last) & (last < first + longest))] = -np.inf
    best = int(both.argmax())
    return best // T, best % T, float(both.flat[best]), float(starts[0] + ends[0])


def _log_shares(logits: Floats, seen: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    wide = np.where(seen, logits.astype(np.float64), -np.inf)
    shifted: npt.NDArray[np.float64] = wide - wide.max()
    return shifted - np.log(np.exp(shifted).sum())


def pooled(hidden: Any, how: str, normalize: bool) -> Floats:
    """One vector (C,) for a text, from those of its tokens (T, C): their mean, or the first one.

    Args:
        hidden: without padding.
        how: "mean" or "cls".
        normalize: divide by its length; a vector of zeros stays so.
    """
    vector = hidden[0].astype(np.float64) if how == "cls" else hidden.mean(0, dtype=np.float64)
    if normalize:
        length = np.sqrt(vector @ vector)
        vector = vector / length if length > 0 else vector
    found: Floats = vector.astype(np.float32)
    return found
