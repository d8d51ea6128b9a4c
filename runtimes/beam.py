"""Beam search: the num_beams most probable continuations of each prompt, followed side by side.

Hypotheses are those of transformers' generate (5.x) for the same settings: of the best candidates, those that end a
text among the first num_beams are finished, with their score divided by a power of their length; the best num_beams
of the others go on. A finished hypothesis competes with the earlier ones, so the search can go on after it has found
num_beams of them; early_stopping says when it does not.

V vocabulary, n the beams of one prompt that go on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from portlm.engine import Array, Engine, Logits
from portlm.errors import PortlmError
from portlm.memory import given_for
from portlm.rows import Rows
from portlm.runtimes.decoding import Decoding
from portlm.runtimes.penalties import nothing_left, penalise

_BLOCK = 64  # values that are looked at together, in search of the largest of all


@dataclass(frozen=True)
class Hypothesis:
    """New tokens, and the sum of their log-probabilities, for a finished one divided by the length penalty."""

    tokens: tuple[int, ...]
    score: float


@dataclass
class Search:
    """The beams of one prompt.

    Attributes:
        prompt: its tokens.
        source: what an encoder reads before, () for a model without one.
        picture: pixels (3, H, W) float32 whose rows are in the prompt, None for a text alone.
        decoding: of this prompt; max_new_tokens is one number.
        eos_ids: tokens that end a text.
        running: beams that go on, best first.
        finished: the best num_beams that ended, best first.
        done: whether nothing better is to be expected.
    """

    prompt: tuple[int, ...]
    decoding: Decoding
    eos_ids: frozenset[int]
    running: list[Hypothesis] = field(default_factory=lambda: [Hypothesis((), 0.0)])
    finished: list[Hypothesis] = field(default_factory=list)
    done: bool = False
    source: tuple[int, ...] = ()
    picture: Array | None = None

    def advance(self, logits: npt.NDArray[np.floating]) -> list[int]:
        """Take the logits (n, V) that follow the running beams; return which beam each new one continues."""
        scores = self._log_probabilities(logits)
        for beam, row in zip(self.running, scores, strict=True):
            if self.decoding.penalises:
                penalise(row, self.prompt + beam.tokens, self.decoding)
            row += beam.score
        beams, limit, V = self.decoding.num_beams, self.decoding.max_new_tokens, logits.shape[1]
        flat = scores.ravel()
        candidates = min(max(2, 1 + len(self.eos_ids)) * beams, flat.size)
        best = largest(flat, candidates)
        length = len(self.running[0].tokens) + 1
        going: list[tuple[Hypothesis, int]] = []
        for rank, index in enumerate(best.tolist()):
            parent, token = divmod(index, V)
            found = Hypothesis((*self.running[parent].tokens, token), float(flat[index]))
            if token not in self.eos_ids and length != limit:
                going.append((found, parent))
            elif rank < beams and np.isfinite(found.score):
                self._finish(found)
        going = [pair for pair in going[:beams] if np.isfinite(pair[0].score)]
        if not going and not self.finished:
            raise nothing_left(self.decoding)
        self.running = [found for found, _ in going]
        full = len(self.finished) == beams
        self.done = not going or (full and (self.decoding.early_stopping is True or not self._can_improve()))
        return [parent for _, parent in going]

    @property
    def best(self) -> Hypothesis:
        """The best hypothesis: a finished one, if there is any."""
        return (self.finished or self.running)[0]

    def _finish(self, found: Hypothesis) -> None:
        beams = self.decoding.num_beams
        if self.decoding.early_stopping is True and len(self.finished) == beams:
            return
        score = found.score / len(found.tokens) ** self.decoding.length_penalty
        self.finished.append(Hypothesis(found.tokens, score))
        self.finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self.finished[beams:]

    def _can_improve(self) -> bool:
        """Whether the best running beam may still beat the worst finished one."""
        penalty, length = self.decoding.length_penalty, len(self.running[0].tokens)
        if self.decoding.early_stopping == "never" and penalty > 0:
            assert isinstance(self.decoding.max_new_tokens, int)
            length = self.decoding.max_new_tokens
        return self.running[0].score / length**penalty > self.finished[-1].score

    @staticmethod
    def _log_probabilities(logits: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        wide = logits.astype(np.float64)
        largest = wide.max(axis=1, keepdims=True)
        if not (largest < np.inf).all() or not (largest > -np.inf).all():
            raise PortlmError("the logits are not numbers: check the weights for NaN or infinity")
        shifted = wide - largest
        answer: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        return answer


def largest(values: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    """Return where the largest of some values are, the largest first; there are at least `count` of them.

    They lie in the blocks with the largest maxima, of which no more than `count` can be needed: finding those is
    cheaper than partitioning all values.
    """
    blocks = len(values) // _BLOCK
    places = np.arange(len(values))
    if blocks > count:
        cut = blocks * _BLOCK
        maxima = values[:cut].reshape(blocks, _BLOCK).max(axis=1)
        kept = np.argpartition(-maxima, count - 1)[:count]
        inside = (kept[:, None] * _BLOCK + np.arange(_BLOCK)).ravel()
        places = np.concatenate((inside, places[cut:]))
    found = -values[places]
    best = np.argpartition(found, count - 1)[:count]
    order: npt.NDArray[np.int64] = places[best[np.argsort(found[best], kind="stable")]]
    return order


def search(engine: Engine, searches: Sequence[Search], vocabulary: int) -> int:
    """Run searches together until all are done; return the number of calls after the prompts.

    Args:
        engine: with a role "decoder".
        searches: new ones.
        vocabulary: ids from here on stand for no token and are never taken.

    Raises:
        PortlmError: the logits are not numbers.
    """
    given = given_for(engine, [search.source for search in searches], [search.picture for search in searches])
    rows = Rows(engine, len(searches), given=given)
    logits = _allowed(rows.read_texts([search.prompt for search in searches]), vocabulary)
    active, starts, calls = list(searches), list(range(len(searches))), 0
    while True:
        kept, tokens = [], []
        for found, start in zip(active, starts, strict=True):
            parents = found.advance(logits[start : start + len(found.running)])
            if not found.done:
                kept += [start + parent for parent in parents]
                tokens += [beam.tokens[-1] for beam in found.running]
        active = [found for found in active if not found.done]
        if not active:
            return calls
        rows.keep(kept)
        starts = np.cumsum([0, *(len(found.running) for found in active[:-1])]).tolist()
        logits = _allowed(rows.next(tokens), vocabulary)
        calls += 1


def _allowed(logits: Logits, vocabulary: int) -> Logits:
    if vocabulary == logits.shape[1]:
        return logits
    logits = np.array(logits)
    logits[:, vocabulary:] = -np.inf
    return logits
