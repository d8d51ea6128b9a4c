"""The graph that the passes of compile/canonical.py work on, and what they ask of it.

A value is *static* if it depends on weights, constants and the sizes B and T alone, not on the token ids. Positions,
masks and rotary angles are static however they were written, so no pass matches the spelling of a mask: it evaluates
the static value for several (B, T) and looks at the numbers (`Work.evaluate`).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from portlm.errors import UsageError
from portlm.ops import attention as _attention  # noqa: F401 - importing registers torch.ops.portlm.*
from portlm.ops.attention import attention
from portlm.ops.cached_attention import cached_attention
from portlm.ops.embedding import embedding
from portlm.ops.gelu_mlp import gelu_mlp
from portlm.ops.layer_norm import layer_norm
from portlm.ops.lazy import settle
from portlm.ops.linear import linear
from portlm.ops.rms_norm import rms_norm
from portlm.ops.rotary import rotary
from portlm.ops.swiglu import swiglu

settle()  # their files may have been imported before PyTorch: only now are torch.ops.portlm.* there

aten = torch.ops.aten
portlm = torch.ops.portlm

Node = Any  # an fx.Node; the type of its args is a union of fifteen, of which a pass knows which one it has

SIZE_OPS = (aten.sym_size.int, aten.sym_numel.default)


def is_node(argument: Any) -> bool:
    """Whether an argument is a node of the graph, not a number or a list."""
    return isinstance(argument, fx.Node)


def _with_statistics(result: Any) -> tuple[Any, ...]:
    """Return a result as the registered ops of norms do: with a last part, for backward, that no graph reads."""
    return (*result, None) if isinstance(result, tuple) else (result, None)


# The registered ops take contiguous float32 tensors only; the public functions take any, in float64 too.
RUNNERS: dict[Any, Callable[..., Any]] = {
    portlm.linear.default: linear,
    portlm.embedding.default: embedding,
    portlm.layer_norm.default: lambda x, w, b, eps: _with_statistics(layer_norm(x, w, b, eps)),
    portlm.add_layer_norm.default: lambda x, r, w, b, eps: _with_statistics(
        layer_norm(x, w, b, eps, residual=r)
    ),
    portlm.rms_norm.default: lambda x, w, eps: _with_statistics(rms_norm(x, w, eps)),
    portlm.add_rms_norm.default: lambda x, r, w, eps: _with_statistics(rms_norm(x, w, eps, residual=r)),
    portlm.rotary.default: lambda x, cos, sin, inverse: rotary(x, cos, sin),
    portlm.gelu_mlp_value.default: lambda x, w1, b1, w2, b2, tanh: gelu_mlp(
        x, w1, b1, w2, b2, "tanh" if tanh else "none"
    ),
    portlm.swiglu.default: swiglu,
    portlm.attention.default: lambda q, k, v, causal, scale: (attention(q, k, v, causal, scale), None),
    portlm.cached_attention.default: cached_attention,
}


class Runner(fx.Interpreter):
    """Runs a graph in the memory layouts and dtypes that come, with portlm's public functions for its ops."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the public function behind a registered op, else the target."""
        return RUNNERS.get(target, target)(*args, **kwargs)


class Work:
    """One graph on its way to the canonical form.

    Attributes:
        graph: its nodes. Placeholders are weights, then input_ids, then position_ids once a pass needs it.
        weights: placeholder name -> (name of the parameter or buffer, its tensor).
        ids: the placeholder of input_ids (B, T).
        context: the longest T, or 0 where nothing bounds it yet.
    """

    def __init__(
        self,
        root: torch.nn.Module,
        graph: fx.Graph,
        weights: dict[str, tuple[str, Tensor]],
        ids: Node,
        context: int,
    ):
        self.root, self.graph, self.weights, self.ids, self.context = root, graph, weights, ids, context
        value = ids.meta["val"]
        self.mode: FakeTensorMode = value.fake_mode
        self.batch, self.length = value.shape
        self.positions: Node | None = None
        self.row: Node | None = None
        self._memo: dict[tuple[int, int], dict[Node, Any]] = {}
        self._dynamic: dict[Node, bool] = {}

    # Shapes

    def shape(self, node: Node) -> tuple[Any, ...]:
        """Return the sizes of a node's tensor: ints, and SymInts where they depend on B or T."""
        return tuple(node.meta["val"].shape)

    def sizes(self, node: Node, B: int, T: int) -> tuple[int, ...]:
        """Return the sizes of a node's tensor for one B and T."""
        return tuple(self._size(s, B, T) for s in self.shape(node))

    def _size(self, size: Any, B: int, T: int) -> int:
        if isinstance(size, int):
            return size
        known = {self.batch.node.expr: B, self.length.node.expr: T}
        return int(size.node.expr.subs(known))

    def size_argument(self, size: Any) -> Any:
        """Return a size as an argument of a reshape: an int, the node of B or T, or -1 for anything else."""
        if isinstance(size, int):
            return size
        for axis, symbol in ((0, self.batch), (1, self.length)):
            if size.node.expr == symbol.node.expr:
                return self._size_node(axis)
        return int(size.node.expr) if size.node.expr.is_number else -1

    def _size_node(self, axis: int) -> Node:
        for user in self.ids.users:
            if user.target is aten.sym_size.int and user.args == (self.ids, axis):
                return user
        with self.graph.inserting_after(self._last_placeholder()):
            node = self.graph.call_function(aten.sym_size.int, (self.ids, axis))
        node.meta["val"] = (self.batch, self.length)[axis]
        return node

    def _last_placeholder(self) -> Node:
        return [n for n in self.graph.nodes if n.op == "placeholder"][-1]

    # Making nodes

    def call(self, before: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Insert a call in front of a node, whose place in the module and in the source it takes."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        node.meta.update({k: before.meta[k] for k in ("nn_module_stack", "stack_trace") if k in before.meta})
        values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode, torch.no_grad():
            node.meta["val"] = target(*values[0], **values[1])
        return node

    def item(self, before: Node, node: Node, index: int) -> Node:
        """Insert the choice of one output of a node with several."""
        return self.call(before, operator.getitem, node, index)

    def reshape(self, before: Node, x: Node, shape: Sequence[Any]) -> Node:
        """Insert a reshape, unless x has the shape already."""
        if same_shape(self.shape(x), shape):
            return x
        return self.call(before, aten.reshape.default, x, [self.size_argument(s) for s in shape])

    def permute(self, before: Node, x: Node, dims: Sequence[int]) -> Node:
        """Insert a permutation of axes, unless it changes nothing; that of a permutation is one of its input."""
        if x.target is aten.permute.default:
            x, dims = x.args[0], [x.args[1][d] for d in dims]
        return x if list(dims) == sorted(dims) else self.call(before, aten.permute.default, x, list(dims))

    def replace(self, node: Node, by: Node) -> None:
        """Let every user of a node use another, and take the node out."""
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)

    def weight(self, name: str, tensor: Tensor, before: Node | None = None) -> Node:
        """Return the placeholder of a weight; a new name adds one, in front of another or of input_ids."""
        for placeholder, (known, value) in self.weights.items():
            if known == name and value is tensor:
                return next(n for n in self.graph.nodes if n.name == placeholder)
        taken = {known for known, _ in self.weights.values()}
        unique, count = name, 1
        while unique in taken:
            count += 1
            unique = f"{name}_{count}"
        with self.graph.inserting_before(before or self.ids):
            node = self.graph.placeholder("w_" + re.sub(r"\W", "_", unique))
        self.weights[node.name] = (unique, tensor)
        with self.mode:
            node.meta["val"] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return node

    def constant(self, name: str, tensor: Tensor) -> Node:
        """Return the placeholder of a constant that is made only once under its name."""
        return self.weight(name, next((t for known, t in self.weights.values() if known == name), tensor))

    def position_ids(self) -> Node:
        """Return the placeholder of position_ids (B, T) int64: 0 .. T-1 in every row."""
        if self.positions is None:
            self.positions = self._places("position_ids", (self.batch, self.length), self.ids)
        return self.positions

    def one_row(self) -> Node:
        """Return the placeholder of positions (T) int64: 0 .. T-1."""
        if self.row is None:
            self.row = self._places("positions", (self.length,), self.positions or self.ids)
        return self.row

    def _places(self, name: str, shape: tuple[Any, ...], after: Node) -> Node:
        with self.graph.inserting_after(after):
            node = self.graph.placeholder(name)
        with self.mode:
            node.meta["val"] = torch.empty(shape, dtype=torch.int64)
        self._dynamic[node] = True
        return node

    def clean(self) -> None:
        """Take out the nodes whose value nothing uses."""
        self.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        self._memo.clear()
        self._dynamic.clear()

    # Static values

    def is_dynamic(self, node: Node) -> bool:
        """Whether a value depends on the token ids."""
        if node not in self._dynamic:
            stack = [node]
            while stack:
                n = stack[-1]
                if n in self._dynamic:
                    stack.pop()
                elif n in (self.ids, self.positions, self.row):
                    self._dynamic[n] = True
                elif n.target in SIZE_OPS or not isinstance(n.meta.get("val", 0), (Tensor, tuple, list)):
                    self._dynamic[n] = False  # a size, a number made of sizes, or nothing at all
                elif pending := [m for m in n.all_input_nodes if m not in self._dynamic]:
                    stack.extend(pending)
                else:
                    self._dynamic[n] = any(self._dynamic[m] for m in n.all_input_nodes)
        return self._dynamic[node]

    def is_static(self, argument: Any) -> bool:
        """Whether an argument is a number, or a node that does not depend on the token ids."""
        return not is_node(argument) or not self.is_dynamic(argument)

    def evaluate(self, argument: Any, B: int, T: int) -> Any:
        """Compute a static argument for B sequences of T tokens."""
        if not is_node(argument):
            return argument
        memo = self._memo.setdefault((B, T), {})
        stack = [argument]
        while stack:
            node = stack[-1]
            if node in memo:
                stack.pop()
                continue
            value = node.meta.get("val")
            if isinstance(value, (int, torch.SymInt)):
                memo[node] = self._size(value, B, T)
            elif node.op == "placeholder":
                memo[node] = self.weights[node.name][1]
            elif pending := [m for m in node.all_input_nodes if m not in memo]:
                stack.extend(pending)
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: memo[n])
                memo[node] = RUNNERS.get(node.target, node.target)(*args, **kwargs)
        return memo[argument]


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are equal for every B and T."""
    return len(a) == len(b) and all(_expression(x) == _expression(y) for x, y in zip(a, b, strict=True))


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def run(graph: fx.GraphModule, weights: Mapping[str, Tensor], **inputs: Tensor) -> Any:
    """Run a canonical graph: weights by their names, inputs by theirs."""
    values = []
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            name = node.meta.get("weight")
            values.append(inputs[node.target] if name is None else weights[name])
    with torch.no_grad():
        return Runner(graph).run(*values)


def place(node: Node) -> str:
    """Say where a node comes from: the path of its module, and the line of Python."""
    parts = []
    stack = node.meta.get("nn_module_stack") or {}
    if stack:
        path, kind = list(stack.values())[-1]
        kind = kind if isinstance(kind, str) else kind.__name__
        parts.append(f"in module {module_path(path) or 'the model'} ({kind.rsplit('.', 1)[-1]})")
    lines = re.findall(r'File "([^"]*)", line (\d+), in .*\n\s*(.*)', node.meta.get("stack_trace") or "")
    if lines:
        file, number, code = lines[-1]
        parts.append(f"{file.rsplit('/', 1)[-1]} line {number}: `{code.strip()}`")
    return ", ".join(parts) or f"at {node.name}"


WRAPPER = "wrapped_module"  # the attribute under which compile/canonical.py holds the module while tracing


def module_path(path: str) -> str:
    """Return a module's or a weight's path without the wrapper's attribute."""
    path = re.sub(r"^L\['self'\]\.?|^L__self__?_?|^_?self\.", "", path)
    return re.sub(rf"^{WRAPPER}\.?", "", path)


def unsupported(node: Node, what: str, advice: str) -> UsageError:
    """Return the error for a node that has no form: what, where, and what to write instead."""
    return UsageError(f"{what} cannot be exported, {place(node)}: {advice}")
