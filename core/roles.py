"""What one function of a model takes, returns and remembers: the plain data between a model file and an engine.

A role ("encoder", "decoder", "head:<name>") is one function. Its inputs and outputs are tensors of one call; its
state is carried by the engine from call to call. Shapes mix sizes and symbols: "batch" rows, "sequence" new tokens,
"past" tokens already in the state, and any other name a model needs, such as "source" for an encoder's tokens. A sum
is written "past + sequence". Every shape begins with "batch", save those of inputs that are the same for all rows.

A masked token (0 in attention_mask) leaves every state as if it had not been there.
"""

import msgspec

INITIALS = ("empty", "zeros", "given")
UPDATES = ("append", "replace", "constant")


class TensorSpec(msgspec.Struct, frozen=True):
    """One input or output of a call."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class StateSpec(msgspec.Struct, frozen=True):
    """One tensor that the engine carries from call to call.

    Attributes:
        name: of the graph's input.
        output: of the graph's output that becomes the next call's input; "" for a constant.
        dtype: "float32", ...
        shape: with "past" on the axis that grows, if any.
        initial: "empty" ("past" is 0), "zeros", or "given" by the caller of Engine.start.
        update: "append" (the output is the old value, grown along "past"), "replace" or "constant".
    """

    name: str
    output: str
    dtype: str
    shape: tuple[int | str, ...]
    initial: str
    update: str
