"""Several tokens at once in ONNX Runtime: steps and choices take turns on memory that is bound once.

What a step reads beside its token follows from it, so between two steps nothing is looked up, checked or handed over.
In a model of 30 million parameters that was a tenth of each step.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from portlm.engine import Advance, Array, CallSpec, Ids, Logits, RowChoice
from portlm.errors import PortlmError
from portlm.ops.compiled import available, kernels
from portlm.ops.token_selection import bad_row, select_tokens
from portlm.runtimes.ort_cache import Bound, InPlace, address, extend

TOKENS, MASK = ("batch", "sequence"), "attention_mask"
INPUTS: dict[str, tuple[int | str, ...]] = {
    "input_ids": TOKENS, MASK: ("batch", "past + sequence"), "position_ids": TOKENS,
    "logits_to_keep": ("kept",),
}  # fmt: skip


def goes_on(spec: CallSpec) -> bool:
    """Whether all that a step of a role needs follows from tokens, and all that it remembers grows."""
    logits = spec.outputs[0]
    return (
        all(INPUTS.get(item.name) == item.shape and item.dtype == "int64" for item in spec.inputs)
        and all(state.update == "append" for state in spec.state)
        and len(spec.outputs) == 1
        and (logits.name, logits.dtype, len(logits.shape)) == ("logits", "float32", 3)
        and logits.shape[:2] in (TOKENS, ("batch", "kept"))
        and isinstance(logits.shape[2], int)
    )


def advance(
    call: InPlace,
    spec: CallSpec,
    run: Callable[[Any], None],
    session: Any,
    tensors: Mapping[str, Any],
    asked: Advance,
    count: int,
) -> tuple[Ids, dict[str, Any]]:
    """Go on with B rows.

    Args:
        call: of the role.
        spec: of the role, which goes_on().
        run: runs its graph on a binding.
        session: the graph.
        tensors: of the state.
        asked: what to do.
        count: tokens of each row, at most.

    Returns:
        (n, B) ids, and the next state's tensors.

    Raises:
        PortlmError: the logits behind the first token are not numbers.
    """
    until = time.monotonic() + asked.seconds
    cache, past = extend(call.grown, tensors, 1, call.most)
    masks = _Masks(asked.lengths, past, count) if any(i.name == MASK for i in spec.inputs) else None
    chooser, tokens, bound = Chooser(asked.choices, asked.vocabulary), asked.tokens.tolist(), None
    drawn: list[list[int]] = []
    while True:
        n = len(drawn)
        if bound is None:
            bound = call.bound(session, cache)
            ids, positions = _bind(bound, spec, tokens, asked.lengths + n, chooser)
        if masks is not None:
            masks.give(bound, past + n + 1)
        run(bound.binding)
        try:
            chooser.choose(n)
        except PortlmError as error:
            if not n:
                raise PortlmError(f"ort:cpu: new token {asked.choices[0].step}: {error}") from None
            break  # the last token drawn counts as unread: the next call says what is wrong
        tokens = ids.tolist()
        drawn.append(tokens)
        n += 1
        if n == count or not asked.ends.isdisjoint(tokens) or time.monotonic() >= until:
            break
        if not cache.claim(past + n, 1):
            cache, _ = extend(call.grown, cache.views(past + n), 1, call.most)
            bound = None
        for row in range(len(tokens)):
            positions[row] += 1
    return np.array(drawn, np.int64), cache.views(past + len(drawn))


def _bind(
    bound: Bound, spec: CallSpec, tokens: Sequence[int], lengths: Ids, chooser: "Chooser"
) -> tuple[memoryview, memoryview]:
    """Bind all of a step of one token but the mask; return the memory of tokens and of positions, (B,) each."""
    rows = len(tokens)
    made: dict[str, Array] = {
        "input_ids": np.array(tokens, np.int64).reshape(rows, 1),
        "position_ids": lengths.reshape(rows, 1),
        "logits_to_keep": np.zeros(1, np.int64),
    }
    held = {item.name: bound.put(item.name, made[item.name]) for item in spec.inputs if item.name in made}
    vocabulary = int(spec.outputs[0].shape[2])  # goes_on() saw that it is a number
    logits = bound.receive("logits", (rows, 1, vocabulary), np.float32)
    ids = held["input_ids"].reshape(rows)
    chooser.place(logits[:, 0], ids)
    return ids.data, held.get("position_ids", made["position_ids"]).reshape(rows).data


class _Masks:
    """The mask (B, P + 1) of one step after the other, in memory that is written once wherever that can be.

    A mask of one row, or of nothing but ones, is the beginning of the next one.
    """

    def __init__(self, lengths: Ids, past: int, count: int):
        """Make the last one.

        Args:
            lengths: (B,) tokens of each row, which are the last slots of the past.
            past: slots before the first step.
            count: steps.
        """
        self._rows = len(lengths)
        self._last = (np.arange(past + count) >= (past - lengths)[:, None]).astype(np.int64)
        self._one_begins_the_next = self._rows == 1 or bool(self._last.all())

    def give(self, bound: Bound, slots: int) -> None:
        """Bind that of a step for which there are so many slots."""
        if self._one_begins_the_next:
            bound.lend(MASK, self._last, (self._rows, slots))
        else:
            bound.put(MASK, self._last[:, :slots])


class Chooser:
    """Chooses the next token of each row from logits that are always at one place, and puts it where a step reads it.

    Between two steps every array that is touched costs more than what is done with it, because the weights have been
    through the caches: one call of the kernel, with addresses that are known, touches the least.
    """

    def __init__(self, choices: Sequence[RowChoice], vocabulary: int):
        """Take what follows from the choices.

        Args:
            choices: of the rows.
            vocabulary: ids from here on stand for no token.
        """
        self._choices, self._vocabulary = choices, vocabulary
        greedy = not any(choice.temperature for choice in choices)
        settings = {(0.0, 0, 1.0, 0.0, 0) if greedy else (*choice[:4], choice.step) for choice in choices}
        self._settings = settings.pop() if len(settings) == 1 else None
        self._seeds = np.array([choice.seed for choice in choices], np.uint64)
        self._streams = np.array([choice.stream for choice in choices], np.uint64)

    def place(self, logits: Logits, tokens: Ids) -> None:
        """Say where logits (B, V) are, and where tokens (B,) go."""
        rows, width = logits.shape
        self._logits, self._tokens, self._ids = logits[:, : self._vocabulary], tokens, tokens.data
        self._call: tuple[Any, ...] | None = None
        if self._settings is not None and (rows == 1 or width == self._vocabulary) and available():
            *filters, self._step = self._settings
            words = address(self._seeds), address(self._streams)
            self._call = (address(logits), rows, self._vocabulary, *filters, *words)
            self._to = address(tokens)

    def choose(self, later: int) -> None:
        """Put the next token of each row in its place.

        Args:
            later: tokens that each has been given since the choices were made.

        Raises:
            PortlmError: the logits of a row are not numbers.
        """
        if self._call is None:
            self._tokens[:] = choose(self._logits, self._choices, later)
            return
        kernels.select_tokens(*self._call, self._step + later, self._to)
        for row, token in enumerate(self._ids):
            if token < 0:
                raise bad_row(self._logits, row)


def choose(logits: Logits, choices: Sequence[RowChoice], later: int) -> Ids:
    """Choose the next token of each row.

    Args:
        logits: (B, V).
        choices: of the rows.
        later: tokens that each has been given since.

    Returns:
        (B,) ids.

    Raises:
        PortlmError: the logits of a row are not numbers.
    """
    tokens = np.empty(len(choices), np.int64)
    alike: dict[tuple[float | int, ...], list[int]] = {}
    for row, choice in enumerate(choices):
        alike.setdefault((*choice[:4], choice.step), []).append(row)
    for (temperature, top_k, top_p, min_p, step), members in alike.items():
        part = np.ascontiguousarray(logits[members])
        seeds, streams = [choices[row].seed for row in members], [choices[row].stream for row in members]
        settings = (temperature, int(top_k), top_p, min_p, seeds, int(step) + later, streams)
        tokens[members] = select_tokens(part, *settings)
    return tokens
