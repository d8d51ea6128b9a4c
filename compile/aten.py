"""PyTorch's own operators between the ops of a model, as standard operators that every engine was seen to run.

Each rule keeps to the portable profile: no Shape, no Slice, no booleans, no arithmetic on int64. A rule is given the
emitter and the recorded node, and returns the value, or a tuple of values.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import fx

if TYPE_CHECKING:
    from portlm.compile.capture import Emitter, Value

# Operators that give their first operand as it is.
IDENTITIES = frozenset(
    f"aten::{name}" for name in ("alias", "clone", "contiguous", "detach", "lift_fresh", "detach_")
)
# Operators that give the elements of their first operand in the same order with another shape.
_VIEWS = ("_unsafe_view", "flatten", "reshape", "squeeze", "unflatten", "unsqueeze", "view", "view_as")
RESHAPED = frozenset(f"aten::{name}" for name in _VIEWS)
# Operators that may be given extents which are only known when the graph runs: they are read from the shapes.
SIZED = frozenset(f"aten::{name}" for name in (*_VIEWS, "chunk", "split", "split_with_sizes"))
_BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "maximum": "Max"}
_UNARY = {"abs": "Abs", "exp": "Exp", "relu": "Relu", "sigmoid": "Sigmoid", "sqrt": "Sqrt", "tanh": "Tanh"}

# What to do instead of operators that models are known to use.
INSTEAD = {
    "aten::nonzero": "the number of its results is only known when it runs, use a mask",
    "aten::masked_select": "the number of its results is only known when it runs, use a mask",
    "aten::item": "keep the value in a tensor",
    "aten::bernoulli": "a graph is for inference, random numbers are not",
    "aten::cumsum": "positions come in as position_ids",
    "aten::cos": "keep the angles of all positions in a buffer and look rows up with embedding(position_ids, table)",
    "aten::sin": "keep the angles of all positions in a buffer and look rows up with embedding(position_ids, table)",
    "aten::slice": "torch.Tensor.split or unbind, or index_select with an input of the role; of a table, whole rows",
}


def _identity(e: "Emitter", node: fx.Node) -> Any:
    return e.values[node.args[0]]  # type: ignore[index]


def _view(e: "Emitter", node: fx.Node) -> "Value":
    from portlm.compile.capture import seen_as

    return seen_as(e.read(node.args[0]), e.shape(node))


def _unbind(e: "Emitter", node: fx.Node) -> Any:
    axis = _axis(e, node.args[0], node.args[1] if len(node.args) > 1 else 0)
    return _split(e, node, axis, [1] * len(node.meta["val"]))


def _split_sizes(e: "Emitter", node: fx.Node) -> Any:
    axis = _axis(e, node.args[0], node.args[2] if len(node.args) > 2 else 0)
    sizes = [part.shape[axis] for part in node.meta["val"]]
    if not all(isinstance(size, int) for size in sizes):
        raise e.refuse(node, "it splits an axis whose length is only known when it runs")
    return _split(e, node, axis, sizes)


def _split(e: "Emitter", node: fx.Node, axis: int, sizes: list[int]) -> Any:
    """Split along an axis of the model's view; axes merged behind it in memory are split with it."""
    from portlm.compile.capture import Value

    value = e.read(node.args[0])
    inner = value.shape[axis + 1 :]
    merged = value.stored[:axis] == value.shape[:axis] and len(value.stored) == axis + 1
    if merged and all(isinstance(size, int) for size in inner):
        name, stored, each = value.name, value.stored[:axis], [size * math.prod(inner) for size in sizes]
        kept: tuple[Any, ...] = ()
    else:
        name, stored, each, kept = e.reshape(value, value.shape), value.shape[:axis], sizes, inner
    base = e.g.unique(f"{name}.split")
    outputs = tuple(e.g.unique(f"{name}.part{i}") for i in range(len(each)))
    last = not kept
    e.g.split_op("Split", (name, e.g.ints(*each)), base, outputs, axis=-1 if last else axis)
    return tuple(
        Value(output, (*stored, size, *kept), part.shape, value.dtype)
        for output, size, part in zip(outputs, each, node.meta["val"], strict=True)
    )


def _binary(e: "Emitter", node: fx.Node) -> "Value":
    kind = node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]
    if node.meta["val"].kind != "float32":
        raise e.refuse(node, f"on {node.meta['val'].kind}", "compute in float32")
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
        raise e.refuse(node, "with a factor", "multiply first")
    if kind == "add" and (folded := e.weight_plus(*node.args)):
        return folded  # type: ignore[return-value]
    names = [e.whole(x) if isinstance(x, fx.Node) else e.g.scalar(float(x)) for x in node.args]  # type: ignore[arg-type]
    return e.result(node, e.g.op(_BINARY[kind], names, e.name(node, kind)))


def _unary(e: "Emitter", node: fx.Node) -> "Value":
    kind = node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]
    return e.result(node, e.g.op(_UNARY[kind], (e.whole(node.args[0]),), e.name(node, kind)))


def _reversed_sub(e: "Emitter", node: fx.Node) -> "Value":
    """Write ``rsub(x, y)``, which is y - x: PyTorch's name for a number less a tensor."""
    if node.meta["val"].kind != "float32" or node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
        raise e.refuse(node, "on other numbers than float32, or with a factor", "compute in float32")
    x, y = (e.whole(a) if isinstance(a, fx.Node) else e.g.scalar(float(a)) for a in node.args)  # type: ignore[arg-type]
    return e.result(node, e.g.op("Sub", (y, x), e.name(node, "sub")))


def _cast(e: "Emitter", node: fx.Node) -> Any:
    """Make float32 a place in a table, or what a table of whole numbers holds float32, which it is in a graph."""
    source = node.args[0]
    before, after = source.meta["val"].kind, node.meta["val"].kind  # type: ignore[union-attr]
    if before == after:
        return e.values[source]  # type: ignore[index]
    if (before, after) == ("float32", "int32"):
        return e.result(node, e.g.op("Cast", (e.whole(source),), e.name(node, "place"), to=6))
    if (before, after) == ("int32", "float32") and e.is_table(source):
        return e.values[source]  # type: ignore[index]
    raise e.refuse(
        node,
        f"it makes {after} of {before}",
        "a graph casts float32 to int32 to look something up, and what a table of int32 holds to float32",
    )


def _index_select(e: "Emitter", node: fx.Node) -> "Value":
    x, axis, index = node.args
    names = (e.whole(x), e.whole(index))
    return e.result(node, e.g.op("Gather", names, e.name(node, "index_select"), axis=_axis(e, x, axis)))


def _select(e: "Emitter", node: fx.Node) -> "Value":
    """One place of an axis, counted from its beginning; the axis of length 1 that Gather leaves is not seen."""
    from portlm.compile.capture import Value

    x, axis, place = node.args
    if not isinstance(place, int) or place < 0:
        raise e.refuse(
            node, "it counts from the end", "count from the beginning, or index_select with an input"
        )
    at, shape = _axis(e, x, axis), e.shape(node)
    name = e.g.op(
        "Gather", (e.whole(x), e.g.ints(place)), e.g.unique(f"{e.name(node, 'select')}.place"), axis=at
    )
    return Value(name, (*shape[:at], 1, *shape[at:]), shape, node.meta["val"].kind)


def _rows_of_weight(e: "Emitter", node: fx.Node) -> Any:
    """Rows of a parameter from one constant place to another, which are a smaller parameter."""
    operand, axis, begin, end = (*node.args, *(0, None, None)[len(node.args) - 1 :])[:4]
    step = node.args[4] if len(node.args) > 4 else 1
    if node.target._schema.name == "aten::narrow":  # type: ignore[union-attr]
        end = begin + end  # type: ignore[operator]
    if (found := e.weight_rows(operand, begin, end)) is None or _axis(e, operand, axis) or step != 1:
        raise e.refuse(node, "it is no row of a parameter", INSTEAD["aten::slice"])
    return found


def _embedding(e: "Emitter", node: fx.Node) -> "Value":
    table, ids = node.args[:2]
    return e.result(node, e.g.op("Gather", (e.whole(table), e.whole(ids)), e.name(node, "embedding"), axis=0))


def _permute(e: "Emitter", node: fx.Node) -> "Value":
    rank = len(e.shape(node))
    order = list(range(rank))
    kind = node.target._schema.name  # type: ignore[union-attr]
    if kind == "aten::permute":
        order = [_axis(e, node.args[0], axis) for axis in node.args[1]]  # type: ignore[union-attr]
    else:
        one, other = (0, 1) if kind == "aten::t" else (_axis(e, node.args[0], a) for a in node.args[1:3])
        order[one], order[other] = other, one
    return e.result(
        node, e.g.op("Transpose", (e.whole(node.args[0]),), e.name(node, "transpose"), perm=order)
    )


def _cat(e: "Emitter", node: fx.Node) -> "Value":
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    names = [e.whole(x) for x in node.args[0]]  # type: ignore[union-attr]
    return e.result(node, e.g.op("Concat", names, e.name(node, "cat"), axis=_axis(e, node, axis)))


def _matmul(e: "Emitter", node: fx.Node) -> "Value":
    return e.result(node, e.g.op("MatMul", [e.whole(x) for x in node.args[:2]], e.name(node, "matmul")))


def _softmax(e: "Emitter", node: fx.Node) -> "Value":
    if _axis(e, node.args[0], node.args[1]) != len(e.shape(node)) - 1:
        raise e.refuse(node, "over another axis than the last", "transpose first")
    return e.result(node, e.g.op("Softmax", (e.whole(node.args[0]),), e.name(node, "softmax"), axis=-1))


def _gelu(e: "Emitter", node: fx.Node) -> "Value":
    kind = node.kwargs.get("approximate", "none")
    return e.result(node, e.g.op("Gelu", (e.whole(node.args[0]),), e.name(node, "gelu"), approximate=kind))


def _silu(e: "Emitter", node: fx.Node) -> "Value":
    x, name = e.whole(node.args[0]), e.name(node, "silu")
    return e.result(node, e.g.op("Mul", (x, e.g.op("Sigmoid", (x,), f"{name}.sigmoid")), name))


def _clamp(e: "Emitter", node: fx.Node) -> "Value":
    """Within constant bounds: x - relu(x - high) + relu(low - x), which is x itself, to the bit, where it is within."""
    x, name = e.whole(node.args[0]), e.name(node, "clamp")
    low, high = (
        node.args[i] if len(node.args) > i else node.kwargs.get(key) for i, key in ((1, "min"), (2, "max"))
    )
    if not isinstance(low, int | float) or not isinstance(high, int | float) or low > high:
        raise e.refuse(node, "without two constant bounds, the lower one first", "clamp(low, high)")
    over = e.g.op("Relu", (e.g.op("Sub", (x, e.g.scalar(float(high))), f"{name}.above"),), f"{name}.over")
    under = e.g.op("Relu", (e.g.op("Sub", (e.g.scalar(float(low)), x), f"{name}.below"),), f"{name}.under")
    return e.result(node, e.g.op("Add", (e.g.op("Sub", (x, over), f"{name}.lowered"), under), name))


def _dropout(e: "Emitter", node: fx.Node) -> Any:
    if node.args[2]:
        raise e.refuse(node, "in training", "export module.eval()")
    return e.values[node.args[0]]  # type: ignore[index]


def _mean(e: "Emitter", node: fx.Node) -> "Value":
    x, axes, *keep = node.args
    keep = keep or [node.kwargs.get("keepdim", False)]
    if [_axis(e, x, axis) for axis in axes] != [len(e.shape(x)) - 1] or not keep[0]:  # type: ignore[union-attr, arg-type]
        raise e.refuse(node, "over other axes than the last, or without keeping it", "mean(-1, keepdim=True)")
    return e.result(node, e.g.op("ReduceMean", (e.whole(x), e.g.ints(-1)), e.name(node, "mean"), keepdims=1))


def _amax(e: "Emitter", node: fx.Node) -> "Value":
    x, *given = node.args
    axes = given[0] if given else node.kwargs.get("dim", [])
    keep = given[1] if len(given) > 1 else node.kwargs.get("keepdim", False)
    if len(axes) != 1 or not keep:  # type: ignore[arg-type]
        raise e.refuse(node, "over several axes, or without keeping the one", "amax(axis, keepdim=True)")
    at = _axis(e, x, axes[0])  # type: ignore[index]
    return e.result(node, e.g.op("ReduceMax", (e.whole(x), e.g.ints(at)), e.name(node, "amax"), keepdims=1))


def _axis(e: "Emitter", operand: Any, axis: Any) -> int:
    rank = len(operand.meta["val"].shape)
    return int(axis) % rank


RULES: dict[str, Callable[["Emitter", fx.Node], Any]] = {
    **dict.fromkeys(IDENTITIES, _identity),
    **{f"aten::{name}": _view for name in _VIEWS},
    **{f"aten::{name}": _binary for name in _BINARY},
    **{f"aten::{name}": _unary for name in _UNARY},
    "aten::_to_copy": _cast,
    "aten::amax": _amax,
    "aten::bmm": _matmul,
    "aten::cat": _cat,
    "aten::chunk": _split_sizes,
    "aten::clamp": _clamp,
    "aten::dropout": _dropout,
    "aten::embedding": _embedding,
    "aten::gelu": _gelu,
    "aten::index_select": _index_select,
    "aten::matmul": _matmul,
    "aten::mean": _mean,
    "aten::narrow": _rows_of_weight,
    "aten::permute": _permute,
    "aten::rsub": _reversed_sub,
    "aten::select": _select,
    "aten::silu": _silu,
    "aten::slice": _rows_of_weight,
    "aten::softmax": _softmax,
    "aten::split": _split_sizes,
    "aten::split_with_sizes": _split_sizes,
    "aten::t": _permute,
    "aten::to": _cast,
    "aten::transpose": _permute,
    "aten::unbind": _unbind,
}
"""PyTorch's name of an operator, whatever its overload -> what writes it."""
