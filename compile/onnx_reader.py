"""Reads the bytes of an ONNX file, as far as portlm's exporter writes them, and nothing else.

The format is protocol buffers: a message is a run of fields, each a key (its number and how it is stored) and then a
whole number, four bytes, or a length and that many bytes. Only the fields in the table below are accepted, in rising
order, numbers in their shortest form, and what stands once in the table at most once in a message. So no byte of an
accepted file means anything to another reader that it does not mean here. Needs no package that is made for ONNX: a
machine that only runs models has none.
"""

import struct
from collections.abc import Iterator
from typing import Any

# By message: number of a field -> its name and what it holds; in a list, any number of it.
SCHEMA: dict[str, dict[int, tuple[str, Any]]] = {
    "ModelProto": {
        1: ("ir_version", int),
        2: ("producer_name", str),
        7: ("graph", "GraphProto"),
        8: ("opset_import", ["OperatorSetIdProto"]),
        14: ("metadata_props", ["StringStringEntryProto"]),
    },
    "GraphProto": {
        1: ("node", ["NodeProto"]),
        2: ("name", str),
        5: ("initializer", ["TensorProto"]),
        11: ("input", ["ValueInfoProto"]),
        12: ("output", ["ValueInfoProto"]),
    },
    "NodeProto": {
        1: ("input", [str]),
        2: ("output", [str]),
        3: ("name", str),
        4: ("op_type", str),
        5: ("attribute", ["AttributeProto"]),
        7: ("domain", str),
    },
    "AttributeProto": {
        1: ("name", str),
        2: ("f", float),
        3: ("i", int),
        4: ("s", bytes),
        8: ("ints", [int]),
        20: ("type", int),
    },
    "TensorProto": {
        1: ("dims", [int]),
        2: ("data_type", int),
        8: ("name", str),
        9: ("raw_data", bytes),
        13: ("external_data", ["StringStringEntryProto"]),
        14: ("data_location", int),
    },
    "ValueInfoProto": {1: ("name", str), 2: ("type", "TypeProto")},
    "TypeProto": {1: ("tensor_type", "TypeProto.Tensor")},
    "TypeProto.Tensor": {1: ("elem_type", int), 2: ("shape", "TensorShapeProto")},
    "TensorShapeProto": {1: ("dim", ["Dimension"])},
    "Dimension": {1: ("dim_value", int), 2: ("dim_param", str)},
    "OperatorSetIdProto": {1: ("domain", str), 2: ("version", int)},
    "StringStringEntryProto": {1: ("key", str), 2: ("value", str)},
}
EMPTY: dict[Any, Any] = {int: 0, float: 0.0, str: "", bytes: b""}
NUMBER, BYTES, FOUR_BYTES = 0, 2, 5  # how a field is stored
MAX_FIELDS = 2**22  # of a file: each takes memory


class MalformedError(Exception):
    """These are no bytes that portlm's exporter writes; the message says why."""


class Message:
    """A message that was read. Every field of its kind is an attribute: one that was not there is 0, "", [] or empty.

    Attributes:
        kind: a key of SCHEMA.
        present: the names of the fields that were there.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self.present: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        for known, holds in SCHEMA[self.kind].values():
            if known == name:
                if isinstance(holds, list):
                    return []
                return Message(holds) if isinstance(holds, str) else EMPTY[holds]
        raise AttributeError(name)


def read_onnx(raw: bytes) -> Message:
    """Return the model that a file holds, with the names that the package onnx gives to its parts.

    Raises:
        MalformedError: it is cut short, or holds a byte that export does not write.
    """
    return _Reader(raw).message("ModelProto", 0, len(raw))


class _Reader:
    def __init__(self, raw: bytes):
        self._raw, self._count = raw, 0

    def message(self, kind: str, begin: int, end: int) -> Message:
        found, last = Message(kind), 0
        schema = SCHEMA[kind]
        for number, stored, value in self._fields(begin, end):
            name, holds = schema.get(number, ("", None))
            if not name:
                raise MalformedError(f"a {kind} has the field {number}, which export never writes")
            if number < last or (number == last and not isinstance(holds, list)):
                raise MalformedError(f"the {name} of a {kind} is there twice or out of place")
            last = number
            item = self._value(holds[0] if isinstance(holds, list) else holds, stored, value)
            if isinstance(holds, list) and name in found.present:
                getattr(found, name).append(item)
            else:
                setattr(found, name, [item] if isinstance(holds, list) else item)
            found.present.add(name)
        return found

    def _value(self, holds: Any, stored: int, value: tuple[int, int]) -> Any:
        wanted = NUMBER if holds is int else FOUR_BYTES if holds is float else BYTES
        if stored != wanted:
            raise MalformedError("a field is stored otherwise than export does it")
        if holds is int:
            return value[0] - 2**64 if value[0] >= 2**63 else value[0]
        if isinstance(holds, str):
            return self.message(holds, *value)
        data = self._raw[slice(*value)]
        if holds is float:
            return struct.unpack("<f", data)[0]
        if holds is bytes:
            return data
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise MalformedError(f"a name is not text: {data[:40]!r}") from error

    def _fields(self, begin: int, end: int) -> Iterator[tuple[int, int, tuple[int, int]]]:
        """Yield number, way of storing, and the number itself or where the bytes begin and end."""
        place = begin
        while place < end:
            self._count += 1
            if self._count > MAX_FIELDS:
                raise MalformedError(f"has more than {MAX_FIELDS} fields")
            key, place = self._number(place, end)
            number, stored = key >> 3, key & 7
            if stored == NUMBER:
                value, place = self._number(place, end)
                yield number, stored, (value, 0)
                continue
            if stored == BYTES:
                size, place = self._number(place, end)
            elif stored == FOUR_BYTES:
                size = 4
            else:
                raise MalformedError("a field is stored otherwise than export does it")
            if size > end - place:
                raise MalformedError("truncated or not ONNX")
            yield number, stored, (place, place + size)
            place += size

    def _number(self, place: int, end: int) -> tuple[int, int]:
        """A whole number, seven bits to a byte, the lowest first; the last is not 0 unless it is the only one."""
        value = shift = 0
        for byte in self._raw[place : min(end, place + 10)]:
            place += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if (byte == 0 and shift) or value >= 2**64:
                    break
                return value, place
            shift += 7
        raise MalformedError("truncated or not ONNX")
