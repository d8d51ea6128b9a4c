"""One description of an op, from which its forms are derived.

`core/ops/<op>.py` ends with one `SPEC = OpSpec(...)`. From it follow the operator table of domain ai.portlm and its
check, the table of the documents, the node that capturing a model writes, and TVM's list of functions and call of every
op that is a plain one. What is truly different per engine is written beside that engine.

Nothing here imports PyTorch or onnx: a portable form is a function that is given the builder it writes to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from msgspec import Struct

DOMAIN, DOMAIN_VERSION = "ai.portlm", 1

Shape = Sequence[Any]  # of numbers, or of symbols that can be added and multiplied
Attributes = Mapping[str, Any]
FAR = float(2**20)  # a position beyond any context: where the attention mask puts masked slots


class Builder(Protocol):
    """What a portable form may call; values are names."""

    context_length: int  # positions are below it

    def op(self, op_type: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """Append a standard node with one output, called like the node."""

    def split_op(
        self, op_type: str, inputs: Sequence[str], name: str, outputs: Sequence[str], **attributes: Any
    ) -> tuple[str, ...]:
        """Append a standard node with several outputs."""

    def ints(self, *values: int) -> str:
        """Return a one-dimensional int64 constant: a shape, axes."""

    def axis(self, value: int) -> str:
        """Return an int64 constant of rank 0."""

    def scalar(self, value: float) -> str:
        """Return a float32 constant of rank 0."""

    def floats(self, name: str, values: Any) -> str:
        """Return a small float32 table under a name."""

    def counting(self, count: int) -> str:
        """Return the int64 constant 0, 1, ... of so many elements."""

    def weight_shape(self, name: str) -> Shape:
        """Return the shape of a weight or constant."""

    def shared(self, key: str, make: Callable[[], str]) -> str:
        """Return what `make` writes, written once however many nodes ask for it."""

    def unique(self, name: str) -> str:
        """Return a name that is not taken: the given one, or one with a number."""

    def input_shape(self, name: str) -> Shape:
        """Return the declared shape of a graph input."""


class Input(Struct, frozen=True):
    """One input of a node, called like the argument of the PyTorch op that it comes from.

    Attributes:
        name: of both.
        dtype: "float32", "int64", "int8" of a cache, "uint8" for a weight of small whole numbers, or several that it
            may have, as "float16|bfloat16" for a weight of 16 bits.
        optional: may be absent.
        heads: the attribute that counts the heads which lie side by side in the node's last axis, (B, T, H*D). The
            PyTorch op and the portable form see them apart, (B, T, H, D).
        matrix: a weight that the PyTorch op takes as (out, in) and the graph keeps as (in, out).
        rows_at: the node takes a table, and the PyTorch op that table's rows at the ids of the input of this name,
            which the PyTorch op does not have.
    """

    name: str
    dtype: str = "float32"
    optional: bool = False
    heads: str = ""
    matrix: bool = False
    rows_at: str = ""


class Attribute(Struct, frozen=True):
    """One attribute of a node.

    Attributes:
        name: its name.
        kind: int, float or str.
        default: where it is not written; None for an attribute that must be there.
        choices: the values a str may have. TVM's function is given the place in this list.
    """

    name: str
    kind: type
    default: Any = None
    choices: tuple[str, ...] = ()


class Node(Struct, frozen=True):
    """One node of domain ai.portlm.

    Attributes:
        op_type: its operator.
        torch: the registered PyTorch ops that are captured as it, as "portlm::linear".
        inputs: in order.
        outputs: the first is called like the node, others have this as a suffix. The results of the PyTorch op
            beyond these are for its backward only.
        shapes: (shapes of the inputs, None for an absent one; attributes) -> shapes of the outputs.
        portable: (builder, inputs, outputs, attributes): writes the node in standard operators. An absent input is "".
        attributes: in the order that TVM's function takes them.
        kinds: types of the outputs; () if all are float32.
        read: arguments of the PyTorch op by name -> attributes of the node. A ValueError says why there is none.
        output_heads: the first output's counterpart of Input.heads.
        named_after: a node is called after the module of its weight. Without one, after the module that it was computed
            in or, if this is given, the input of this name,
        suffix: with this appended, if it is not "".
        rowwise: only the last axis means anything: inputs and outputs may have any axes before it.
        packed: inputs of which kernels read another form, see portlm.ops.quantized where bits are among the
            attributes, and portlm.ops.half: it is made of weights when a model is opened.
        tvm: the native function "portlm.<tvm>" that takes the inputs, the attributes as numbers and the outputs.
            Without an optional input it is "<tvm>_no_<input>". "" for a node that TVM's lowering writes by hand.
    """

    op_type: str
    torch: tuple[str, ...]
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    shapes: Callable[[Sequence[Any], Attributes], Sequence[Shape]]
    portable: Callable[[Any, Sequence[str], Sequence[str], Attributes], object]
    attributes: tuple[Attribute, ...] = ()
    kinds: tuple[str, ...] = ()
    read: Callable[[Mapping[str, Any]], Attributes] = lambda arguments: {}
    output_heads: str = ""
    named_after: str = ""
    suffix: str = ""
    rowwise: bool = False
    packed: tuple[str, ...] = ()
    tvm: str = ""

    def functions(self) -> tuple[str, ...]:
        """Return the names of TVM's functions for it."""
        if not self.tvm:
            return ()
        return self.tvm, *(f"{self.tvm}_no_{i.name}" for i in self.inputs if i.optional)


class OpSpec(Struct, frozen=True):
    """One op.

    Attributes:
        name: public name, ``portlm.ops.<name>``.
        summary: one line for the documents.
        forward: kernels of ``portlm._C`` that compute it.
        backward: kernels of ``portlm._C`` that differentiate it; empty where no gradient is defined.
        cuda: kernels of ``portlm._C.cuda`` that are its twins.
        nodes: its forms in a graph; empty for an op that never enters one.
        functions: TVM functions beside those of the nodes.
    """

    name: str
    summary: str
    forward: tuple[str, ...] = ()
    backward: tuple[str, ...] = ()
    cuda: tuple[str, ...] = ()
    nodes: tuple[Node, ...] = ()
    functions: tuple[str, ...] = ()


def like_first(count: int = 1) -> Callable[[Sequence[Any], Attributes], Sequence[Shape]]:
    """Return the shape rule of nodes whose outputs are all shaped like their first input."""
    return lambda shapes, attributes: [shapes[0]] * count


def module_of(parameter: str) -> str:
    """Return the path of the module that a parameter belongs to: "h.0.attn" for "h.0.attn.weight"."""
    return parameter.rpartition(".")[0]
