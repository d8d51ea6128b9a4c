"""ONNX by hand: graphs of one node, which the ONNX Runtime engine needs, and which files a graph's weights are in.

The package onnx is for exporting; a machine that only runs models does not have it. Both take a few fields of the
protocol buffer format: a key (number and wire type), then a varint, 4 or 8 bytes, or a length and that many bytes.
"""

from collections.abc import Iterator, Mapping, Sequence

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


def weight_files(model: bytes) -> set[str]:
    """Return the files that a model's initializers are in, as it calls them.

    Raises:
        ValueError: these bytes are no protocol buffer.
    """
    found = set()
    for graph in _fields(model, 7):
        for tensor in _fields(graph, 5):
            for entry in _fields(tensor, 13):
                keys, values = ([bytes(value) for value in _fields(entry, number)] for number in (1, 2))
                if keys[-1:] == [b"location"]:
                    found.add((values or [b""])[-1].decode())
    return found


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


def _fields(message: bytes | memoryview, wanted: int) -> Iterator[memoryview]:
    """The fields of a message that have a number and hold bytes."""
    rest = memoryview(message)
    while rest:
        key, rest = _read_varint(rest)
        match key & 7:
            case 0:
                _, rest = _read_varint(rest)
                continue
            case 1:
                size = 8
            case 2:
                size, rest = _read_varint(rest)
            case 5:
                size = 4
            case _:
                raise ValueError("a field of an unknown kind")
        if size > len(rest):
            raise ValueError("a field that is longer than its message")
        if key == wanted << 3 | 2:
            yield rest[:size]
        rest = rest[size:]


def _read_varint(data: memoryview) -> tuple[int, memoryview]:
    value = 0
    for i, byte in enumerate(data[:10]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, data[i + 1 :]
    raise ValueError("a number without an end")
