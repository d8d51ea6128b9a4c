"""Records a role's function with torch.export, and checks what was recorded against what the role declares.

Nothing is computed: the tensors that run through the model are fakes which only know their shape. Every symbolic
extent of the role ("batch", "sequence", "past", ...) must still be a symbol afterwards.
"""

import functools
import operator
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

import portlm
from portlm.errors import FormatError
from portlm.models.roles import Role
from portlm.ops.kernel_op import exporting
from portlm.roles import StateSpec, TensorSpec

ROOT = "module"  # where the model hangs in what is recorded
EXTENTS = (
    2,
    3,
    5,
    7,
    11,
    13,
    17,
    19,
)  # stand-ins while recording; different, or they would count as the same extent


@dataclass(frozen=True)
class Recording:
    """What a role's function computes.

    Attributes:
        graph: operators in order; every node has the fake tensor it gives in meta["val"].
        inputs: the graph's placeholders for the role's inputs and states, in their order.
        weights: placeholder name -> path of the parameter or buffer in the module.
        constants: placeholder name -> tensor that the function made itself.
        symbols: the recording's symbol of each extent that is not a number -> one with the role's name.
    """

    graph: fx.Graph
    inputs: tuple[str, ...]
    weights: Mapping[str, str]
    constants: Mapping[str, Tensor]
    symbols: Mapping[Any, Any]

    def shape(self, fake: Tensor) -> tuple[Any, ...]:
        """Extents of a fake tensor: numbers, and expressions of the role's symbols."""
        return tuple(self.extent(size) for size in fake.shape)

    def extent(self, size: int | torch.SymInt) -> Any:
        """One extent: a number, or an expression of the role's symbols."""
        if isinstance(size, int):
            return size
        expression = size.node.expr.xreplace(dict(self.symbols))
        return int(expression) if expression.is_Integer else expression


class _Root(nn.Module):
    """Gives the function a module to hang in, so that parameters keep their paths."""

    def __init__(self, module: nn.Module, role: Role):
        super().__init__()
        self.module = module
        self.role = role

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.role.function(*tensors)


def record(module: nn.Module, name: str, role: Role, *, lines: bool = True) -> Recording:
    """Record a role's function. The module itself is not changed.

    Args:
        module: whose parameters and buffers the function uses.
        name: of the role, for messages.
        role: the function and what it takes and gives.
        lines: remember for every operator the lines of code that led to it. A third faster without.

    Raises:
        FormatError: the function branches on the values of tensors, does what torch.export cannot follow, works for
            one size only, or gives something else than the role declares. The message names the line.
    """
    program = _export(module, name, role, lines)
    signature = program.graph_signature
    places = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = {
        key: program.constants[place] for key, place in signature.inputs_to_lifted_tensor_constants.items()
    }
    recording = Recording(
        program.graph,
        tuple(signature.user_inputs),
        {key: place.removeprefix(f"{ROOT}.") for key, place in places.items()},
        constants,
        _symbols(program, name, role),
    )
    _check_unchanged(recording, name)
    _check_outputs(recording, name, role)
    return recording


def _export(module: nn.Module, name: str, role: Role, lines: bool) -> ExportedProgram:
    specs: Sequence[TensorSpec | StateSpec] = (*role.inputs, *role.state)
    extents: dict[str, int] = {}
    for part in (part for spec in specs for d in spec.shape if isinstance(d, str) for part in _parts(d)):
        extents.setdefault(part, EXTENTS[len(extents)])
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    example = tuple(
        torch.zeros(
            [d if isinstance(d, int) else sum(extents[part] for part in _parts(d)) for d in spec.shape],
            dtype=getattr(torch, spec.dtype),
            device=device,
        )
        for spec in specs
    )
    dynamic = tuple(
        {axis: Dim.AUTO for axis, d in enumerate(spec.shape) if isinstance(d, str)} for spec in specs
    )
    training = module.training
    module.eval()
    try:
        with torch.no_grad(), exporting(), _lines(lines), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(_Root(module, role), example, dynamic_shapes=(dynamic,), strict=False)
    except FormatError:
        raise
    except Exception as error:  # it raises whatever the model's own code raises, and several kinds of its own
        raise FormatError(_why(error, name)) from error
    finally:
        module.train(training)


@contextmanager
def _lines(wanted: bool) -> Iterator[None]:
    """Make recorded nodes remember the lines of the model's code that led to them, or nothing, which is faster.

    torch.export keeps the lines of methods called "forward" only, and the function of a role may have any name. Its
    filter is meant to be overridden, if only by a subclass that torch.export does not let one choose.
    """

    def keep(tracer: Any, frames: traceback.StackSummary) -> traceback.StackSummary:
        return traceback.StackSummary.from_list([frame for frame in frames if _is_users(frame.filename)])

    changes: list[tuple[Any, str, Any]] = [(torch.fx.config, "do_not_emit_stack_traces", not wanted)]
    if wanted:
        changes.append((fx.proxy.TracerBase, "_filter_traceback_frames", keep))
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes if hasattr(owner, name)]
    try:
        for owner, name, value in changes:
            if hasattr(owner, name):  # a version of PyTorch without it knows fewer lines, or is slower
                setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


@functools.cache
def _is_users(file: str) -> bool:
    """Whether a file is neither PyTorch's nor one of this package's that only pass things on."""
    ours = Path(portlm.__file__).parent
    tools = (ours / "ops", ours / "compile", ours / "models" / "layers.py")
    return not file.startswith(("<", *map(str, (Path(torch.__file__).parent, *tools))))


def _why(error: Exception, name: str) -> str:
    place = _line_of(error)
    if isinstance(error, GuardOnDataDependentSymNode) or "data-dependent" in str(error).lower():
        return (
            f"the {name} branches on the values of tensors{place}, and a graph computes the same for all: "
            "use torch.where, or a mask"
        )
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"torch.export cannot follow the {name}{place}: {type(error).__name__}: {first[:300]}"


def _line_of(error: BaseException) -> str:
    """The innermost line of an error that is the user's, as text to append."""
    found, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if _is_users(file):
            found = f" at {file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def _parts(dimension: str) -> list[str]:
    """The symbols of an extent: "past + sequence" has two."""
    return [part.strip() for part in dimension.split("+")]


def _symbols(program: ExportedProgram, name: str, role: Role) -> dict[Any, Any]:
    """Which of the recording's symbols is which of the role's; FormatError where one became a number."""
    fakes = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    inputs = [fakes[key] for key in program.graph_signature.user_inputs]
    specs: Sequence[TensorSpec | StateSpec] = (*role.inputs, *role.state)
    found: dict[Any, Any] = {}  # PyTorch's symbols are SymPy's, which can make others like themselves
    for spec, fake in zip(specs, inputs, strict=True):
        for d, size in zip(spec.shape, fake.shape, strict=True):
            if not isinstance(d, str) or len(_parts(d)) > 1:
                continue
            expression = size if isinstance(size, int) else size.node.expr
            if isinstance(expression, int) or not expression.is_Symbol:
                raise FormatError(
                    f"the {name} works for {d} = {expression} of {spec.name} only: its code must not depend on it"
                )
            symbol = expression.func(d, integer=True, positive=True)
            if found.setdefault(expression, symbol) != symbol:
                raise FormatError(
                    f"the {name} works only where {d} equals {found[expression]}, as in {spec.name}"
                )
    return found


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


def source_line(node: fx.Node) -> str:
    """The innermost line of the model's code that a node comes from, as text to append."""
    lines = (node.stack_trace or "").strip().splitlines()
    files = [place for place, line in enumerate(lines) if line.strip().startswith("File ")]
    if not files:
        return ""
    file, _, rest = lines[files[-1]].strip().removeprefix("File ").partition(", line ")
    code = lines[files[-1] + 1].strip() if files[-1] + 1 < len(lines) else ""
    return f" ({file.strip(chr(34))}:{rest.split(',')[0]}: {code})"


def _check_outputs(recording: Recording, name: str, role: Role) -> None:
    declared = [(spec.name, spec.dtype, spec.shape) for spec in role.outputs]
    grown = {"append": lambda d: "past + sequence" if d == "past" else d}
    declared += [
        (spec.output, spec.dtype, tuple(map(grown.get(spec.update, lambda d: d), spec.shape)))
        for spec in role.state
        if spec.output
    ]
    symbols = {str(symbol): symbol for symbol in recording.symbols.values()}
    results = output_nodes(recording.graph)
    if len(results) != len(declared):
        names = ", ".join(output for output, _, _ in declared)
        raise FormatError(
            f"the {name} returns {len(results)} tensors, its outputs and states are {len(declared)}: {names}"
        )
    for node, (output, dtype, shape) in zip(results, declared, strict=True):
        fake = node.meta["val"] if isinstance(node, fx.Node) else None
        if not isinstance(fake, Tensor):
            raise FormatError(f"the {name} returns {node!r} for {output}, which must be a tensor")
        found, wanted = recording.shape(fake), tuple(_declared(d, symbols) for d in shape)
        kind = str(fake.dtype).removeprefix("torch.")
        if found != wanted or kind != dtype:
            raise FormatError(
                f"the {name} returns {output} as {kind} {_text(found)}, it declares {dtype} {_text(wanted)}"
            )


def _declared(dimension: int | str, symbols: Mapping[str, Any]) -> Any:
    """An extent as the role writes it, in symbols; the text itself where one of them is in no input."""
    if isinstance(dimension, int):
        return dimension
    parts = [symbols.get(part) for part in _parts(dimension)]
    return dimension if None in parts else functools.reduce(operator.add, parts)


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
