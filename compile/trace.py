"""Records a role's function, and checks what was recorded against what the role declares.

Nothing is computed: the tensors that run through the model only know their shape (PyTorch's "meta" device). A dispatch
mode sees every operator, before PyTorch takes it apart. The function runs twice, with other numbers for the role's
symbols ("batch", "sequence", "past", ...): what differs is an expression of them, and everything else must be the same.

This is what torch.export does with symbolic sizes, for those few expressions that a role can have. It takes a twentieth
of the time, and neither symbolic algebra nor a compiler has to be loaded.
"""

import functools
import itertools
import linecache
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import getitem
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

import portlm
from portlm.compile.extents import NUMBERS, Extent, Extents, parse, parts
from portlm.errors import FormatError
from portlm.models.modes import answering
from portlm.models.roles import Role
from portlm.ops.kernel_op import exporting
from portlm.roles import StateSpec, TensorSpec

_ARITHMETIC = {getattr(torch.ops.aten, name).Tensor for name in ("add", "div", "mul", "sub")}


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


class _ValuesError(Exception):
    """The function asks for the value of a tensor."""


class _DifferentError(FormatError):
    """Two recordings differ by more than extents."""


class _Recorder(TorchDispatchMode):
    """Writes every operator that is called to a graph, and gives tensors without values as its results.

    Args:
        module: its parameters and buffers become placeholders where an operator reads them.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.graph = fx.Graph()
        self.inputs: list[str] = []
        self.weights: dict[str, str] = {}
        self.paths = {id(part): path for path, part in reversed(list(module.named_modules()))}
        self.stack: list[str] = [""]
        self._nodes: dict[int, fx.Node] = {}
        self._twins: dict[int, Tensor] = {}
        self._kept: list[Tensor] = []  # so that an id is one tensor's
        self._names: dict[Any, str] = {}
        self._count = itertools.count()
        tensors = itertools.chain(
            module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
        )
        for path, tensor in tensors:
            self._names.setdefault(_identity(tensor), path)

    @contextmanager
    def without_values(self, module: nn.Module) -> Iterator[None]:
        """Give a module parameters and buffers without values, on the same device as its inputs."""
        before: list[tuple[Any, dict[str, Tensor | None]]] = [
            (table, dict(table)) for part in module.modules() for table in (part._parameters, part._buffers)
        ]
        try:
            for table, tensors in before:
                for key, tensor in tensors.items():
                    if tensor is not None:
                        twin = self._twin(tensor)
                        table[key] = nn.Parameter(twin, False) if isinstance(tensor, nn.Parameter) else twin
                        self._names[id(table[key])] = self._names[_identity(tensor)]
                        self._kept.append(table[key])
            yield
        finally:
            for table, tensors in before:
                table.clear()
                table.update(tensors)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Asked by PyTorch, which otherwise loads its compiler (0.7 s) to keep it away from what follows."""
        return False

    def input(self, tensor: Tensor) -> None:
        """Make a tensor a placeholder of the graph."""
        self.inputs.append(self._placeholder(tensor, tensor).name)

    def output(self, values: Any) -> None:
        """End the graph with what the function returned."""
        values = values if isinstance(values, tuple | list) else (values,)
        self.graph.output(tuple(self._node(v) if isinstance(v, Tensor) else v for v in values))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record one operator and return its results."""
        kwargs = dict(kwargs or {})
        returns = [r.type for r in func._schema.returns]
        if returns and not any(isinstance(kind, torch.TensorType | torch.ListType) for kind in returns):
            raise _ValuesError
        written = _mapped(self._node, args), {key: _mapped(self._node, v) for key, v in kwargs.items()}
        node = self.graph.create_node("call_function", func, *written, name=f"n{next(self._count)}")
        node.meta["module"], node.meta["line"] = self.stack[-1], _line()
        if torch.Tag.dynamic_output_shape in func.tags:
            raise FormatError(
                _no_form(node, "the number of its results is only known when it runs", "use a mask")
            )
        if "device" in kwargs or (not _tensors((args, kwargs)) and _takes_device(func)):
            kwargs["device"] = torch.device("meta")
        result = _pointwise(func, args) if not kwargs else None
        if result is None:
            result = func(
                *_mapped(self._twin, args), **{key: _mapped(self._twin, v) for key, v in kwargs.items()}
            )
        node.meta["val"] = result
        if isinstance(result, Tensor):
            self._keep(result, node)
        else:
            for place, one in enumerate(result or ()):
                part = self.graph.create_node(
                    "call_function", getitem, (node, place), name=f"n{next(self._count)}"
                )
                part.meta = {**node.meta, "val": one}
                self._keep(one, part)
        return result

    def _keep(self, tensor: Tensor, node: fx.Node) -> None:
        self._nodes[id(tensor)] = node
        self._kept.append(tensor)

    def _node(self, tensor: Tensor) -> fx.Node:
        found = self._nodes.get(id(tensor))
        return found if found is not None else self._placeholder(tensor, self._twin(tensor))

    def _twin(self, tensor: Tensor) -> Tensor:
        """A tensor without values in the place of one with values."""
        if tensor.device.type == "meta":
            return tensor
        if id(tensor) not in self._twins:
            self._twins[id(tensor)] = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
            )
            self._kept.append(tensor)
        return self._twins[id(tensor)]

    def _placeholder(self, tensor: Tensor, value: Tensor) -> fx.Node:
        path = self._names.get(_identity(tensor))
        last = next((n for n in reversed(self.graph.nodes) if n.op == "placeholder"), None)
        with self.graph.inserting_after(last) if last else self.graph.inserting_before():
            node = self.graph.create_node("placeholder", name := f"n{next(self._count)}", name=name)
        node.meta = {"val": value, "module": "", "line": None}
        if path is not None:
            self.weights[node.name] = path
        self._keep(tensor, node)
        return node


def _run(module: nn.Module, name: str, role: Role, numbers: Mapping[str, int]) -> _Recorder:
    """Record a role's function with a number for each symbol."""
    recorder = _Recorder(module)
    try:
        # In inference mode operators arrive whole: otherwise autograd takes many apart first.
        with answering(module), torch.inference_mode(), exporting(), _flags(), _modules(recorder):
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
    except _ValuesError as error:
        raise FormatError(
            f"the {name} branches on the values of tensors{_line_of(error)}, and a graph computes the same for all: "
            "use torch.where, or a mask"
        ) from error
    except Exception as error:  # whatever the model's own code raises
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise FormatError(
            f"the {name} cannot be recorded{_line_of(error)}: {type(error).__name__}: {first[:300]}"
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


@contextmanager
def _modules(recorder: _Recorder) -> Iterator[None]:
    """Keep the recorder's stack of the modules that are being called."""

    def enter(part: nn.Module, args: Any) -> None:
        recorder.stack.append(recorder.paths.get(id(part), recorder.stack[-1]))

    def leave(part: nn.Module, args: Any, result: Any) -> None:
        recorder.stack.pop()

    hooks = (register_module_forward_pre_hook(enter), register_module_forward_hook(leave))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _merge(first: _Recorder, second: _Recorder, extents: Extents) -> None:
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
            x for x in _flat((same(a.args, b.args), [same(a.kwargs[k], b.kwargs.get(k)) for k in a.kwargs]))
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


def _line() -> tuple[str, int] | None:
    """The line of the model's code that is being run."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if _is_users(frame.f_code.co_filename):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return None


@functools.cache
def _is_users(file: str) -> bool:
    """Whether a file is neither PyTorch's nor one of this package's that only pass things on."""
    ours = Path(portlm.__file__).parent
    here = Path(__file__).parent  # of an editable install, it lies elsewhere
    tools = (ours / "ops", here, ours / "models" / "layers.py")
    return not file.startswith(("<", *map(str, (Path(torch.__file__).parent, *tools))))


def _line_of(error: BaseException) -> str:
    """The innermost line of an error that is the user's, as text to append."""
    found, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if _is_users(file):
            found = f" at {file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def _identity(tensor: Tensor) -> Any:
    """What two tensors share if they are the same numbers in memory."""
    if tensor.device.type == "meta" or not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _mapped(function: Any, value: Any) -> Any:
    """An operator's argument with its tensors replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple | list):
        return type(value)(_mapped(function, one) for one in value)
    return value


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for one in value:
            yield from _flat(one)
    elif isinstance(value, dict):
        yield from _flat(list(value.values()))
    else:
        yield value


def _tensors(value: Any) -> list[Tensor]:
    return [one for one in _flat(value) if isinstance(one, Tensor)]


def _pointwise(func: Any, args: Any) -> Tensor | None:
    """The result of simple arithmetic, as PyTorch's own rule gives it; None for what is not simple.

    PyTorch's rule is in Python, and loads its compiler when it is first called, which takes as long as all the rest.
    """
    tensors = [one for one in args if isinstance(one, Tensor)]
    if func not in _ARITHMETIC or not tensors or len({(t.dtype, t.dim()) for t in tensors}) != 1:
        return None
    if tensors[0].dtype != torch.float32 or not all(t.is_contiguous() for t in tensors):
        return None
    shape = []
    for sizes in zip(*(t.shape for t in tensors), strict=True):
        several = {size for size in sizes if size != 1}
        if len(several) > 1:
            return None  # an error, which PyTorch words
        shape.append(several.pop() if several else 1)
    return torch.empty(shape, dtype=torch.float32, device="meta")


@functools.cache
def _takes_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


def _no_form(node: fx.Node, why: str, instead: str) -> str:
    place = node.meta["module"] or "the model itself"
    operator = node.target._schema.name  # type: ignore[union-attr]
    return f"{operator} in {place}{source_line(node)} has no form in a graph, {why}: {instead}"


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
    """The line of the model's code that a node comes from, as text to append."""
    if not node.meta.get("line"):
        return ""
    file, number = node.meta["line"]
    return f" ({file}:{number}: {linecache.getline(file, number).strip()})"


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
