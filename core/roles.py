"""What one function of a model takes, returns and remembers: the plain data between a model file and an engine.

A role ("encoder", "decoder", "head:<name>") is one function. Its inputs and outputs are tensors of one call; its
state is carried by the engine from call to call. Shapes mix sizes and symbols: "batch" rows, "sequence" new tokens,
"past" tokens already in the state, and any other name a model needs, such as "source" for an encoder's tokens. A sum
is written "past + sequence". Every shape begins with "batch", save those of inputs that are the same for all rows.

A masked token (0 in attention_mask) leaves every state as if it had not been there.

The constraints in the annotations are checked when a manifest is read or written, not when an object is made.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

ARRAY_DTYPES = ("float32", "float16", "int64", "int32", "int8", "uint8")  # that numpy has
DTYPES = (*ARRAY_DTYPES, "bfloat16")
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
ArrayDtype = Annotated[str, one_of(ARRAY_DTYPES)]


class TensorSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """One input or output of a call.

    Attributes:
        name: of the graph's input or output.
        dtype: "float32", ...
        shape: sizes and symbols.
        below: of an input whose values look something up: each is from 0 to this, exclusive. Export writes it.
    """

    name: Text
    dtype: ArrayDtype
    shape: Shape
    below: Size | None = None


class StateSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """One tensor that the engine carries from call to call.

    Attributes:
        name: of the graph's input.
        output: of the graph's output that becomes the next call's input; "" for a constant.
        dtype: "float32", ...
        shape: with "past" on the axis that grows, if any.
        initial: "empty" ("past" is 0), "zeros", or "given" by the caller of Engine.start.
        update: "append" (the output is the old value, grown along "past"), "replace" or "constant".
        below: of one whose values look something up, as of a TensorSpec.
    """

    name: Text
    output: Annotated[str, Meta(max_length=MAX_TEXT)]
    dtype: ArrayDtype
    shape: Shape
    initial: Annotated[str, one_of(INITIALS)]
    update: Annotated[str, one_of(UPDATES)]
    below: Size | None = None


def file_stem(role: str) -> str:
    """What a role is called in the names of its files: "head:topic" is head-topic."""
    return role.replace(":", "-")


def symbols(shape: tuple[int | str, ...]) -> set[str]:
    """The names in a shape, those of sums apart: {"batch", "past", "sequence"} of ("batch", "past + sequence")."""
    return {name for part in shape if isinstance(part, str) for name in part.split(" + ")}


def contradiction(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], state: Sequence[StateSpec]
) -> str:
    """Say what no engine could carry out in the description of a role, or ""."""
    taken = [*(spec.name for spec in inputs), *(item.name for item in state)]
    returned = [*(spec.name for spec in outputs), *(item.output for item in state if item.output)]
    for verb, names in (("taken", taken), ("returned", returned)):
        (name, count), *_ = Counter(names).most_common(1) or [("", 0)]
        if count > 1:
            return f"{name[:80]!r} is {verb} twice"
    if not inputs or not outputs:
        return f"it {'takes no input' if outputs else 'returns no output'}"
    alone = {dim for spec in inputs for dim in spec.shape if isinstance(dim, str) and " + " not in dim}
    given = {dim for item in state if item.initial == "given" for dim in item.shape if isinstance(dim, str)}
    known = {"batch", "past"} | alone | given
    for what, specs in (("input", inputs), ("output", outputs)):
        for spec in specs:
            if unknown := symbols(spec.shape) - known:
                return f"{what} {spec.name[:80]!r} has a dimension {min(unknown)[:80]!r} that no input has"
    for item in state:
        if problem := _state_contradiction(item):
            return f"state {item.name[:80]!r} {problem}"
    for spec in outputs:
        if spec.shape[:1] != ("batch",):
            return f'output {spec.name[:80]!r} must have "batch" as its first dimension'
    if any("past" in item.shape for item in state) and "sequence" not in alone:
        return 'no input has the dimension "sequence", by which a state grows'
    return ""


def _state_contradiction(state: StateSpec) -> str:
    if state.shape[:1] != ("batch",) or "batch" in state.shape[1:]:
        return 'must have "batch" as its first dimension, and only there'
    if (state.update == "constant") != (state.output == ""):
        return "must have an output, unless it is constant"
    if sums := [dim for dim in state.shape if isinstance(dim, str) and " + " in dim]:
        return f"has the dimension {sums[0][:80]!r}, a sum, which its first value cannot have"
    if state.initial != "given" and (unknown := symbols(state.shape) - {"batch", "past"}):
        return f"begins {state.initial} with a dimension {min(unknown)[:80]!r} that nobody says"
    if state.initial == "given" and "past" in state.shape:
        return 'is given, and has the dimension "past", which begins at 0'
    if (state.initial == "empty" or state.update == "append") and state.shape.count("past") != 1:
        return 'must have one dimension "past" to grow'
    return ""


def interface(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], state: Sequence[StateSpec]
) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """What the graph of a role takes and what it returns, in this order: the state comes last in both."""
    taken = [TensorSpec(item.name, item.dtype, item.shape) for item in state]
    returned = [TensorSpec(item.output, item.dtype, _shape_after(item)) for item in state if item.output]
    return [*inputs, *taken], [*outputs, *returned]


def difference(
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    state: Sequence[StateSpec],
    taken: Sequence[TensorSpec],
    returned: Sequence[TensorSpec],
) -> str:
    """Say where a graph and the description of its role differ, or "".

    The order counts: it says which output becomes which state, and names alone do not.

    Args:
        inputs: of the role.
        outputs: of the role.
        state: of the role.
        taken: what the graph says it takes.
        returned: what the graph says it returns.
    """
    wanted = interface(inputs, outputs, state)
    for what, ours, found in zip(("input", "output"), wanted, (taken, returned), strict=True):
        for i in range(max(len(ours), len(found))):
            here, there = (_place(specs, i) for specs in (ours, found))
            if here != there:
                return f"{what} {i} is {_said(here)} in the manifest and {_said(there)} in the graph"
    return ""


def _shape_after(state: StateSpec) -> Shape:
    if state.update != "append":
        return state.shape
    return tuple("past + sequence" if dim == "past" else dim for dim in state.shape)


def _place(specs: Sequence[TensorSpec], place: int) -> tuple[str, ...]:
    """Name, dtype and dimensions of one of several tensors, sums in one order; () if there are not so many."""
    if place >= len(specs):
        return ()
    spec = specs[place]
    return spec.name, spec.dtype, *(" + ".join(sorted(str(dim).split(" + "))) for dim in spec.shape)


def _said(place: tuple[str, ...]) -> str:
    if not place:
        return "nothing"
    name, dtype, *shape = place
    return f"{name[:80]} {dtype} ({', '.join(shape)[:160]})"
