"""The weights of a packed file: read from an artifact's files when they are written, in the order that kernels read."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from onnx import TensorProto

from portlm.compile.packed_file import Tensor
from portlm.files import safe_join
from portlm.ops.quantized import Layout, pack_array

HALVES: dict[int, str] = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}


class Weights:
    """The tensors of a packed file, each once however many steps and roles read it."""

    def __init__(self, root: Path):
        self.tensors: list[Tensor] = []
        self._root = root
        self._places: dict[tuple[str, int, str], int] = {}

    def place(self, tensor: TensorProto, folder: str, panels: bool, turned: bool) -> int:
        """Return the place of a weight of a graph, in panels or not; (in, out) becomes (out, in) if it is turned."""
        file, offset, shape = _located(tensor, folder)

        def read() -> np.ndarray:
            array = self._read(file, offset, shape, "<f4")
            return array.T if turned else array

        made = Tensor(tensor.name, shape[::-1] if turned else shape, read, panels)
        return self._add((file, offset, f"{shape} {panels} {turned}"), made)

    def place_half(self, tensor: TensorProto, folder: str) -> int:
        """Return the place of a matrix (out, in) of 16 bits, which is in panels."""
        file, offset, shape = _located(tensor, folder)
        read = lambda: self._read(file, offset, shape, "<u2")  # noqa: E731
        made = Tensor(tensor.name, shape, read, panels=True, dtype=HALVES[tensor.data_type])
        return self._add((file, offset, "half"), made)

    def place_quantized(self, parts: Sequence[TensorProto | None], folder: str, bits: int) -> int:
        """Return the place of a quantized matrix, of weight, scale and zero points or None."""
        places = [None if part is None else _located(part, folder) for part in parts]
        weight, scale, zero = places
        assert weight is not None
        assert scale is not None

        def read() -> np.ndarray:
            numbers, scales = self._read(*weight, "u1"), self._read(*scale, "<f4")
            return pack_array(numbers, scales, None if zero is None else self._read(*zero, "u1"), bits)

        layout = Layout.of(weight[2], bits, zero is not None)
        assert parts[0] is not None
        made = Tensor(parts[0].name, (layout.N, layout.K), read, layout=layout)
        return self._add((*weight[:2], f"{bits} {zero} {scale}"), made)

    def _add(self, key: tuple[str, int, str], tensor: Tensor) -> int:
        if key not in self._places:
            self._places[key] = len(self.tensors)
            self.tensors.append(tensor)
        return self._places[key]

    def _read(self, file: str, offset: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return np.fromfile(safe_join(self._root, file), dtype, math.prod(shape), offset=offset).reshape(shape)


def _located(tensor: TensorProto, folder: str) -> tuple[str, int, tuple[int, ...]]:
    """File, offset and shape of a weight."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return f"{folder}/{entries['location']}", int(entries["offset"]), tuple(tensor.dims)
