"""What one function of a model takes, returns and remembers: the plain data between a model file and an engine.

A role ("encoder", "decoder", "head:<name>") is one function. Its inputs and outputs are tensors of one call; its
state is carried by the engine from call to call. Shapes mix sizes and symbols: "batch" rows, "sequence" new tokens,
"past" tokens already in the state, and any other name a model needs, such as "source" for an encoder's tokens. A sum
is written "past + sequence". Every shape begins with "batch", save those of inputs that are the same for all rows.

A masked token (0 in attention_mask) leaves every state as if it had not been there.

The constraints in the annotations are checked when a manifest is read or written, not when an object is made.
"""

import re
from typing import Annotated

import msgspec
from msgspec import Meta

DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8")
INITIALS = ("empty", "zeros", "given")
UPDATES = ("append", "replace", "constant")

MAX_TEXT = 1024  # characters of any string
MAX_DIMENSION = 2**31
_SYMBOL = r"[A-Za-z_][A-Za-z0-9_]*"


def one_of(options: tuple[str, ...]) -> Meta:
    """The constraint that a string is one of a few."""
    return Meta(pattern=rf"\A({'|'.join(options)})\Z")


Text = Annotated[str, Meta(min_length=1, max_length=MAX_TEXT)]
Size = Annotated[int, Meta(ge=1, le=MAX_DIMENSION)]
Symbol = Annotated[str, Meta(max_length=MAX_TEXT, pattern=rf"\A{_SYMBOL}( \+ {_SYMBOL})*\Z")]
Shape = Annotated[tuple[Size | Symbol, ...], Meta(max_length=8)]
RoleName = Annotated[str, Meta(max_length=64, pattern=r"\A[a-z][a-z0-9_]*(:[a-z0-9_]+)?\Z")]
Dtype = Annotated[str, one_of(DTYPES)]


class TensorSpec(msgspec.Struct, frozen=True):
    """One input or output of a call."""

    name: Text
    dtype: Dtype
    shape: Shape


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

    name: Text
    output: Annotated[str, Meta(max_length=MAX_TEXT)]
    dtype: Dtype
    shape: Shape
    initial: Annotated[str, one_of(INITIALS)]
    update: Annotated[str, one_of(UPDATES)]


def file_stem(role: str) -> str:
    """What a role is called in the names of its files: "head:topic" is head-topic."""
    return role.replace(":", "-")


def symbols(shape: tuple[int | str, ...]) -> set[str]:
    """The names in a shape, those of sums apart: {"batch", "past", "sequence"} of ("batch", "past + sequence")."""
    return {name for part in shape if isinstance(part, str) for name in re.findall(_SYMBOL, part)}
