"""Standard operators between the kernels of the fused profile, as operators of Relax, which TVM generates code for.

Models of ours have few of them and they cost nothing that counts; a foreign module may have many.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tvm import relax

Values = Sequence["relax.Expr | np.ndarray"]
Attributes = Mapping[str, Any]

_KINDS = {1: "float32", 6: "int32"}  # by ONNX's number of the type


def _axes(value: Any) -> list[int]:
    return [int(axis) for axis in np.asarray(value).ravel()]


def _gelu(x: Any, attributes: Attributes) -> Any:
    from tvm.relax import op

    tanh = attributes.get("approximate", b"none") == b"tanh"
    return op.nn.gelu_tanh(x) if tanh else op.nn.gelu(x)


def _transpose(x: Any, attributes: Attributes) -> Any:
    from tvm.relax import op

    return op.permute_dims(x, [int(axis) for axis in attributes["perm"]] if "perm" in attributes else None)


def _mean(x: Any, attributes: Attributes, axes: Any = None) -> Any:
    from tvm.relax import op

    where = _axes(attributes["axes"] if axes is None else axes)
    return op.mean(x, where, bool(attributes.get("keepdims", 1)))


def _largest(x: Any, attributes: Attributes, axes: Any) -> Any:
    from tvm.relax import op

    return op.max(x, _axes(axes), bool(attributes.get("keepdims", 1)))


def _layer_norm(x: Any, attributes: Attributes, scale: Any, bias: Any) -> Any:
    from tvm.relax import op

    axis = int(attributes.get("axis", -1))
    return op.nn.layer_norm(x, scale, bias, axes=[axis], epsilon=float(attributes.get("epsilon", 1e-5)))


def emitters() -> dict[str, Callable[[Values, Attributes], Any]]:
    """Return what makes an expression of each operator, from its inputs and attributes.

    An input that the graph holds as a small constant comes as an array where it is a shape or axes.
    """
    from tvm.relax import op

    return {
        "Abs": lambda v, a: op.abs(v[0]),
        "Add": lambda v, a: op.add(*v),
        "Cast": lambda v, a: op.astype(v[0], _KINDS[int(a["to"])]),
        "Concat": lambda v, a: op.concat(list(v), int(a["axis"])),
        "CumSum": lambda v, a: op.cumsum(v[0], _axes(v[1])[0]),
        "Div": lambda v, a: op.divide(*v),
        "Exp": lambda v, a: op.exp(v[0]),
        "Gelu": lambda v, a: _gelu(v[0], a),
        "LayerNormalization": lambda v, a: _layer_norm(v[0], a, v[1], v[2]),
        "MatMul": lambda v, a: op.matmul(*v),
        "Max": lambda v, a: op.maximum(*v),
        "Mul": lambda v, a: op.multiply(*v),
        "Neg": lambda v, a: op.negative(v[0]),
        "Pow": lambda v, a: op.power(*v),
        "ReduceMax": lambda v, a: _largest(v[0], a, v[1]),
        "ReduceMean": lambda v, a: _mean(v[0], a, v[1] if len(v) > 1 else None),
        "Relu": lambda v, a: op.nn.relu(v[0]),
        "Sigmoid": lambda v, a: op.sigmoid(v[0]),
        "Softmax": lambda v, a: op.nn.softmax(v[0], int(a.get("axis", -1))),
        "Sqrt": lambda v, a: op.sqrt(v[0]),
        "Squeeze": lambda v, a: op.squeeze(v[0], _axes(v[1])),
        "Sub": lambda v, a: op.subtract(*v),
        "Tanh": lambda v, a: op.tanh(v[0]),
        "Transpose": lambda v, a: _transpose(v[0], a),
        "Unsqueeze": lambda v, a: op.expand_dims(v[0], _axes(v[1])),
    }


STRUCTURAL = {"CumSum": (1,), "ReduceMax": (1,), "ReduceMean": (1,), "Squeeze": (1,), "Unsqueeze": (1,)}
"""Operator -> which of its inputs are axes, and so must be constants."""
