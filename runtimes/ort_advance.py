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
from portlm.ops.token_selection import select_tokens
from portlm.runtimes.ort_cache import Bound, InPlace, extend

TOKENS = ("batch", "sequence")
INPUTS: dict[str, tuple[int | str, ...]] = {
    "input_ids": TOKENS, "attention_mask": ("batch", "past + sequence"), "position_ids": TOKENS,
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
    rows, wanted = len(asked.choices), {item.name for item in spec.inputs}
    cache, past = extend(call.grown, tensors, 1, call.most)
    mask = (np.arange(past + count) >= (past - asked.lengths)[:, None]).astype(np.int64)  # (B, P + count)
    drawn = np.empty((count, rows), np.int64)
    tokens, bound, n = asked.tokens, None, 0
    while True:
        if bound is None:
            bound = call.bound(session, cache)
            ids, positions, logits = _bind(bound, spec, tokens, asked.lengths + n)
        if "attention_mask" in wanted:
            bound.put("attention_mask", mask[:, : past + n + 1])
        run(bound.binding)
        try:
            tokens = drawn[n] = choose(logits[:, 0, : asked.vocabulary], asked.choices, n)
        except PortlmError as error:
            if not n:
                raise PortlmError(f"ort:cpu: new token {asked.choices[0].step}: {error}") from None
            break  # the last token drawn counts as unread: the next call says what is wrong
        n += 1
        ended = n == count or not asked.ends.isdisjoint(tokens.tolist()) or time.monotonic() >= until
        if ended:
            break
        if not cache.claim(past + n, 1):
            cache, _ = extend(call.grown, cache.views(past + n), 1, call.most)
            bound = None
        else:
            ids[:, 0] = tokens
            positions += 1
    return drawn[:n], cache.views(past + n)


def _bind(bound: Bound, spec: CallSpec, tokens: Ids, lengths: Ids) -> tuple[Ids, Ids, Logits]:
    """Bind all of a step of one token but the mask; return tokens (B, 1), positions (B, 1) and logits (B, 1, V)."""
    rows = len(tokens)
    made: dict[str, Array] = {"input_ids": tokens.reshape(rows, 1), "position_ids": lengths.reshape(rows, 1)}
    made["logits_to_keep"] = np.zeros(1, np.int64)
    held = {item.name: bound.put(item.name, made[item.name]) for item in spec.inputs if item.name in made}
    vocabulary = int(spec.outputs[0].shape[2])  # goes_on() saw that it is a number
    logits = bound.receive("logits", (rows, 1, vocabulary), np.float32)
    return held["input_ids"], held.get("position_ids", made["position_ids"]), logits


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
    if not any(choice.temperature for choice in choices):
        best: Ids = logits.argmax(1)
        if np.isfinite(logits[np.arange(len(best)), best]).all():  # a NaN would have been the largest
            return best
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
