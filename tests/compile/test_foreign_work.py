"""Bytes per token of a graph that portlm did not write."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")


def graph(tmp_path, tied: bool):
    """A table of 100 x 8 float32, a packed matrix of 400 bytes with 20 half scales, and perhaps the table as a head."""
    make = onnx.helper.make_node
    nodes = [
        make("Gather", ["table", "ids"], ["x"]),
        make("MatMulNBits", ["x", "packed", "scale"], ["y"], "n", "", "com.microsoft"),
    ]
    nodes += [make("MatMul", ["y", "table"], ["z"])] if tied else []
    tensors = [
        onnx.numpy_helper.from_array(np.zeros((100, 8), np.float32), "table"),
        onnx.numpy_helper.from_array(np.zeros((10, 40), np.uint8), "packed"),
        onnx.numpy_helper.from_array(np.zeros(20, np.float16), "scale"),
    ]
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], tensors)), path)
    return path


@pytest.mark.parametrize(("tied", "wanted"), [(False, 440), (True, 440 + 3200)])
def test_a_table_counts_only_where_it_is_a_matrix_as_well(tmp_path, tied, wanted):
    from portlm.compile.foreign_work import weight_bytes

    assert weight_bytes(graph(tmp_path, tied)) == wanted
