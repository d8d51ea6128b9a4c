"""From ONNX graphs to TVM libraries. That they answer like PyTorch is tests/runtimes/test_every_decoder.py."""

import functools
import re
import shutil

import numpy as np
import pytest

pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")
pytest.importorskip("tvm", reason="TVM is missing: pip install portlm[tvm]")

import onnx
import tvm
from tvm import relax

from portlm.artifact import hash_files, read_manifest, refresh_files, write_manifest
from portlm.compile import tvm_fused
from portlm.compile.tvm_build import read_graph
from portlm.compile.tvm_library import compile_library
from portlm.compile.tvm_schedule import cpu_passes
from portlm.errors import EngineUnavailableError, FormatError
from portlm.tvm_support import LIBRARY, SIGNATURE, Signature, folder_name

GRAPHS = {"portable": "onnx/decoder.portable.onnx", "fused": "onnx/decoder.fused.onnx"}
COMPILE = {
    profile: functools.partial(compile_library, device="cpu", profile=profile)
    for profile in ("portable", "fused")
}


@pytest.fixture
def artifact(artifacts, tmp_path):
    """A copy of the GPT-2 artifact that a test may change."""
    return shutil.copytree(artifacts["gpt2"], tmp_path / "artifact")


@pytest.mark.parametrize("profile", GRAPHS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_signature_points_at_every_weight(compiled, family, profile):
    folder = compiled[family]
    signature = Signature.read(folder / folder_name("cpu", profile) / SIGNATURE, folder)
    model = onnx.load(folder / GRAPHS[profile])
    expected = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    data = (folder / signature.weights_file).read_bytes()
    assert signature.weights
    for weight in signature.weights:
        stored = np.frombuffer(data, np.float32, weight.nbytes // 4, weight.offset).reshape(weight.shape)
        np.testing.assert_array_equal(stored, expected[weight.name])


@pytest.mark.parametrize("profile", GRAPHS)
def test_weights_stay_out_of_the_library(compiled, profile):
    folder = compiled["gpt2"]
    name = folder_name("cpu", profile)
    code = (folder / name / LIBRARY).read_bytes()
    signature = Signature.read(folder / name / SIGNATURE, folder)
    data = (folder / signature.weights_file).read_bytes()
    for weight in signature.weights:
        assert data[weight.offset : weight.offset + min(64, weight.nbytes)] not in code, weight.name


@pytest.mark.parametrize(("family", "beside"), [("gpt2", 2), ("llama", 1)])
def test_every_fused_node_becomes_a_kernel_call_and_every_layer_one_call(artifacts, family, beside):
    """Beside the layers there is the head, and in GPT-2 the two tables, whose sum is TVM's own."""
    graph = read_graph(artifacts[family], "decoder", "fused")
    script = tvm_fused.lower(graph)["main"].script()
    fused = [node for node in graph.proto.graph.node if node.domain == "ai.portlm"]
    layers = sum(node.op_type == "CachedAttention" for node in fused)
    recipes = re.findall(r'"portlm.chain", R.str\("([^"]*)"\)', script)
    # attention is three kernels: the cache of keys, that of values, and the product over both; an MLP is two products
    kernels = len(fused) + 2 * layers + sum(node.op_type == "GeluMlp" for node in fused)
    assert sum(recipe.count("|") for recipe in recipes) == kernels
    assert len(recipes) == script.count('"portlm.') == layers + beside


def test_a_layer_of_gpt_neox_is_one_call_and_a_sum(artifacts):
    """Its queries, keys and values lie side by side head by head; the sum of its two branches is TVM's own."""
    graph = read_graph(artifacts["gpt_neox"], "decoder", "fused")
    script = tvm_fused.lower(graph)["main"].script()
    layers = sum(node.op_type == "CachedAttention" for node in graph.proto.graph.node)
    assert script.count("R.call_") == script.count('"portlm.') == layers + 2
    assert not re.search("R.(strided_slice|concat|reshape)", script)
    assert script.count("R.add(") == layers


def test_values_of_a_chain_share_memory_unless_they_are_needed_together(artifacts):
    """Of every recipe: what a step writes lies in no place that it, or a later one, still reads."""
    script = tvm_fused.lower(read_graph(artifacts["llama"], "decoder", "fused"))["main"].script()
    shared = 0
    for recipe in re.findall(r'"portlm.chain", R.str\("([^"]*)"\)', script):
        head, *steps = recipe.split("|")
        places = [int(inner.split(":")[1]) for inner in head.split()[1:]]
        uses = {i: [s for s, step in enumerate(steps) if f"%{i}" in step.split()] for i in range(len(places))}
        for a in uses:
            for b in range(a):
                if places[a] == places[b]:
                    shared += 1
                    assert uses[b][-1] < uses[a][0]
    assert shared > 4


def product(b_shape, transposed, rows):
    """A module that multiplies (rows, K) by a matrix, or by its transpose."""
    K = b_shape[1] if transposed else b_shape[0]
    builder = relax.BlockBuilder()
    a = relax.Var("a", relax.TensorType((rows, K), "float32"))
    b = relax.Var("b", relax.TensorType(b_shape, "float32"))
    with builder.function("main", [a, b]):
        with builder.dataflow():
            right = builder.emit(relax.op.permute_dims(b, [1, 0])) if transposed else b
            result = builder.emit_output(relax.op.matmul(a, right))
        builder.emit_func_output(result)
    return builder.get()


@pytest.mark.parametrize("K", [1, 6, 40])
@pytest.mark.parametrize("N", [1, 24, 130])
@pytest.mark.parametrize("transposed", [False, True], ids=["x @ W", "x @ W^T"])
def test_a_scheduled_product_equals_numpys(K, N, transposed):
    rng, target = np.random.default_rng(0), tvm.target.Target({"kind": "llvm"})
    shape = (N, K) if transposed else (K, N)
    module = product(shape, transposed, tvm.tirx.Var("rows", "int64"))
    library = relax.build(module, target, relax_pipeline=tvm.transform.Sequential(cpu_passes(target)))
    machine = relax.VirtualMachine(library, tvm.cpu())
    b = rng.standard_normal(shape, dtype=np.float32)
    for rows in (1, 5):
        a = rng.standard_normal((rows, K), dtype=np.float32)
        expected = a.astype(np.float64) @ (b.T if transposed else b).astype(np.float64)
        result = machine["main"](tvm.runtime.tensor(a), tvm.runtime.tensor(b)).numpy()
        # K sums of products of size 1, each rounded once
        np.testing.assert_allclose(result, expected, rtol=0, atol=K * 1e-6, equal_nan=False)


@pytest.mark.parametrize("transposed", [False, True], ids=["x @ W", "x @ W^T"])
def test_a_product_is_vectorised(transposed):
    target = tvm.target.Target({"kind": "llvm"})
    with target:
        module = tvm.transform.Sequential(cpu_passes(target))(product((64, 64), transposed, 5))
    (function,) = (f for f in module.functions.values() if isinstance(f, tvm.tirx.PrimFunc))
    assert "T.vectorized(" in function.script()


@pytest.mark.parametrize("profile", GRAPHS)
def test_a_missing_graph_says_to_export(artifact, profile):
    (artifact / GRAPHS[profile]).unlink()
    with pytest.raises(FormatError, match="export"):
        COMPILE[profile](artifact)


@pytest.mark.parametrize("profile", GRAPHS)
@pytest.mark.parametrize("damage", [b"", b"\x00" * 100, b"not a model"], ids=["empty", "zeros", "text"])
def test_a_damaged_graph_is_a_format_error(artifact, profile, damage):
    (artifact / GRAPHS[profile]).write_bytes(damage)
    with pytest.raises(FormatError):
        COMPILE[profile](artifact)


def test_a_node_outside_the_profile_is_named(artifact):
    path = artifact / GRAPHS["fused"]
    model = onnx.load(path, load_external_data=False)
    model.graph.node[3].op_type = "Mystery"
    path.write_bytes(model.SerializeToString())
    write_manifest(artifact, refresh_files(artifact, read_manifest(artifact)))
    with pytest.raises(FormatError, match="Mystery") as error:
        compile_library(artifact, "cpu", "fused")
    assert model.graph.node[3].name in str(error.value)


def test_a_node_without_its_attribute_is_named(artifact):
    path = artifact / GRAPHS["fused"]
    model = onnx.load(path, load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "CachedAttention")
    del node.attribute[:]
    path.write_bytes(model.SerializeToString())
    write_manifest(artifact, refresh_files(artifact, read_manifest(artifact)))
    with pytest.raises(FormatError, match=node.name):
        compile_library(artifact, "cpu", "fused")


def test_without_a_c_compiler_the_error_says_what_to_install(artifact, monkeypatch):
    monkeypatch.setattr("tvm.support.cc.get_cc", lambda: None)
    with pytest.raises(EngineUnavailableError, match=r"install g\+\+"):
        compile_library(artifact, "cpu", "fused")
    assert not (artifact / "compiled").exists()


def test_compiling_again_replaces_the_library(artifact):
    folder = artifact / folder_name("cpu", "fused")
    first = compile_library(artifact, "cpu", "fused")
    inode = (folder / LIBRARY).stat().st_ino
    second = compile_library(artifact, "cpu", "fused")
    assert second.entry == first.entry
    # Not the bytes: TVM computes the shapes of one graph in an order that differs from build to build.
    assert second.files == hash_files(artifact, first.files)
    assert (folder / LIBRARY).stat().st_ino != inode, "a running engine keeps the old file"
    assert sorted(path.name for path in folder.iterdir()) == sorted((LIBRARY, SIGNATURE))


def test_a_graph_that_export_would_not_write_is_refused_before_tvm_sees_it(artifact):
    path = artifact / GRAPHS["portable"]
    model = onnx.load(path, load_external_data=False)
    model.graph.node.append(onnx.helper.make_node("Det", ["logits"], ["hostile"], name="hostile"))
    path.write_bytes(model.SerializeToString())
    write_manifest(artifact, refresh_files(artifact, read_manifest(artifact)))
    with pytest.raises(FormatError, match="operator 'Det' of '' is not one of ours"):
        read_graph(artifact, "decoder", "portable")
