import collections
import shutil

import onnx
import pytest

from portlm.artifact import check_files, read_manifest
from portlm.compile.build import build
from portlm.compile.check import CONTRIB, check_model
from portlm.compile.export import export
from portlm.compile.forms import CONTRIB_OPS
from portlm.compile.ort_lowering import compile_graph, lower_model
from portlm.errors import FormatError, UsageError
from portlm.ort_support import IN_PLACE

NAMES = ("gpt2", "llama", "gpt2-erf", "gpt2-one-head", "llama-tied", "llama-one-kv-head")
TOLERANCE = 4e-5  # as in test_export.py


@pytest.fixture(scope="module")
def lowered(exported, tmp_path_factory):
    """Function: (name, device) -> copy of the artifact, and its graph lowered for the device."""
    root = tmp_path_factory.mktemp("lowered")
    made = {}

    def of(name, device):
        if name not in made:
            made[name] = shutil.copytree(exported[name], root / name)
        return made[name], made[name] / compile_graph(made[name], device).entry.files[0]

    return of


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("device", ["cpu", "vulkan"])
def test_lowered_graph_gives_the_logits_of_transformers(lowered, ragged_error, ort_step, name, device):
    """Ragged, left-padded, with several tokens at once on a filled cache; on Vulkan without any node on the CPU."""
    folder, graph = lowered(name, device)
    assert ragged_error(folder, ort_step(graph, device)) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("device", ["cpu", "cuda", "vulkan"])
def test_no_fused_node_is_left(lowered, name, device):
    _, path = lowered(name, device)
    graph = check_model(path).graph
    kinds = collections.Counter((node.domain, node.op_type) for node in graph.node)
    layers = sum(value.name.endswith(".key") for value in graph.input)
    assert {domain for domain, _ in kinds} == {"", CONTRIB}
    assert {kind for domain, kind in kinds if domain == CONTRIB} <= CONTRIB_OPS.keys()
    narrow = name in ("gpt2-erf", "llama-tied", "llama-one-kv-head")  # heads of 6
    grouped = device == "cpu" and not narrow and name != "gpt2-one-head"
    assert kinds[CONTRIB, "GroupQueryAttention"] == (layers if grouped else 0)
    assert kinds[CONTRIB, "MultiHeadAttention"] == (0 if grouped or device == "vulkan" else layers)
    skip = "SkipLayerNormalization" if name.startswith("gpt2") else "SkipSimplifiedLayerNormalization"
    assert kinds[CONTRIB, skip] == 2 * layers


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_graph_says_whether_its_cache_may_grow_in_place(lowered, device):
    model = onnx.load(lowered("llama", device)[1], load_external_data=False)
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert (IN_PLACE.items() <= said.items()) == (device == "cpu")


def test_weights_are_neither_copied_nor_renamed(lowered):
    folder, path = lowered("llama", "cpu")
    fused = onnx.load(folder / "onnx" / "decoder.fused.onnx", load_external_data=False)
    graph = onnx.load(path, load_external_data=False)
    weights = [
        [t.SerializeToString() for t in g.graph.initializer if t.external_data] for g in (fused, graph)
    ]
    assert weights[0] == weights[1]
    assert path.stat().st_size < 100_000


def test_values_common_to_both_graphs_have_common_names(exported, lowered):
    """bisect compares by name, so the values between layers must be findable in the portable graph."""
    folder, path = lowered("llama", "cpu")
    names = [
        {value for node in check_model(p).graph.node for value in node.output}
        for p in (folder / "onnx" / "decoder.portable.onnx", path)
    ]
    expected = {"mask.bias", "model.norm", "logits"}
    expected |= {
        f"model.layers.{layer}.self_attn{part}"
        for layer in (0, 1)
        for part in ("", ".q_proj.rotary", ".o_proj")
    }
    expected |= {
        f"model.layers.{layer}.mlp.{part}"
        for layer in (0, 1)
        for part in ("gate_proj", "swiglu", "down_proj")
    }
    assert expected <= names[0] & names[1]


def test_lowering_is_deterministic(artifacts):
    model = check_model(artifacts["llama"] / "onnx" / "decoder.fused.onnx")
    first, second = (lower_model(model, 48, "cpu").SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_build_enters_the_graph_in_the_manifest(artifacts, tmp_path):
    folder = shutil.copytree(artifacts["gpt2"], tmp_path / "artifact")
    for _ in range(2):  # again: replaced, not added
        build(folder, [("ort", "cpu", "fused")])
        (entry,) = read_manifest(folder).compiled
        assert (entry.engine, entry.device, entry.profile) == ("ort", "cpu", "fused")
        assert entry.files == ("onnx/decoder.ort-cpu-fused.onnx", "onnx/decoder.ort-cpu-fused-even.onnx")
        check_files(folder)


def test_artifact_without_fused_profile_is_refused(checkpoints, tmp_path):
    folder = export(checkpoints["gpt2"], tmp_path / "out", profiles=("portable",))
    with pytest.raises(UsageError, match="no fused graph of decoder"):
        compile_graph(folder, "cpu")


def test_altered_fused_graph_is_refused(artifacts, tmp_path):
    folder = shutil.copytree(artifacts["gpt2"], tmp_path / "artifact")
    graph = folder / "onnx" / "decoder.fused.onnx"
    graph.write_bytes(graph.read_bytes().replace(b"GeluMlp", b"GeluMlq"))
    with pytest.raises(FormatError, match=r"decoder\.fused\.onnx: altered"):
        compile_graph(folder, "cpu")
