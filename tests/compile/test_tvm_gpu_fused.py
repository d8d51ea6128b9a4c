"""The fused graph for GPUs: how many kernels it is, and what it has no form for."""

import onnx
import pytest
from onnx import TensorProto, helper

tvm = pytest.importorskip("tvm", reason="tvm is missing: pip install portlm[tvm]")
from tvm import relax  # noqa: E402

from portlm.compile import tvm_gpu_fused  # noqa: E402
from portlm.compile.passes import Dump  # noqa: E402
from portlm.compile.tvm_build import make_graph, read_graph  # noqa: E402
from portlm.errors import EngineUnavailableError  # noqa: E402


def kernels(folder):
    """The calls of kernels in a decoder's module, without the memory that is only seen in another shape."""
    module = tvm_gpu_fused.lower(tvm_gpu_fused.in_panels(read_graph(folder, "decoder", "fused")))
    values = [binding.value for block in module["main"].body.blocks for binding in block.bindings]
    calls = [value for value in values if isinstance(value, relax.Call)]
    return [str(call.op.name) for call in calls if call.op.name != "relax.reshape"]


# Around the layers: tokens are looked up, positions too if they have a table, and the two added; the last norm, the
# choice of rows, and their product.
@pytest.mark.parametrize(("family", "around"), [("gpt2", 6), ("llama", 4), ("qwen2", 4)])
def test_a_layer_is_five_kernels(artifacts, family, around):
    folder = artifacts[family]
    caches = [name for name in read_graph(folder, "decoder", "fused").outputs if name.endswith(".key")]
    found = kernels(folder)
    assert len(found) <= 5 * len(caches) + around
    assert found.count("relax.call_tir") >= 5 * len(caches)


def one_node(op_type, domain=""):
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in "xy")
    node = helper.make_node(op_type, ["x"], ["y"], name="the.node", domain=domain)
    proto = helper.make_model(helper.make_graph([node], "g", [x], [y]))
    return make_graph(proto, "", [])


def test_a_node_without_a_form_is_named():
    with pytest.raises(
        EngineUnavailableError, match=r"'the\.node' \(Det\) has no form in the fused profile for GPUs"
    ):
        tvm_gpu_fused.lower(one_node("Det"))


def test_a_graph_whose_weights_are_apart_is_dumped_as_onnx(tmp_path):
    """As of a pass that only looks whether the device has a form for it."""
    Dump(tmp_path)("Readable", one_node("Det"))
    assert onnx.load(tmp_path / "00-Readable.onnx").graph.node[0].op_type == "Det"
