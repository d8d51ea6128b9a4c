"""Weights that a graph splits along their first axis, as weights of their own.

Rows of a weight lie one behind the other in its file, so a part is a smaller weight that begins further on: nothing is
copied, and kernels read the part as they read any weight.
"""

import math

import onnx
from onnx import TensorProto, helper, numpy_helper


def part_weights(model: onnx.ModelProto) -> None:
    """Replace every Split of a weight in the weight file along its first axis by the parts that are read, in place."""
    graph = model.graph
    weights = {t.name: t for t in graph.initializer if t.data_location == TensorProto.EXTERNAL}
    constants = {t.name: t for t in graph.initializer if t.name not in weights}
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    kept, parts = [], []
    for node in graph.node:
        weight = weights.get(node.input[0]) if node.op_type == "Split" and not node.domain else None
        axis = next((helper.get_attribute_value(a) for a in node.attribute if a.name == "axis"), 0)
        if weight is None or len(node.input) != 2 or axis not in (0, -len(weight.dims)):
            kept.append(node)
            continue
        first = 0
        for name, rows in zip(
            node.output, numpy_helper.to_array(constants[node.input[1]]).tolist(), strict=True
        ):
            if name in read:
                parts.append(_rows(weight, name, first, rows))
            first += rows
    if len(kept) == len(graph.node):
        return
    used = {name for node in kept for name in node.input}
    left = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend([*left, *parts])


def _rows(weight: TensorProto, name: str, first: int, rows: int) -> TensorProto:
    """Rows [first, first + rows) of a weight in the weight file."""
    where = {entry.key: entry.value for entry in weight.external_data}
    each = int(where["length"]) // weight.dims[0]
    assert each * weight.dims[0] == int(where["length"]) >= math.prod(weight.dims)
    part = TensorProto(name=name, data_type=weight.data_type, data_location=TensorProto.EXTERNAL)
    part.dims.extend([rows, *weight.dims[1:]])
    where |= {"offset": str(int(where["offset"]) + first * each), "length": str(rows * each)}
    for key, value in where.items():
        part.external_data.add(key=key, value=value)
    return part
