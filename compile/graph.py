"""Writes one ONNX graph node by node, under names that mirror the checkpoint's parameter names.

A module's output carries the module's path ("transformer.h.0.attn.c_attn"), its parameters the path of the
parameter ("transformer.h.0.attn.c_attn.weight"), and what lies inside a module a suffix of its path. So a node
that differs between two engines is named as in the PyTorch model.

Nothing here depends on time, machine or hash order: the same calls write the same bytes.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from portlm.compile.forms import ALIGNMENT, IR_VERSION, OPSET
from portlm.compile.mapped import BFLOAT16, MappedFile
from portlm.errors import FormatError

STORED = (np.dtype(np.float32), np.dtype(np.uint8), np.dtype(np.float16), BFLOAT16)
"""What weights may be in their file."""


@dataclass(frozen=True)
class Span:
    """Where one weight lies in the weight file."""

    offset: int
    length: int
    array: np.ndarray  # as stored; possibly a transposed view of the checkpoint, made contiguous on writing


class WeightFile:
    """The sibling file of the graphs: every weight once, shared by all profiles, in order of first use."""

    def __init__(self, location: str):
        """Args: location: the file's name as the graphs write it, relative to their own folder."""
        self.location = location
        self.spans: dict[str, Span] = {}
        self._end = 0

    def add(self, name: str, array: np.ndarray) -> Span:
        """Reserve room for an array of one of `STORED`; the second call with the same name returns the same span."""
        if name in self.spans:
            return self.spans[name]
        if array.dtype not in STORED:
            raise TypeError(f"{name} is {array.dtype}, the weight file holds {', '.join(map(str, STORED))}")
        offset = -(-self._end // ALIGNMENT) * ALIGNMENT
        span = self.spans[name] = Span(offset, array.nbytes, array)
        self._end = offset + array.nbytes
        return span

    @property
    def size(self) -> int:
        """Bytes of the finished file."""
        return self._end

    def write(self, path: Path, source: MappedFile | None = None) -> str:
        """Write the file, and wait until it is on the disk.

        Two tensors are in memory at a time: one is checked and hashed while the next is written.

        Args:
            path: of the file.
            source: where the weights come from, if that is a file.

        Returns:
            The sha256 of the file.

        Raises:
            FormatError: a weight holds NaN or infinity; no engine would agree with another on it.
        """
        digest = hashlib.sha256()
        checks: deque[Future[None]] = deque()
        with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as aside:
            end = 0
            for name, span in self.spans.items():
                array = np.ascontiguousarray(span.array).reshape(-1)
                padding = b"\0" * (span.offset - end)
                checks.append(aside.submit(_check_and_hash, name, array, padding, digest))
                write_all(file, padding)
                copied = source.copy(array, file) if source else 0
                write_all(file, array.view(np.uint8).data[copied:])
                end = span.offset + span.length
                if len(checks) > 1:
                    checks.popleft().result()
                if source:
                    source.release()
            os.fsync(file.fileno())
            for check in checks:
                check.result()
        return digest.hexdigest()


def write_all(file: RawIOBase, data: bytes | memoryview) -> None:
    """Write all bytes to an unbuffered file, which may take only a part at once."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _check_and_hash(name: str, array: np.ndarray, padding: bytes, digest: Any) -> None:
    """Refuse NaN and infinity, and hash the padding and the array: both while a block is in the processor's cache."""
    digest.update(padding)
    block = 2**16
    for begin in range(0, array.size, block):
        part = array[begin : begin + block]
        if array.dtype != np.uint8 and not np.isfinite(part).all():
            raise FormatError(f"{name} holds NaN or infinity: export a checkpoint that has not diverged")
        digest.update(part.view(np.uint8).data)


class GraphBuilder:
    """Collects nodes in topological order, then makes a ModelProto of them."""

    def __init__(
        self,
        name: str,
        weights: Mapping[str, np.ndarray],
        file: WeightFile,
        domains: Mapping[str, int],
        context_length: int = 0,
    ):
        """Start an empty graph.

        Args:
            name: of the graph, "decoder".
            weights: parameter name -> array in the orientation the graph uses.
            file: where the weights that the graph mentions are collected.
            domains: operator set versions besides the standard one.
            context_length: positions are below it.
        """
        self.name = name
        self.context_length = context_length
        self.nodes: list[onnx.NodeProto] = []
        self._weights, self._file, self.domains = weights, file, dict(domains)
        self._initializers: dict[str, TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._defined: set[str] = set()
        self._nodes: set[str] = set()
        self._reserved: set[str] = set()
        self._shared: dict[str, str] = {}

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        """Declare a graph input; a str dimension is symbolic."""
        self._define(name)
        self._inputs.append(_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        """Declare a value computed by some node as a graph output."""
        self._outputs.append(_value_info(name, dtype, shape))

    def adopt(self, graph: onnx.GraphProto) -> None:
        """Take over the inputs, outputs and weights of another graph, whose nodes are about to be rewritten."""
        for value in graph.input:
            self._define(value.name)
        for tensor in graph.initializer:
            self._define(tensor.name)
            self._initializers[tensor.name] = tensor
        self._inputs.extend(graph.input)
        self._outputs.extend(graph.output)

    def copy(self, node: onnx.NodeProto) -> None:
        """Append a node of another graph as it is."""
        for value in node.output:
            if value:
                self._define(value)
        self._nodes.add(node.name)
        self.nodes.append(node)

    def weight(self, name: str) -> str:
        """Mention a parameter: an initializer whose bytes are in the weight file."""
        if name not in self._initializers:
            span = self._file.add(name, self._weights[name])
            kind = helper.np_dtype_to_tensor_dtype(span.array.dtype)
            tensor = TensorProto(name=name, dims=span.array.shape, data_type=kind)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (
                ("location", self._file.location),
                ("offset", span.offset),
                ("length", span.length),
            ):
                tensor.external_data.add(key=key, value=str(value))
            self._define(name)
            self._initializers[name] = tensor
        return name

    def weight_plus(self, name: str, whole: str, number: float) -> str:
        """Mention a parameter with a number added to it under a name of its own, in float32."""
        if name not in self._weights:
            self._weights = {
                **self._weights,
                name: self._weights[whole].astype(np.float32) + np.float32(number),
            }
        return self.weight(name)

    def weight_part(self, name: str, whole: str, begin: int, end: int) -> str:
        """Mention some rows of a parameter under a name of their own."""
        if name not in self._weights:
            self._weights = {**self._weights, name: self._weights[whole][begin:end]}
        return self.weight(name)

    def ints(self, *values: int) -> str:
        """A one-dimensional int64 constant, stored in the graph: a shape, axes, split sizes."""
        return self._constant("ints." + "_".join(map(str, values)), np.array(values, dtype=np.int64))

    def counting(self, count: int) -> str:
        """The int64 constant 0 .. count - 1, stored in the graph."""
        return self._constant(f"counting.{count}", np.arange(count, dtype=np.int64))

    def weight_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight or constant that the graph has."""
        return tuple(self._initializers[name].dims)

    def input_shape(self, name: str) -> list[int | str]:
        """The declared shape of a graph input; a str dimension is symbolic."""
        value = next(value for value in self._inputs if value.name == name)
        return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]

    def shared(self, key: str, make: Callable[[], str]) -> str:
        """What `make` writes, written once however often this is called with the same key."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def unique(self, name: str) -> str:
        """A name that is not taken: the given one, or the first of name_2, name_3, ..."""
        return _free(name, self._defined | self._reserved)

    def reserve(self, *names: str) -> None:
        """Keep names for what will be the graph's outputs: `unique` gives them to nobody else."""
        self._reserved |= set(names)

    def axis(self, value: int) -> str:
        """An int64 constant of rank 0, stored in the graph."""
        return self._constant(f"axis.{value}", np.array(value, dtype=np.int64))

    def scalar(self, value: float) -> str:
        """A float32 constant of rank 0, stored in the graph."""
        return self._constant(f"scalar.{value!r}", np.array(value, dtype=np.float32))

    def floats(self, name: str, values: Sequence[float]) -> str:
        """A small float32 table, stored in the graph under a name."""
        return self._constant(name, np.array(values, dtype=np.float32))

    def _constant(self, name: str, array: np.ndarray) -> str:
        if name not in self._initializers:
            self._define(name)
            self._initializers[name] = onnx.numpy_helper.from_array(array, name)
        return name

    def op(
        self, op_type: str, inputs: Sequence[str], name: str, *, domain: str = "", **attributes: Any
    ) -> str:
        """Append a node with one output, called like the node; an empty input name is an absent input."""
        return self.split_op(op_type, inputs, name, (name,), domain=domain, **attributes)[0]

    def split_op(
        self,
        op_type: str,
        inputs: Sequence[str],
        name: str,
        outputs: Sequence[str],
        *,
        domain: str = "",
        **attributes: Any,
    ) -> tuple[str, ...]:
        """Append a node with several outputs, whose names are given in full; "" skips an optional output.

        A name that another node has gets a number: the node is known by its outputs.
        """
        for value in inputs:
            if value and value not in self._defined:
                raise ValueError(f"node {name} reads {value}, which nothing before it computes")
        for value in outputs:
            if value:
                self._define(value)
        name = _free(name, self._nodes)
        self._nodes.add(name)
        self.nodes.append(
            helper.make_node(op_type, inputs, outputs, name=name, domain=domain or None, **attributes)
        )
        return tuple(outputs)

    def _define(self, name: str) -> None:
        if name in self._defined:
            raise ValueError(f"{name} is defined twice")
        self._defined.add(name)

    def model(self, metadata: Mapping[str, str]) -> onnx.ModelProto:
        """The finished model; its weights still have to be written with WeightFile.write."""
        graph = helper.make_graph(
            self.nodes, self.name, self._inputs, self._outputs, initializer=list(self._initializers.values())
        )
        opsets = [
            helper.make_opsetid("", OPSET),
            *(helper.make_opsetid(d, v) for d, v in self.domains.items()),
        ]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="portlm")
        helper.set_model_props(model, dict(metadata))
        return model


def _free(name: str, taken: Container[str]) -> str:
    """Return the first of name, name_2, name_3, ... that is not taken."""
    tried, count = name, 1
    while tried in taken:
        count += 1
        tried = f"{name}_{count}"
    return tried


def _value_info(name: str, dtype: str, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    kinds = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT, "int8": TensorProto.INT8}
    elem_type = kinds[dtype]
    return helper.make_tensor_value_info(name, elem_type, list(shape))
