"""The probe of a role that does not continue a text: an encoder, a classifier, a decoder that is given a memory.

It is made from the role's specs alone: a ragged batch of three rows, in one call or, where there is a state, in two, so
that what the first leaves behind matters. Values are compared where they mean something: not on padding.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from portlm.engine import CallSpec, Engine
from portlm.errors import FormatError
from portlm.memory import reads_singly, source_inputs
from portlm.roles import TensorSpec
from portlm.rows import KNOWN

Arrays = dict[str, np.ndarray]

LENGTHS = (6, 4, 3)  # real tokens of the rows in the first call
KEPT = 2  # the last tokens of a call, which are no padding in any row


@dataclass(frozen=True)
class Calls:
    """What a role is asked, and the model's answers.

    Attributes:
        given: value of each given state.
        inputs: of each call.
        answers: outputs of each call, float32; empty before the model was asked.
    """

    given: Arrays
    inputs: tuple[Arrays, ...]
    answers: tuple[Arrays, ...] = ()


def continues_text(spec: CallSpec) -> bool:
    """Say whether a role reads tokens and gives the logits of the next: then decoding is compared, too."""
    names = {item.name for item in spec.inputs}
    logits = [item for item in spec.outputs if item.name == "logits"]
    return (
        "input_ids" in names
        and names <= set(KNOWN)
        and len(logits) == 1
        and len(logits[0].shape) == 3
        and all(state.initial != "given" for state in spec.state)
    )


def make_calls(spec: CallSpec, vocab_size: int, context_length: int) -> Calls:
    """Make the probe of a role.

    Raises:
        FormatError: it has an input of a type that no value can be made up for.
    """
    T = max(1, min(max(LENGTHS), context_length - 1))
    real = _ragged(T)
    first = _Tokens(real, real, np.maximum(real.cumsum(1) - 1, 0))
    one = np.ones((len(LENGTHS), 1), np.int64)
    second = _Tokens(one, np.concatenate([real, one], axis=1), real.sum(1, keepdims=True))
    given = {
        state.name: _value(TensorSpec(state.name, state.dtype, state.shape), first, vocab_size)
        for state in spec.state
        if state.initial == "given"
    }
    calls = (first, second) if spec.state else (first,)
    inputs = ({item.name: _value(item, tokens, vocab_size) for item in spec.inputs} for tokens in calls)
    return Calls(given, tuple(inputs))


def make_source(encoder: CallSpec, vocab_size: int, context_length: int) -> Arrays:
    """Make the inputs of an encoder whose answer a decoder is probed behind: of one call, or of one for each token.

    Raises:
        FormatError: as make_calls.
    """
    if not reads_singly(encoder):
        return make_calls(encoder, vocab_size, context_length).inputs[0]
    lengths = [min(length, context_length) for length in LENGTHS]
    ids = np.arange(sum(lengths), dtype=np.int64) * 7919 % vocab_size  # a prime: no short repetition
    return source_inputs(encoder, [row.tolist() for row in np.split(ids, np.cumsum(lengths)[:-1])])


def answer_calls(engine: Engine, role: str, calls: Calls) -> tuple[Arrays, ...]:
    """Put the probe to an engine; return the outputs of each call."""
    state, answers = engine.start(role, len(LENGTHS), calls.given), []
    for inputs in calls.inputs:
        outputs, state = engine.run(role, inputs, state)
        answers.append({name: np.array(value, np.float32) for name, value in outputs.items()})
    return tuple(answers)


def meaningful(spec: CallSpec, name: str, inputs: Mapping[str, np.ndarray], value: np.ndarray) -> np.ndarray:
    """Return an output as (values that mean something, width): without what is said of padding."""
    shape = next(item.shape for item in spec.outputs if item.name == name)
    mask = inputs.get("attention_mask")
    width = value.shape[-1]
    tokens = next((item.shape[1] for item in spec.inputs if item.name == "input_ids"), None)
    if mask is None or value.ndim < 3 or shape[1] != tokens:
        return value.reshape(-1, width)
    kept: np.ndarray = value[mask[:, -value.shape[1] :] == 1]
    return kept.reshape(-1, width)


@dataclass(frozen=True)
class _Tokens:
    """The tokens of one call: which of the new ones are real (B, T), which of all slots (B, P + T), and positions."""

    new: np.ndarray
    slots: np.ndarray
    positions: np.ndarray


def _ragged(length: int) -> np.ndarray:
    """A mask (B, length) of rows of different lengths, padded on the left."""
    lengths = np.minimum(LENGTHS, length)[:, None]
    mask: np.ndarray = (np.arange(length) >= length - lengths).astype(np.int64)
    return mask


def _value(spec: TensorSpec, tokens: _Tokens, vocab_size: int) -> np.ndarray:
    """A value for an input of a call, or for a given state."""
    B, T = tokens.new.shape
    sizes = {"batch": B, "sequence": T, "past": tokens.slots.shape[1] - T, "kept": min(KEPT, T)}
    extents = [
        dim if isinstance(dim, int) else sum(sizes.get(part, max(LENGTHS)) for part in dim.split(" + "))
        for dim in spec.shape
    ]
    count = int(np.prod(extents))
    if spec.dtype == "float32":
        return np.sin(np.arange(count) * 0.7).astype(np.float32).reshape(extents)
    if spec.dtype != "int64":
        raise FormatError(f"{spec.name} is {spec.dtype}: a probe is made of float32 and int64 alone")
    if spec.name.endswith("attention_mask"):
        by_dim = {"sequence": tokens.new, "past + sequence": tokens.slots}
        return by_dim.get(str(spec.shape[-1]), _ragged(extents[-1]))
    if spec.name.endswith("position_ids"):
        return tokens.positions
    if spec.name == "logits_to_keep":
        return np.arange(T - count, T, dtype=np.int64)
    if spec.name.endswith("input_ids"):
        return (
            np.arange(count, dtype=np.int64).reshape(extents) * 7919 % vocab_size
        )  # a prime: no short repetition
    # Of a small table that is no more known of, such as kinds of tokens: each row in turn.
    return np.arange(count, dtype=np.int64).reshape(extents) % (spec.below or 1)
