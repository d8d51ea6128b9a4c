"""What a decoder is given of a source or of a picture: how an encoder's outputs become its given states.

One rule, for every engine and model: a given state of the decoder is the encoder's output of the same name, and
`encoder_attention_mask` is the mask that the encoder was called with. Sources of different lengths are padded on the
left, like all rows, so that states can be joined. An encoder of pictures is the role `see`, and takes nothing else.

An encoder whose graph has no loop, as a recurrent one, takes one token of each row per call and is called once for
each. An input whose name begins with `backward_` gets the tokens from the last to the first. What such an encoder gives
of a token, (batch, 1, ...), is put together along the source, in the source's order: an output whose name begins with
`backward_` is of the token that was read backwards. What has no axis of tokens is what the encoder knows by then, and
that of the last call counts.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from portlm.engine import Array, CallSpec, Engine
from portlm.errors import ContextLengthError, UsageError
from portlm.rows import PICTURE, nothing_shown, pad

ENCODER, DECODER, MASK = "encoder", "decoder", "encoder_attention_mask"
SEE, PIXELS = "see", "pixel_values"
BACKWARD = "backward_"
FROM_TOKENS = ("input_ids", "attention_mask", "position_ids")


def reads_sources(roles: Mapping[str, CallSpec]) -> bool:
    """Say whether a model is an encoder-decoder: its decoder is given what its encoder makes of tokens."""
    encoder, decoder = roles.get(ENCODER), roles.get(DECODER)
    if encoder is None or decoder is None:
        return False
    if encoder.state and not (reads_singly(encoder) and all(s.initial == "zeros" for s in encoder.state)):
        return False
    made = {MASK, *(item.name for item in encoder.outputs)}
    given = {state.name for state in decoder.state if state.initial == "given"}
    taken = {item.name.removeprefix(BACKWARD) for item in encoder.inputs}
    return bool(given) and given <= made and taken <= set(FROM_TOKENS)


def sees_pictures(roles: Mapping[str, CallSpec]) -> bool:
    """Say whether a model's decoder is given what its role `see` makes of pictures, and nothing else."""
    see, decoder = roles.get(SEE), roles.get(DECODER)
    if see is None or decoder is None or see.state:
        return False
    given = {state.name: state.shape for state in decoder.state if state.initial == "given"}
    made = {item.name: item.shape for item in see.outputs}
    pixels = [(item.name, item.dtype, len(item.shape)) for item in see.inputs] == [(PIXELS, "float32", 4)]
    return pixels and given == {PICTURE: made.get(PICTURE)}


def giver_of(roles: Mapping[str, CallSpec]) -> str:
    """Return the role that makes what the decoder is given, "" where nothing is given that this file knows of."""
    return ENCODER if reads_sources(roles) else SEE if sees_pictures(roles) else ""


def reads_singly(encoder: CallSpec) -> bool:
    """Say whether an encoder takes one token of each row per call."""
    return all(item.shape[1:2] == (1,) for item in encoder.inputs)


def source_inputs(spec: CallSpec, sources: Sequence[Sequence[int]]) -> dict[str, Array]:
    """Return the inputs of an encoder for token ids of B sources, each (B, S), also if it takes one token per call."""
    ids, mask = pad(sources)
    every = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(1) - 1, 0),
    }
    every |= {BACKWARD + name: np.ascontiguousarray(value[:, ::-1]) for name, value in every.items()}
    return {item.name: every[item.name] for item in spec.inputs}


def remembered(engine: Engine, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Call the role that makes what the decoder is given, and return that.

    Args:
        engine: of a model that has a giver_of.
        inputs: of that role: of an encoder as source_inputs returns them, or pixels (B, 3, H, W) float32 by name.
    """
    giver = giver_of(engine.roles)
    first, spec = next(iter(inputs.values())), engine.roles[giver]
    if giver == ENCODER and reads_singly(spec):
        outputs = read_singly(engine, giver, inputs)
    else:
        outputs, _ = engine.run(giver, inputs, engine.start(giver, len(first)))
    if giver == ENCODER:
        outputs[MASK] = _mask(inputs, first)
    given = (state.name for state in engine.roles[DECODER].state if state.initial == "given")
    return {name: outputs[name] for name in given}


def _mask(inputs: Mapping[str, Array], ids: Array) -> Array:
    """The mask (B, S) that an encoder is called with, in the order of the source."""
    backward = inputs.get(f"{BACKWARD}attention_mask")
    other = np.ones(ids.shape, np.int64) if backward is None else np.ascontiguousarray(backward[:, ::-1])
    return inputs.get("attention_mask", other)


def read_singly(engine: Engine, role: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Call a role that takes one token of each row per call on S tokens.

    Args:
        engine: what computes.
        role: one that reads_singly.
        inputs: of the role, (B, S, ...) each, those of tokens read backwards in that order.

    Returns:
        Its outputs, those of a token (B, S, ...) in the order of the source.
    """
    B, S = next(iter(inputs.values())).shape[:2]
    state, calls = engine.start(role, B), []
    for t in range(S):
        now = {name: np.ascontiguousarray(value[:, t : t + 1]) for name, value in inputs.items()}
        outputs, state = engine.run(role, now, state)
        calls.append({name: np.array(value) for name, value in outputs.items()})
    found = dict(calls[-1])
    for item in engine.roles[role].outputs:
        if item.shape[1:2] == (1,):
            parts = [outputs[item.name] for outputs in calls]
            found[item.name] = np.concatenate(
                parts[::-1] if item.name.startswith(BACKWARD) else parts, axis=1
            )
    return found


def read_sources(engine: Engine, sources: Sequence[Sequence[int]]) -> dict[str, Array] | None:
    """Return what a decoder is given of B sources, None if all are empty and the model has no encoder.

    Raises:
        UsageError: there is a source and no encoder, or an encoder and an empty source.
        ContextLengthError: a source is longer than the context.
    """
    if not reads_sources(engine.roles):
        if any(sources):
            raise UsageError("this model has no encoder, so it reads no source: give it a prompt")
        return None
    if not all(sources):
        raise UsageError("this model reads a source before it writes, and it was given none")
    if (longest := max(map(len, sources))) > engine.context_length:
        raise ContextLengthError(longest, engine.context_length, "the source")
    return remembered(engine, source_inputs(engine.roles[ENCODER], sources))


def look_at(engine: Engine, pictures: Sequence[Array | None]) -> dict[str, Array] | None:
    """Return what a decoder is given of B pictures, None if there are none and the model sees none.

    Args:
        engine: what computes.
        pictures: pixels (3, H, W) float32 of each row, None for one without a picture.

    Raises:
        UsageError: there is a picture, and the model sees none; or its pixels are not of the size that the model takes.
    """
    there = [pixels for pixels in pictures if pixels is not None]
    if not sees_pictures(engine.roles):
        if there:
            raise UsageError("this model sees no pictures: give it a text alone")
        return None
    nothing = nothing_shown(engine.roles[DECODER], len(pictures))
    if not there:
        return nothing
    assert nothing is not None
    seen = remembered(engine, {PIXELS: np.stack(there)})[PICTURE]
    nothing[PICTURE][[i for i, pixels in enumerate(pictures) if pixels is not None]] = seen
    return nothing


def given_for(
    engine: Engine, sources: Sequence[Sequence[int]], pictures: Sequence[Array | None]
) -> dict[str, Array] | None:
    """Return what a decoder is given of B rows, each with a source, a picture or neither; None if it takes neither.

    Raises:
        UsageError, ContextLengthError: as of read_sources and look_at.
    """
    seen = look_at(engine, pictures)
    return read_sources(engine, sources) if seen is None else seen
