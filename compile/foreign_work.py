"""How much a graph of other makers reads for a token: what the race compares their rates with."""

from pathlib import Path

import onnx

TABLES = ("Gather", "GatherBlockQuantized")  # a row of each of their tables is read
BITS = {
    onnx.TensorProto.FLOAT: 32, onnx.TensorProto.UINT8: 8, onnx.TensorProto.INT8: 8, onnx.TensorProto.BOOL: 8,
    onnx.TensorProto.INT32: 32, onnx.TensorProto.INT64: 64, onnx.TensorProto.FLOAT16: 16, onnx.TensorProto.DOUBLE: 64,
    onnx.TensorProto.BFLOAT16: 16, onnx.TensorProto.UINT4: 4, onnx.TensorProto.INT4: 4,
}  # fmt: skip


def weight_bytes(path: Path) -> int:
    """Bytes of the initializers of a graph, less those that only a lookup reads.

    Of the graph as it is stored: what an engine adds while it packs its weights is not in it. The weights themselves
    are not opened.
    """
    graph = onnx.load(path, load_external_data=False).graph
    looked_up = {node.input[0] for node in graph.node if node.op_type in TABLES}
    read = {name for node in graph.node if node.op_type not in TABLES for name in node.input}
    total = 0
    for tensor in graph.initializer:
        if tensor.name in looked_up and tensor.name not in read:
            continue
        count = 1
        for extent in tensor.dims:
            count *= extent
        total += count * BITS[tensor.data_type] // 8
    return total
