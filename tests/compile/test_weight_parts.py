"""Rows of a weight, read where they lie, are the rows that a Split would have given."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from portlm.compile.weight_parts import part_weights

TABLE = np.arange(15, dtype=np.float32).reshape(5, 3)
START = 64  # bytes of the weight file before the table


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").write_bytes(bytes(START) + TABLE.tobytes())
    return tmp_path


def model(axis: int, sizes: list[int], *, whole: bool = False) -> onnx.ModelProto:
    """A graph that looks rows up in the last part of a split table, and in the whole if asked to."""
    table = TensorProto(
        name="table", data_type=TensorProto.FLOAT, dims=TABLE.shape, data_location=TensorProto.EXTERNAL
    )
    for key, value in (("location", "data"), ("offset", START), ("length", TABLE.nbytes)):
        table.external_data.add(key=key, value=str(value))
    parts = [f"part{i}" for i in range(len(sizes))]
    nodes = [
        helper.make_node("Split", ["table", "sizes"], parts, axis=axis),
        helper.make_node("Gather", [parts[-1], "ids"], ["y"]),
        *([helper.make_node("Gather", ["table", "ids"], ["z"])] if whole else []),
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    constants = [table, numpy_helper.from_array(np.array(sizes), "sizes")]
    return helper.make_model(helper.make_graph(nodes, "g", [ids], [y], constants))


@pytest.mark.parametrize("axis", [0, -2])
@pytest.mark.parametrize("sizes", [[2, 3], [1, 1, 3], [5]], ids=str)
def test_a_part_is_a_weight_of_its_own_that_begins_further_on(folder, axis, sizes):
    changed = model(axis, sizes)
    part_weights(changed)
    (gather,) = changed.graph.node
    (part,) = changed.graph.initializer  # neither the whole, nor parts that nobody reads, nor sizes
    assert part.name == gather.input[0]
    np.testing.assert_array_equal(numpy_helper.to_array(part, str(folder)), TABLE[-sizes[-1] :])


def test_a_table_that_is_also_read_whole_stays(folder):
    changed = model(0, [2, 3], whole=True)
    part_weights(changed)
    named = {t.name: numpy_helper.to_array(t, str(folder)) for t in changed.graph.initializer}
    np.testing.assert_array_equal(named["table"], TABLE)
    np.testing.assert_array_equal(named["part1"], TABLE[2:])


def test_a_split_of_columns_is_left_as_it_is():
    changed = model(1, [1, 2])
    before = changed.SerializeToString()
    part_weights(changed)
    assert changed.SerializeToString() == before
