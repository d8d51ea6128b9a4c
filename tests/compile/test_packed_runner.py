"""The search for a wrong node in what the packed engine runs: all values are seen, and the wrong one is named."""

import shutil

import numpy as np
import onnx
import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("portlm._C", reason="portlm._C was not built")

from packable import PACKED

from portlm.artifact import read_manifest, refresh_files, write_manifest
from portlm.compile.bisect import bisect, look_inside
from portlm.compile.build import build
from portlm.compile.export import export
from portlm.compile.packed_runner import packed_runner
from portlm.compile.parity import RELATIVE_TOLERANCE, ROUNDED_TOLERANCE
from portlm.flows.targets import Target
from portlm.flows.verify import verify_artifact
from portlm.ops.compiled import kernels

GRAPH = "onnx/decoder.fused.onnx"


@pytest.mark.parametrize("family", PACKED)
def test_nothing_is_found_where_nothing_is_wrong(family, artifacts):
    """In prompts and steps on a state that it is given, of one row and of several with padding."""
    before = kernels.kernel_calls()["panel_linear"]
    seen = set()
    run = packed_runner()

    def counted(model, folder, names, inputs):
        seen.update(names)
        return run(model, folder, names, inputs)

    assert bisect(artifacts[family], counted, GRAPH) is None
    assert look_inside(artifacts[family], run, GRAPH) is None
    assert kernels.kernel_calls()["panel_linear"] != before
    states = {state.output for state in read_manifest(artifacts[family]).roles["decoder"].state}
    graph = onnx.load(artifacts[family] / GRAPH, load_external_data=False).graph
    layers = {node.output[0] for node in graph.node if node.op_type in ("CachedAttention", "Linear", "Split")}
    layers &= {name for node in graph.node for name in node.input}  # OPT's first rows are read by nothing
    assert states | layers | {"logits"} <= seen


@pytest.mark.parametrize("kind", ["cache", "bfloat16", "int4", "int8"])
def test_nothing_is_found_in_narrow_weights_and_caches(kind, byte_cache, quantized, checkpoints, tmp_path):
    """States of 8 bits go in and come out as they are; quantized products are within the bar of their rounding."""
    if kind == "cache":
        folder = byte_cache
    elif kind == "bfloat16":
        folder = export(checkpoints["llama"], tmp_path / "artifact", weights=kind)
    else:
        folder = quantized("gpt_neox", kind, True)
    tolerance = ROUNDED_TOLERANCE if kind.startswith("int") or kind == "cache" else RELATIVE_TOLERANCE
    assert bisect(folder, packed_runner(), GRAPH, tolerance) is None


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_a_state_comes_back_as_it_was_given(kind, artifacts, byte_cache):
    """The slots before the new ones, to the bit."""
    folder = byte_cache if kind == "int8" else artifacts["llama"]
    role = read_manifest(folder).roles["decoder"]
    rng = np.random.default_rng(5)
    sizes = {"batch": 2, "past": 5, "sequence": 3, "kept": 3}
    sizes["past + sequence"] = 8
    given = {
        s.name: rng.integers(0, 3, [sizes.get(d, d) for d in s.shape]).astype(s.dtype)
        for s in (*role.inputs, *role.state)
    }
    given["attention_mask"][:] = 1
    names = [state.output for state in role.state]
    model = onnx.load(folder / GRAPH, load_external_data=False)
    grown = packed_runner()(model, (folder / GRAPH).parent, names, given)
    for state, value in zip(role.state, grown, strict=True):
        assert value.dtype == state.dtype
        assert value.shape[2] == 8
        assert value[:, :, :5].tobytes() == given[state.name].tobytes()


def test_verify_names_the_node_that_packed_gets_wrong(artifacts, tmp_path):
    """An epsilon that another hand made large in the graph that the file is compiled from."""
    folder = shutil.copytree(artifacts["gpt2"], tmp_path / "artifact")
    model = onnx.load(folder / GRAPH, load_external_data=False)
    norms = [node for node in model.graph.node if node.op_type in ("LayerNorm", "AddLayerNorm")]
    faulty = norms[2]
    next(a for a in faulty.attribute if a.name == "epsilon").f = 1.0
    (folder / GRAPH).write_bytes(model.SerializeToString(deterministic=True))
    write_manifest(folder, refresh_files(folder, read_manifest(folder), [GRAPH]))
    build(folder, [("packed", "cpu", "fused")])
    (found,) = verify_artifact(folder, [Target("packed", "cpu", "fused")])
    assert "its logits are off" in found.problem
    assert found.node.startswith(f"{faulty.name} (ai.portlm.{faulty.op_type}) is the first node that differs")
