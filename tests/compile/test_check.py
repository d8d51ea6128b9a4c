import os
import random
import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from portlm.artifact import check_files
from portlm.compile import check
from portlm.compile.check import check_model
from portlm.compile.ort_lowering import compile_graph
from portlm.errors import FormatError

GRAPH = "onnx/decoder.portable.onnx"


@pytest.fixture
def artifact(artifacts, tmp_path):
    return shutil.copytree(artifacts["llama"], tmp_path / "artifact")


@pytest.fixture
def rewritten(artifact):
    """Function: change the parsed graph, write it back, return its path."""

    def rewrite(change):
        path = artifact / GRAPH
        model = onnx.load(path, load_external_data=False)
        change(model)
        path.write_bytes(model.SerializeToString())
        return path

    return rewrite


def external(model):
    return next(tensor for tensor in model.graph.initializer if tensor.external_data)


def set_entry(tensor, key, value):
    next(entry for entry in tensor.external_data if entry.key == key).value = value


@pytest.mark.parametrize("profile", ["portable", "fused"])
def test_what_the_exporter_writes_is_accepted(artifact, profile):
    path = artifact / "onnx" / f"decoder.{profile}.onnx"
    assert check_model(path).graph.name == "decoder"


@pytest.mark.parametrize("device", ["cpu", "vulkan"])
def test_what_the_lowering_writes_is_accepted(artifact, device):
    check_model(artifact / compile_graph(artifact, device).entry.files[0])


@pytest.mark.parametrize("size", [0, 1, 2, 3, 10, 100, 1000, -1000, -100, -2, -1])
def test_truncated_graph_is_refused(artifact, size):
    """By this check where the rest no longer parses or lacks a part, by the manifest's hash in every case."""
    path = artifact / GRAPH
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    with pytest.raises(FormatError, match=r"decoder\.portable\.onnx"):
        check_model(path)
    with pytest.raises(FormatError, match=r"decoder\.portable\.onnx: truncated"):
        check_files(artifact)


def test_flipped_bits_raise_nothing_but_format_error(artifact):
    """Flips that leave a valid graph (in a constant or a name) are for the manifest's hash to find."""
    path = artifact / GRAPH
    raw, rng = path.read_bytes(), random.Random(0)
    accepted = 0
    for _ in range(300):
        damaged = bytearray(raw)
        damaged[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            check_model(path)
            accepted += 1
        except FormatError:
            pass
        with pytest.raises(FormatError, match="altered"):
            check_files(artifact, [GRAPH])
    assert accepted < 150  # it is a check, not a formality


def test_weight_file_that_is_too_short_is_refused(artifact):
    data = artifact / "onnx" / "decoder.onnx.data"
    os.truncate(data, data.stat().st_size - 1)
    with pytest.raises(FormatError, match=r"ends at byte \d+ of decoder\.onnx\.data, which has \d+"):
        check_model(artifact / GRAPH)
    data.unlink()
    with pytest.raises(FormatError, match=r"weight file decoder\.onnx\.data beside it is missing"):
        check_model(artifact / GRAPH)


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("Loop", ["x"], ["y"]),
        helper.make_node("LSTM", ["x"], ["y"]),
        helper.make_node("MatMul", ["x", "x"], ["y"], domain="com.microsoft"),
        helper.make_node("MultiHeadAttention", ["x"], ["y"], domain="evil"),
        helper.make_node("Relu", ["x"], ["y"], consumed_inputs=[1]),
        helper.make_node("Transpose", ["x"], ["y"], perm=numpy_helper.from_array(np.zeros(3))),
        helper.make_node("Transpose", ["x"], ["y"], perm=helper.make_graph([], "inner", [], [])),
        helper.make_node("Concat", ["x"] * 65, ["y"], axis=0),
        helper.make_node("Relu", ["past_key_values.0.key"], ["y" * 257]),
    ],
    ids=lambda node: f"{node.domain}.{node.op_type}",
)
def test_what_the_exporter_never_writes_is_refused(rewritten, node):
    path = rewritten(lambda model: model.graph.node.insert(0, node))
    with pytest.raises(
        FormatError, match=r"is not one of ours|has the attribute|has the field|too many|longer than"
    ):
        check_model(path)


def test_split_that_contradicts_its_outputs_is_refused(rewritten):
    """No library is asked about such a node: not all of them answer."""

    def change(model):
        split = next(node for node in model.graph.node if node.op_type == "Split")
        split.attribute[1].i = 3

    with pytest.raises(FormatError, match="has 2 outputs and says 3"):
        check_model(rewritten(change))


@pytest.mark.parametrize(
    "location",
    [
        "../model.safetensors",
        "/etc/passwd",
        "sub/x",
        "..",
        "",
        ".",
        "a\0b",
        "C:\\x",
        "*/_ORT_MEM_ADDR_/*",
        "x" * 4096,
    ],
    ids=ascii,
)
def test_weights_outside_the_one_sibling_are_refused(rewritten, location):
    path = rewritten(lambda model: set_entry(external(model), "location", location))
    with pytest.raises(FormatError):
        check_model(path)


@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_sibling_that_is_no_plain_file_is_refused(artifact, kind, tmp_path):
    data = artifact / "onnx" / "decoder.onnx.data"
    data.rename(tmp_path / "moved")
    if kind == "link":
        data.symlink_to(tmp_path / "moved")
    elif kind == "fifo":
        os.mkfifo(data)
    else:
        data.mkdir()
    with pytest.raises(FormatError):
        check_model(artifact / GRAPH)


@pytest.mark.parametrize("key", ["offset", "length"])
@pytest.mark.parametrize(
    "value", ["-1", "", "1e3", "0x10", " 1", "1 ", "+1", "²", str(2**31), str(2**63), "9" * 400]
)
def test_impossible_extents_are_refused(rewritten, key, value):
    path = rewritten(lambda model: set_entry(external(model), key, value))
    with pytest.raises(FormatError):
        check_model(path)


def weight(**fields):
    base = {"name": "w", "data_type": TensorProto.FLOAT, "dims": [2], "raw_data": b"\0" * 8}
    return TensorProto(**(base | fields))


@pytest.mark.parametrize(
    "tensor",
    [
        weight(dims=[3]),
        weight(dims=[2**62, 4]),
        weight(dims=[-2]),
        weight(dims=[1] * 9),
        weight(raw_data=b"\0" * 7),
        weight(data_type=TensorProto.STRING),
        weight(data_type=TensorProto.INT4),
        weight(data_type=99),
        weight(data_location=TensorProto.EXTERNAL),
    ],
    ids=range(9),
)
def test_payload_that_does_not_fit_its_shape_is_refused(rewritten, tensor):
    path = rewritten(lambda model: model.graph.initializer.append(tensor))
    with pytest.raises(FormatError, match="weight 'w'"):
        check_model(path)


def add_function(model):
    node = helper.make_node("Relu", ["x"], ["y"])
    model.functions.append(helper.make_function("evil", "f", ["x"], ["y"], [node], []))


@pytest.mark.parametrize(
    "change",
    [
        add_function,
        lambda model: model.training_info.add(),
        lambda model: model.graph.value_info.add(name="logits"),
        lambda model: model.graph.node[0].metadata_props.add(key="a", value="b"),
        lambda model: model.graph.initializer.append(weight(raw_data=b"", float_data=[1.0, 2.0])),
        lambda model: model.graph.initializer.append(weight(segment=TensorProto.Segment(begin=0, end=1))),
        lambda model: model.graph.sparse_initializer.add(),
        lambda model: model.graph.quantization_annotation.add(),
        lambda model: model.opset_import.append(helper.make_opsetid("evil", 1)),
        lambda model: model.opset_import.append(helper.make_opsetid("", 21)),
        lambda model: model.graph.input.add(name="x"),
        lambda model: model.graph.node.add(op_type="Relu", input=["nowhere"], output=["y"]),
        lambda model: model.graph.node.append(model.graph.node[0]),
    ],
    ids=[
        "function",
        "training",
        "value info",
        "node metadata",
        "typed data",
        "segment",
        "sparse",
        "annotation",
        "domain",
        "opset",
        "untyped",
        "undefined",
        "twice",
    ],
)
def test_other_parts_of_a_model_are_refused(rewritten, change):
    path = rewritten(change)
    with pytest.raises(FormatError):
        check_model(path)


def test_huge_graph_is_refused_unread(artifact, monkeypatch):
    monkeypatch.setattr(check, "MAX_GRAPH_BYTES", 1000)
    with pytest.raises(FormatError, match="larger than the 1000 bytes"):
        check_model(artifact / GRAPH)


def test_missing_graph_is_named(tmp_path):
    with pytest.raises(FormatError, match=r"absent\.onnx does not exist"):
        check_model(tmp_path / "absent.onnx")
