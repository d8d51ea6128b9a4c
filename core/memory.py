"""What a decoder is given of a source: how an encoder's outputs become its given states.

One rule, for every engine and model: a given state of the decoder is the encoder's output of the same name, and
`encoder_attention_mask` is the mask that the encoder was called with. Sources of different lengths are padded on the
left, like all rows, so that states can be joined.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from portlm.engine import Array, CallSpec, Engine
from portlm.errors import ContextLengthError, UsageError
from portlm.rows import pad

ENCODER, DECODER, MASK = "encoder", "decoder", "encoder_attention_mask"
FROM_TOKENS = ("input_ids", "attention_mask", "position_ids")


def reads_sources(roles: Mapping[str, CallSpec]) -> bool:
    """Say whether a model is an encoder-decoder: its decoder is given what its encoder makes of tokens."""
    encoder, decoder = roles.get(ENCODER), roles.get(DECODER)
    if encoder is None or decoder is None or encoder.state:
        return False
    made = {MASK, *(item.name for item in encoder.outputs)}
    given = {state.name for state in decoder.state if state.initial == "given"}
    return bool(given) and given <= made and {item.name for item in encoder.inputs} <= set(FROM_TOKENS)


def source_inputs(spec: CallSpec, sources: Sequence[Sequence[int]]) -> dict[str, Array]:
    """Return the inputs of an encoder for token ids of B sources."""
    ids, mask = pad(sources)
    every = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(1) - 1, 0),
    }
    return {item.name: every[item.name] for item in spec.inputs}


def remembered(engine: Engine, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Call the encoder, and return what the decoder is given of its sources.

    Args:
        engine: of a model that reads_sources.
        inputs: of the encoder.
    """
    ids = inputs["input_ids"]
    outputs, _ = engine.run(ENCODER, inputs, engine.start(ENCODER, len(ids)))
    outputs[MASK] = inputs.get("attention_mask", np.ones(ids.shape, np.int64))
    given = (state.name for state in engine.roles[DECODER].state if state.initial == "given")
    return {name: outputs[name] for name in given}


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
