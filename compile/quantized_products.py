"""Products with quantized matrices in portable graphs, found again.

There, such a matrix is a dozen standard operators on numbers and scales, which `write_matrix` of portlm.ops.quantized
writes. A compiler with a product that reads the numbers as they are has to know it for what it is: a value is a
quantized matrix if the nodes behind it are, one by one, those that `write_matrix` writes for the same weights.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from portlm.compile.graph import GraphBuilder, WeightFile
from portlm.compile.quantize import BITS
from portlm.ops.quantized import write_matrix
from portlm.tvm_support import Packed, Weight

Expression = tuple[Any, ...]
"""What a value is: a weight, a constant, or an operator with its attributes and inputs."""


def products_of_numbers(
    proto: onnx.ModelProto, weights: Mapping[str, Weight]
) -> tuple[onnx.ModelProto, tuple[Packed, ...]]:
    """Return a graph in which products read quantized matrices as they are, and these matrices.

    Each such MatMul has the matrix's name as its second input, which is no value of the graph and stands for float32
    (K, N). What made the matrix is gone, unless something else reads it.

    Args:
        proto: checked; it stays as it is, and is what is returned if it has no such product.
        weights: by name, those in the weight file.
    """
    constants = _Constants(proto, weights)
    found: dict[str, Packed | None] = {}
    for node in proto.graph.node:
        if (node.domain, node.op_type) == ("", "MatMul") and node.input[1] not in found:
            found[node.input[1]] = _matrix(constants, node.input[1])
    matrices = {value: matrix for value, matrix in found.items() if matrix is not None}
    if not matrices:
        return proto, ()
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    for node in changed.graph.node:
        if (node.domain, node.op_type) == ("", "MatMul") and node.input[1] in matrices:
            node.input[1] = matrices[node.input[1]].name
    _drop_unread(changed.graph)
    return changed, tuple({matrix.name: matrix for matrix in matrices.values()}.values())


def _matrix(constants: "_Constants", value: str) -> Packed | None:
    """The quantized matrix that a value is, if it is one."""
    said = constants.expressions.get(value)
    if said is None or said[0] != "Transpose":
        return None
    parts = [constants.weights[name] for name in constants.made_of[value]]
    numbers = [part for part in parts if part.dtype == "uint8" and len(part.shape) == 3]
    scales = [part for part in parts if part.dtype == "float32"]
    zeros = [part for part in parts if part.dtype == "uint8" and len(part.shape) == 2]
    if (len(numbers), len(scales), len(zeros)) != (1, 1, len(parts) - 2):
        return None
    for bits in BITS.values():
        zero = zeros[0] if zeros else None
        matrix = Packed(f"{numbers[0].name}.packed", numbers[0], scales[0], zero, bits, panels=True)
        if not matrix.contradiction() and said == _written(matrix):
            return matrix
    return None


def _written(matrix: Packed) -> Expression:
    """What `write_matrix` writes for a matrix."""
    weights = {part.name: part for part in matrix.parts()}
    shapes = {name: np.broadcast_to(np.zeros((), part.dtype), part.shape) for name, part in weights.items()}
    builder = GraphBuilder("matrix", shapes, WeightFile(""), {})
    weight, scale, zero = (
        builder.weight(part.name) if part else "" for part in (matrix.weight, matrix.scale, matrix.zero)
    )
    value = write_matrix(builder, weight, scale, zero, matrix.bits)
    return _Constants(builder.model({}), weights).expressions[value]


class _Constants:
    """Values that no input of the graph changes, as expressions in which only the names of weights mean anything.

    Attributes:
        weights: by name.
        expressions: by name of the value.
        made_of: names of the weights behind each value, three at most: with more it is left out.
    """

    def __init__(self, proto: onnx.ModelProto, weights: Mapping[str, Weight]):
        self.weights = weights
        self.expressions: dict[str, Expression] = {"": ("absent",)}
        self.made_of: dict[str, frozenset[str]] = {"": frozenset()}
        for tensor in proto.graph.initializer:
            name = tensor.name
            if name in weights:
                self.expressions[name], self.made_of[name] = ("weight", name), frozenset({name})
                continue
            array = onnx.numpy_helper.to_array(tensor)
            self.expressions[name] = ("constant", str(array.dtype), array.shape, array.tobytes())
            self.made_of[name] = frozenset()
        for node in proto.graph.node:
            self._add(node)

    def _add(self, node: onnx.NodeProto) -> None:
        if not self.expressions.keys() >= set(node.input):
            return
        made_of = frozenset().union(*(self.made_of[value] for value in node.input))
        if len(made_of) > 3:
            return
        attributes = tuple(sorted(a.SerializeToString(deterministic=True) for a in node.attribute))
        inputs = tuple(self.expressions[value] for value in node.input)
        for place, value in enumerate(node.output):
            self.expressions[value] = (node.op_type, node.domain, place, attributes, inputs)
            self.made_of[value] = made_of


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Remove nodes and initializers whose values nothing reads any more."""
    read = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if read & set(node.output):
            kept.append(node)
            read.update(node.input)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    initializers = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(initializers)
