"""ONNX graphs of one node, written by hand: what the ONNX Runtime engine needs besides exported graphs.

The package onnx is for exporting; a machine that only runs models does not have it. A graph of one node takes a few
fields of the protocol buffer format: a key (number and wire type), then a varint or a length and that many bytes.
"""

from collections.abc import Mapping, Sequence

FLOAT, INT64 = 1, 7  # onnx.TensorProto.DataType
DTYPES = {"float32": FLOAT, "uint8": 2, "int8": 3, "int32": 6, "int64": INT64, "float16": 10, "bfloat16": 16}


def one_node(op_type: str, inputs: Mapping[str, int], output: int, attributes: Mapping[str, int]) -> bytes:
    """Return a model of one node with integer attributes.

    Args:
        op_type: of the standard operators, version 17.
        inputs: element type by name; the sizes are left open.
        output: element type of the one output, "y".
        attributes: by name.
    """
    node = [_bytes(1, name.encode()) for name in inputs]
    node += [_bytes(2, b"y"), _bytes(4, op_type.encode())]
    for name, value in attributes.items():
        node.append(_bytes(5, _bytes(1, name.encode()) + _number(3, value) + _number(20, 2)))
    graph = [_bytes(1, b"".join(node)), _bytes(2, b"g")]
    graph += [_bytes(11, _value(name, dtype)) for name, dtype in inputs.items()]
    graph.append(_bytes(12, _value("y", output)))
    return b"".join([_number(1, 8), _bytes(7, b"".join(graph)), _bytes(8, _bytes(1, b"") + _number(2, 17))])


def names(count: int) -> Sequence[str]:
    """Return names for a number of inputs."""
    return [f"x{i}" for i in range(count)]


def _value(name: str, dtype: int) -> bytes:
    return _bytes(1, name.encode()) + _bytes(2, _bytes(1, _number(1, dtype)))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
