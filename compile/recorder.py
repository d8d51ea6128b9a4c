"""Writes down every operator that a function calls, on tensors that only know their shape (PyTorch's "meta" device).

A dispatch mode sees an operator before PyTorch takes it apart. Beside it stands what is written of each operator: the
module that called it, and the line of the model's own code.
"""

import functools
import itertools
import linecache
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from operator import getitem
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

import portlm
from portlm.errors import FormatError

_ARITHMETIC = {getattr(torch.ops.aten, name).Tensor for name in ("add", "div", "mul", "sub")}


class ValuesError(Exception):
    """The function asks for the value of a tensor."""


class Recorder(TorchDispatchMode):
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

    @contextmanager
    def following(self) -> Iterator[None]:
        """Keep the stack of the modules that are being called."""

        def enter(part: nn.Module, args: Any) -> None:
            self.stack.append(self.paths.get(id(part), self.stack[-1]))

        def leave(part: nn.Module, args: Any, result: Any) -> None:
            self.stack.pop()

        hooks = (register_module_forward_pre_hook(enter), register_module_forward_hook(leave))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

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
            raise ValuesError
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


def source_line(node: fx.Node) -> str:
    """The line of the model's code that a node comes from, as text to append."""
    if not node.meta.get("line"):
        return ""
    file, number = node.meta["line"]
    return f" ({file}:{number}: {linecache.getline(file, number).strip()})"


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


def line_of(error: BaseException) -> str:
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


def flat(value: Any) -> Iterator[Any]:
    """What lists, tuples and dictionaries hold, however deep."""
    if isinstance(value, tuple | list):
        for one in value:
            yield from flat(one)
    elif isinstance(value, dict):
        yield from flat(list(value.values()))
    else:
        yield value


def _tensors(value: Any) -> list[Tensor]:
    return [one for one in flat(value) if isinstance(one, Tensor)]


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
