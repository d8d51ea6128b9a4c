"""Records a role's function, and checks what was recorded against what the role declares.

Nothing is computed: the tensors that run through the model only know their shape (compile/recorder.py). The function
runs twice, with other numbers for the role's symbols ("batch", "sequence", "past", ...): what differs is an expression
of them, and everything else must be the same.

This is what torch.export does with symbolic sizes, for those few expressions that a role can have. It takes a twentieth
of the time, and neither symbolic algebra nor a compiler has to be loaded.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from portlm.compile.extents import NUMBERS, Extent, Extents, parse, parts
from portlm.compile.recorder import Recorder, ValuesError, flat, line_of, source_line
from portlm.errors import FormatError
from portlm.models.modes import answering
from portlm.models.roles import Role
from portlm.ops.kernel_op import exporting
from portlm.roles import StateSpec, TensorSpec


@dataclass(frozen=True)
class Result:
    """What is known of a recorded tensor.

    Attributes:
        shape: numbers, and expressions of the role's symbols.
        dtype: of PyTorch.
    """

    shape: tuple[int | Extent, ...]
    dtype: torch.dtype

    @property
    def kind(self) -> str:
        """The dtype's name: "float32"."""
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Recording:
    """What a role's function computes.

    Attributes:
        graph: operators in order. Every node has the Result that it gives in meta["val"], or a tuple of them; the path
            of its module in meta["module"]; and its line, (file, number), in meta["line"].
        inputs: the graph's placeholders for the role's inputs and states, in their order.
        weights: placeholder name -> path of the parameter or buffer in the module.
    """

    graph: fx.Graph
    inputs: tuple[str, ...]
    weights: Mapping[str, str]


def record(module: nn.Module, name: str, role: Role) -> Recording:
    """Record a role's function. The module itself is not changed.

    Args:
        module: whose parameters and buffers the function uses.
        name: of the role, for messages.
        role: the function and what it takes and gives.

    Raises:
        FormatError: the function branches on the values of tensors, does what cannot be recorded, works for one size
            only, or gives something else than the role declares. The message names the line.
    """
    where = _symbols(role)
    numbers = dict(zip(where, NUMBERS, strict=False))
    first = _run(module, name, role, {symbol: pair[0] for symbol, pair in numbers.items()})
    try:
        second = _run(module, name, role, {symbol: pair[1] for symbol, pair in numbers.items()})
        _merge(first, second, Extents(numbers))
    except (FormatError, _DifferentError) as error:
        raise _only_for(module, name, role, numbers, where) or error from error
    recording = Recording(first.graph, tuple(first.inputs), first.weights)
    _check_unchanged(recording, name)
    _check_outputs(recording, name, role)
    return recording


def traced_shapes(role: Role) -> dict[str, tuple[int, ...]]:
    """Return the shapes of inputs and states that a role is first recorded with, by name."""
    return _shapes(role, {symbol: pair[0] for symbol, pair in zip(_symbols(role), NUMBERS, strict=False)})


def _specs(role: Role) -> Sequence[TensorSpec | StateSpec]:
    """What the function takes, in order."""
    return (*role.inputs, *role.state)


def _symbols(role: Role) -> dict[str, str]:
    """The symbols of a role, each with the first input or state that has it."""
    where: dict[str, str] = {}
    for spec in _specs(role):
        for part in (part for d in spec.shape if isinstance(d, str) for part in parts(d)):
            where.setdefault(part, spec.name)
    return where


def _shapes(role: Role, numbers: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The shapes of a role's inputs and states, with a number for each symbol."""
    return {
        spec.name: tuple(
            d if isinstance(d, int) else sum(numbers[part] for part in parts(d)) for d in spec.shape
        )
        for spec in _specs(role)
    }


class _DifferentError(FormatError):
    """Two recordings differ by more than extents."""


def _run(module: nn.Module, name: str, role: Role, numbers: Mapping[str, int]) -> Recorder:
    """Record a role's function with a number for each symbol."""
    recorder = Recorder(module)
    try:
        # In inference mode operators arrive whole: otherwise autograd takes many apart first.
        with answering(module), torch.inference_mode(), exporting(), _flags(), recorder.following():
            shapes = _shapes(role, numbers)
            tensors = [
                torch.empty(shapes[spec.name], dtype=getattr(torch, spec.dtype), device="meta")
                for spec in _specs(role)
            ]
            for tensor in tensors:
                recorder.input(tensor)
            with recorder.without_values(module), recorder:
                values = role.function(*tensors)
            recorder.output(values)
    except FormatError:
        raise
    except ValuesError as error:
        raise FormatError(
            f"the {name} branches on the values of tensors{line_of(error)}, and a graph computes the same for all: "
            "use torch.where, or a mask"
        ) from error
    except Exception as error:  # whatever the model's own code raises
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise FormatError(
            f"the {name} cannot be recorded{line_of(error)}: {type(error).__name__}: {first[:300]}"
        ) from error
    return recorder


@contextmanager
def _flags() -> Iterator[None]:
    """Make torch.compiler.is_exporting() and is_compiling() true, as torch.export does."""
    names = ("_is_exporting_flag", "_is_compiling_flag")
    before = {name: getattr(torch.compiler, name) for name in names if hasattr(torch.compiler, name)}
    try:
        for name in before:
            setattr(torch.compiler, name, True)
        yield
    finally:
        for name, value in before.items():
            setattr(torch.compiler, name, value)


def _merge(first: Recorder, second: Recorder, extents: Extents) -> None:
    """Give the first recording the shapes that hold in both.

    Raises:
        _DifferentError: they are not the same operators with the same arguments, extents aside.
    """
    one, other = list(first.graph.nodes), list(second.graph.nodes)
    if [(n.op, n.name) for n in one] != [(n.op, n.name) for n in other] or first.weights != second.weights:
        raise _DifferentError("its code depends on the size of its inputs")

    def same(a: Any, b: Any) -> Any:
        if isinstance(a, tuple | list) and isinstance(b, tuple | list) and len(a) == len(b):
            return tuple(same(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, Tensor) and isinstance(b, Tensor) and (a.dim(), a.dtype) == (b.dim(), b.dtype):
            return Result(tuple(map(extents.find, a.shape, b.shape)), a.dtype)
        if isinstance(a, fx.Node) and isinstance(b, fx.Node) and a.name == b.name:
            return a
        if type(a) is int and type(b) is int:
            return extents.find(a, b)
        if type(a) is not type(b) or a != b:
            raise _DifferentError(f"{a} became {b}")
        return a

    for a, b in zip(one, other, strict=True):
        if a.op == "call_function" and a.target is not b.target:
            raise _DifferentError(f"{a.target} became {b.target}{source_line(a)}")
        # Arguments first as they are: an extent is none that a graph takes, and stays in meta.
        a.meta["extents"] = [
            x for x in flat((same(a.args, b.args), [same(a.kwargs[k], b.kwargs.get(k)) for k in a.kwargs]))
            if isinstance(x, Extent)
        ]  # fmt: skip
        if "val" in a.meta:
            a.meta["val"] = same(a.meta["val"], b.meta["val"])


def _only_for(
    module: nn.Module,
    name: str,
    role: Role,
    numbers: Mapping[str, tuple[int, int]],
    where: Mapping[str, str],
) -> FormatError | None:
    """The error for a function that does not work alike for two numbers of one symbol; None if there is no such."""
    usual = {symbol: pair[0] for symbol, pair in numbers.items()}
    for symbol, (number, another) in numbers.items():
        try:
            one, other = (_run(module, name, role, usual | {symbol: n}) for n in (number, another))
            _merge(one, other, Extents({symbol: (number, another)}))
        except FormatError as error:
            reason = str(error).partition(": ")[2] if not isinstance(error, _DifferentError) else ""
            return FormatError(
                f"the {name} works for {symbol} = {number} of {where[symbol]} only: its code must not depend on it"
                + (f" (with {another}: {reason})" if reason else "")
            )
    return None


def _check_unchanged(recording: Recording, name: str) -> None:
    """Refuse operators that write to their operand: a graph has values and no memory."""
    for node in recording.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable or schema.name == "aten::detach_":
            continue
        operand = node.args[0]
        place = recording.weights.get(operand.name) if isinstance(operand, fx.Node) else None
        if place is not None:
            raise FormatError(
                f"the {name} changes {place} while it runs{source_line(node)}: carry it as a state of the role instead"
            )
        raise FormatError(
            f"{schema.name}{source_line(node)} writes to its operand, and a graph has no memory to write to: use "
            f"{schema.name.removeprefix('aten::').rstrip('_')}, which returns a new tensor"
        )


def _check_outputs(recording: Recording, name: str, role: Role) -> None:
    declared = [(spec.name, spec.dtype, spec.shape) for spec in role.outputs]
    grown = {"append": lambda d: "past + sequence" if d == "past" else d}
    declared += [
        (spec.output, spec.dtype, tuple(map(grown.get(spec.update, lambda d: d), spec.shape)))
        for spec in role.state
        if spec.output
    ]
    results = output_nodes(recording.graph)
    if len(results) != len(declared):
        names = ", ".join(output for output, _, _ in declared)
        raise FormatError(
            f"the {name} returns {len(results)} tensors, its outputs and states are {len(declared)}: {names}"
        )
    for node, (output, dtype, shape) in zip(results, declared, strict=True):
        found = node.meta["val"] if isinstance(node, fx.Node) else None
        if not isinstance(found, Result):
            raise FormatError(f"the {name} returns {node!r} for {output}, which must be a tensor")
        wanted = tuple(map(parse, shape))
        if found.shape != wanted or found.kind != dtype:
            raise FormatError(
                f"the {name} returns {output} as {found.kind} {_text(found.shape)}, it declares {dtype} {_text(wanted)}"
            )


def output_nodes(graph: fx.Graph) -> tuple[Any, ...]:
    """The nodes whose values a graph returns, in order."""
    return tuple(graph.output_node().args[0])  # type: ignore[arg-type]


def _text(shape: Sequence[Any]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


def alive(results: Iterable[Any]) -> set[fx.Node]:
    """The nodes that these nodes depend on, themselves included."""
    found: set[fx.Node] = set()
    waiting = [node for node in results if isinstance(node, fx.Node)]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by name, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | node.kwargs
    return {a.name: given.get(a.name, a.default_value) for a in schema.arguments}
