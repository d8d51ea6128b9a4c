"""Rows of tokens on an engine: the padding, masks and positions of a batch whose rows differ in length.

All rows end at the same slot. A shorter one is padded on its left, where the mask is 0, so a row's mask follows from
its number of tokens alone. A role without state is asked for everything again at each call; its rows then begin
together and are padded on the right, because nothing tells it where they end. A role that takes one token of each row
per call, as a recurrent one whose graph has no loop, is called once for each. A role that is shown a picture takes its
rows as it takes tokens.

B rows, T new tokens, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Self

import numpy as np

from portlm.arguments import shown, wholes
from portlm.engine import Advance, Array, CallSpec, Engine, Ids, Logits, RowChoice, State
from portlm.errors import UsageError

# What a decoder is given that is shown a picture, (B, rows, width), and which row stands in the place of each token, 0
# for none and i for row i - 1. Where tokens are read, those rows are the ids behind the model's own: V for the first.
PICTURE, PICTURE_IDS = "picture", "picture_ids"
KNOWN = ("input_ids", "attention_mask", "position_ids", "positions", "logits_to_keep", PICTURE_IDS)

TOKENS_PER_CALL = 2048  # of all rows together: what a call needs beside the state stays within some 100 MB
LOGITS_PER_CALL = 1 << 24  # 64 MB, of a role that answers every token


class Rows:
    """B rows that a causal role of an engine has read, and how to go on with them.

    Attributes:
        lengths: (B,) int64, tokens that each row has.
        keeps: whether the role answers only the tokens that it is asked for.
        scores: whether the engine scores tokens without giving logits.
    """

    def __init__(
        self, engine: Engine, batch: int, role: str = "decoder", given: Mapping[str, Array] | None = None
    ):
        """Start B empty rows.

        Raises:
            UsageError: the engine has no such role, or the role takes inputs that are not made of tokens.
        """
        spec = engine.roles.get(role) if isinstance(role, str) else None
        if spec is None:
            known = ", ".join(engine.roles) or "none"
            raise UsageError(
                f"this model has no role {shown(role)}, only {known}, so it cannot continue a text"
            )
        logits = [item for item in spec.outputs if item.name == "logits"]
        if not logits or len(logits[0].shape) != 3 or logits[0].dtype != "float32":
            raise UsageError(f"{role} gives no float32 logits of every token, so it cannot continue a text")
        self._engine, self._role, self._spec = engine, role, spec
        self._inputs = frozenset(item.name for item in spec.inputs)
        if unknown := self._inputs - set(KNOWN):
            raise UsageError(f"{role} takes {min(unknown)}, which does not follow from the tokens")
        self.keeps = "logits_to_keep" in self._inputs
        self._state = engine.start(role, batch, nothing_shown(spec, batch) if given is None else given)
        self.lengths = np.zeros(batch, np.int64)
        self._singly = any(item.name == "input_ids" and item.shape[1:] == (1,) for item in spec.inputs)
        self._texts: list[Ids] | None = None if spec.state else [np.zeros(0, np.int64)] * batch
        can_score = getattr(engine, "can_score", None)
        scores = self._texts is None and not self._singly
        self.scores = scores and can_score is not None and bool(can_score(role))
        self._mask_grows = any("past" in str(i.shape) for i in spec.inputs if i.name == "attention_mask")

    @property
    def room(self) -> int:
        """Tokens of each row that one more call can read and answer, by the context and the size of a call."""
        used = max(self._state.past, int(self.lengths.max()))
        answers = LOGITS_PER_CALL // (len(self.lengths) * self._engine.vocab_size)
        return min(self._engine.context_length - used, max(1, answers))

    def read(self, ids: Ids, real: Ids | None = None, every: bool = False) -> Logits:
        """Read T tokens for each row.

        Args:
            ids: (B, T) int64.
            real: (B, T) int64, 0 for padding, which only a row without tokens may begin with; None if there is none.
            every: answer all T tokens instead of the last one.

        Returns:
            (B, T or 1, V) float32; what is said of padding means nothing.

        Raises:
            UsageError: a token that the model does not have.
            ContextLengthError: a row, or the longest one with its padding, is longer than the context.
        """
        self._check_read(ids, real)
        if self._texts is not None:
            return self._read_whole(self._texts, ids, real, every)
        if self._singly and ids.shape[1] > 1:
            return self._read_singly(ids, real, every)
        inputs, lengths = self._inputs_of(ids, real, every)
        outputs, self._state = self._engine.run(self._role, inputs, self._state)
        self.lengths = lengths
        logits: Logits = outputs["logits"]
        return logits if every or self.keeps else logits[:, -1:]

    def score(self, ids: Ids, targets: Ids, real: Ids | None = None) -> tuple[Array, Ids]:
        """Read T tokens for each row, and say how probable another token is behind each of them.

        It is `read` with every without its logits, of an engine that can do without: only where `scores` is true.

        Args:
            ids: (B, T) int64.
            targets: (B, T) int64.
            real: as of read.

        Returns:
            (B, T) float64 log-probabilities and (B, T) most probable ids, see portlm.engine.Scores; what is said of
            padding means nothing.

        Raises:
            UsageError, ContextLengthError: as of read.
        """
        self._check_read(ids, real)
        inputs, lengths = self._inputs_of(ids, real, every=True)
        scored = self._engine.score(self._role, inputs, self._state, targets)  # type: ignore[attr-defined]
        logprobs, best, self._state = scored
        self.lengths = lengths
        return logprobs, best

    def _check_read(self, ids: Ids, real: Ids | None) -> None:
        if not isinstance(ids, np.ndarray) or ids.ndim != 2 or len(ids) != len(self.lengths) or not ids.size:
            wanted = f"({len(self.lengths)} rows, new tokens)"
            raise UsageError(f"tokens must be an array {wanted} of numpy, got {shown(ids)}")
        if real is not None and (not isinstance(real, np.ndarray) or real.shape != ids.shape):
            raise UsageError(f"what is no padding must be an array {ids.shape} of numpy, got {shown(real)}")

    def _inputs_of(self, ids: Ids, real: Ids | None, every: bool) -> tuple[dict[str, Array], Ids]:
        """What the role is given for T more tokens, and how many each row has then."""
        B, T = ids.shape
        total = self._state.past + T
        inputs: dict[str, Array] = {"input_ids": ids}
        if PICTURE_IDS in self._inputs:
            beyond = np.maximum(ids - (self._engine.vocab_size - 1), 0)
            inputs |= {"input_ids": np.where(beyond, 0, ids), PICTURE_IDS: beyond}
        if real is None:
            positions = self.lengths[:, None] if T == 1 else self.lengths[:, None] + np.arange(T)
            lengths = self.lengths + T
        else:
            before = np.cumsum(real, axis=1)
            positions = np.maximum(self.lengths[:, None] + before - 1, 0)
            lengths = self.lengths + before[:, -1]
        if "attention_mask" in self._inputs:
            if not self._mask_grows:
                inputs["attention_mask"] = np.ones((B, T), np.int64) if real is None else real
            elif B == 1 and lengths[0] == total:
                inputs["attention_mask"] = np.ones((1, total), np.int64)
            else:
                slots = np.arange(total) >= (total - lengths)[:, None]
                inputs["attention_mask"] = slots.astype(np.int64)
        if "position_ids" in self._inputs:
            inputs["position_ids"] = positions
        if self.keeps:
            inputs["logits_to_keep"] = np.arange(T) if every else np.array([T - 1])
        return inputs, lengths

    def _read_singly(self, ids: Ids, real: Ids | None, every: bool) -> Logits:
        """Read T tokens in as many calls."""
        B, T = ids.shape
        answers: Logits | None = None
        for t in range(T):
            one = slice(t, t + 1)
            logits = self.read(
                np.ascontiguousarray(ids[:, one]),
                None if real is None else np.ascontiguousarray(real[:, one]),
            )
            if not every:
                answers = logits
                continue
            if answers is None:
                answers = np.empty((B, T, logits.shape[2]), np.float32)
            answers[:, one] = logits
        assert answers is not None
        return answers

    def _read_whole(self, texts: list[Ids], ids: Ids, real: Ids | None, every: bool) -> Logits:
        """Read everything again, with the new tokens at the end of their rows."""
        B, T = ids.shape
        new = [row if real is None else row[real[b] != 0] for b, row in enumerate(ids)]
        texts = [np.concatenate(pair) for pair in zip(texts, new, strict=True)]
        lengths = np.array([len(text) for text in texts], np.int64)
        longest = max(1, int(lengths.max()))
        places = np.arange(longest)
        inputs: dict[str, Array] = {"input_ids": np.zeros((B, longest), np.int64)}
        for b, text in enumerate(texts):
            inputs["input_ids"][b, : len(text)] = text
        if "attention_mask" in self._inputs:
            inputs["attention_mask"] = (places < lengths[:, None]).astype(np.int64)
        if "position_ids" in self._inputs:
            inputs["position_ids"] = np.tile(places, (B, 1))
        if "positions" in self._inputs:  # the same for all rows, which begin together
            inputs["positions"] = places
        # Where the answers to the new tokens are: the last new token of row b is its token lengths[b] - 1.
        asked = lengths[:, None] + np.arange(-T if every else -1, 0)
        asked = np.maximum(asked, 0)
        if self.keeps:
            inputs["logits_to_keep"], inverse = np.unique(asked, return_inverse=True)
            asked = inverse.reshape(asked.shape)
        outputs, self._state = self._engine.run(self._role, inputs, self._state)
        self._texts, self.lengths = texts, lengths
        answer: Logits = np.take_along_axis(outputs["logits"], asked[..., None], axis=1)
        return answer

    def read_texts(self, texts: Sequence[Sequence[int]]) -> Logits:
        """Read the first tokens of every row, in calls of a bounded size; return (B, V) for the last of each."""
        ids, real = pad(texts)
        ragged = None if real.all() else real
        logits = None
        for begin, end in self.chunks(*ids.shape):
            logits = self.read(ids[:, begin:end], None if ragged is None else ragged[:, begin:end])
        assert logits is not None
        return logits[:, -1]

    def chunks(self, batch: int, tokens: int, every: bool = False) -> Iterator[tuple[int, int]]:
        """Cut T tokens of B rows into calls of a bounded size; a role without state reads them at once."""
        if self._texts is not None and not every:
            yield 0, tokens
        else:
            width = self._engine.vocab_size if every or not self.keeps else 0
            yield from chunks(batch, tokens, width)

    def next(self, tokens: Sequence[int] | Ids) -> Logits:
        """Read one more token for each row; return (B, V)."""
        B = len(self.lengths)
        if isinstance(tokens, np.ndarray):  # what argmax gives, of one axis or two
            tokens = tokens.ravel()
        ids = wholes("tokens", tokens, self._engine.vocab_size - 1)
        if len(ids) != B:
            raise UsageError(f"one token is needed for each of {B} rows, got {shown(ids)}")
        return self.read(np.array(ids, np.int64).reshape(B, 1))[:, -1]

    def advance(
        self,
        tokens: Sequence[int],
        choices: Sequence[RowChoice],
        vocabulary: int,
        ends: frozenset[int],
        count: int,
        seconds: float,
    ) -> Ids | None:
        """Let the engine draw tokens by itself, which is `next` and a choice, several times.

        Args:
            tokens: the next one that each row reads.
            choices: how each row goes on.
            vocabulary: ids from here on are never drawn.
            ends: tokens after which no row goes on.
            count: tokens of each row, at most.
            seconds: after which no further token is begun.

        Returns:
            (n, B) ids, of which the last have not been read; None if this engine, or this role, cannot.
        """
        advance = getattr(self._engine, "advance", None)
        if advance is None or self._texts is not None:
            return None
        asked = Advance(self.lengths, np.array(tokens, np.int64), choices, vocabulary, ends, count, seconds)
        found: tuple[Ids, State] | None = advance(self._state, asked)
        if found is None:
            return None
        ids, self._state = found
        self.lengths = self.lengths + len(ids)
        return ids

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order; a row may be named several times or not at all."""
        rows = wholes("rows", rows, len(self.lengths) - 1)
        if not rows:
            raise UsageError("there must be at least one row to go on with")
        lengths = self.lengths[rows]
        if self._texts is not None:
            self._texts = [self._texts[row] for row in rows]
        skip = self._state.past - int(lengths.max()) if self._state.past else 0
        self._state = self._engine.reorder(self._state, rows, skip)
        self.lengths = lengths

    def crop(self, lengths: Sequence[int]) -> None:
        """Forget all but the first lengths[b] tokens of each row.

        Raises:
            UsageError: the role's state cannot go back, or a row is shorter.
        """
        asked = wholes("lengths", lengths, int(self.lengths.max()))
        if len(asked) != len(self.lengths) or (np.array(asked, np.int64) > self.lengths).any():
            raise UsageError(f"rows of {self.lengths.tolist()} tokens cannot be cropped to {shown(asked)}")
        kept = np.array(asked, np.int64)
        if self._texts is not None:
            self._texts = [text[:n] for text, n in zip(self._texts, kept.tolist(), strict=True)]
        else:
            padding = self._state.past - self.lengths
            self._state = self._engine.crop(self._state, (padding + kept).tolist())
            skip = self._state.past - int(kept.max())
            if skip:
                self._state = self._engine.reorder(self._state, range(len(kept)), skip)
        self.lengths = kept

    def join(self, others: Sequence["Rows"]) -> None:
        """Take over the rows of others, behind these."""
        if not isinstance(others, Sequence) or not all(isinstance(other, Rows) for other in others):
            raise UsageError(f"rows are joined by others in a list, got {shown(others)}")
        parts = [self, *others]
        if self._texts is not None:
            self._texts = [text for part in parts for text in part._texts or ()]
        self._state = self._engine.join([part._state for part in parts])
        self.lengths = np.concatenate([part.lengths for part in parts])

    def copy(self) -> Self:
        """Return the same rows once more, which go on by themselves."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._state = self._engine.copy(self._state)
        return twin


def nothing_shown(spec: CallSpec, batch: int) -> dict[str, Array] | None:
    """Return the picture, of zeros, of B rows of which none is shown one; None for a role that is shown none at all."""
    shape = next((state.shape[1:] for state in spec.state if state.name == PICTURE), None)
    return None if shape is None else {PICTURE: np.zeros((batch, *map(int, shape)), np.float32)}


def rows_shown(spec: CallSpec) -> int:
    """Return how many rows a picture has that a role is shown, 0 for a role that is shown none."""
    nothing = nothing_shown(spec, 1)
    return 0 if nothing is None else nothing[PICTURE].shape[1]


def pad(texts: Sequence[Sequence[int]]) -> tuple[Ids, Ids]:
    """Pad on the left; return ids and mask, both (B, T of the longest)."""
    B, T = len(texts), max(map(len, texts))
    ids, mask = np.zeros((B, T), np.int64), np.zeros((B, T), np.int64)
    for b, tokens in enumerate(texts):
        if len(tokens):
            ids[b, T - len(tokens) :] = tokens
            mask[b, T - len(tokens) :] = 1
    return ids, mask


def chunks(batch: int, tokens: int, width: int = 0) -> Iterator[tuple[int, int]]:
    """Cut T tokens of B rows, each answered with `width` logits, into calls of a bounded size."""
    size = max(1, TOKENS_PER_CALL // batch)
    if width:
        size = min(size, max(1, LOGITS_PER_CALL // (batch * width)))
    for begin in range(0, tokens, size):
        yield begin, min(begin + size, tokens)
