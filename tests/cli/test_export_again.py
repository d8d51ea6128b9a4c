"""What an artifact says of its numbers, when it is exported or compiled again and nothing else is asked for."""

import shutil

import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

from portlm.artifact import half_weights, read_manifest, replace
from portlm.compile.export import export
from portlm.errors import UsageError
from portlm.flows.compile_cache import find_or_build
from portlm.models import WEIGHTS
from portlm.ort_support import ROUNDED_TARGET
from portlm.quantization import BYTES, at_activations, takes_bytes
from portlm.weights import read_header

KEPT = "keys and values are kept in int8"


def states(folder):
    return {state.dtype for state in read_manifest(folder).roles["decoder"].state}


def test_a_cache_of_8_bits_is_kept_until_float32_is_asked_for(portlm, checkpoints, tmp_path):
    first, again, back = tmp_path / "first", tmp_path / "again", tmp_path / "back"
    assert portlm("export", checkpoints["llama"], first, "--cache", "int8").code == 0
    outcome = portlm("export", first, again)
    assert outcome.code == 0
    assert KEPT in outcome.err
    assert read_manifest(again) == read_manifest(first)
    outcome = portlm("export", again, back, "--cache", "float32")
    assert outcome.code == 0
    assert KEPT not in outcome.err
    assert (read_manifest(back).cache, states(back)) == (None, {"float32"})
    assert states(again) == {"int8", "float32"}


def test_a_cache_is_kept_beside_weights_that_become_other_ones(byte_cache, tmp_path):
    folder = export(byte_cache, tmp_path / "half", weights="bfloat16")
    assert (read_manifest(folder).cache.kind, half_weights(read_manifest(folder))) == ("int8", ("bfloat16",))


def test_a_cache_of_floats_may_be_said_of_any_model(checkpoints, tmp_path):
    assert read_manifest(export(checkpoints["gpt2"], tmp_path / "out", cache="float32")).cache is None
    with pytest.raises(UsageError, match="cache must be float32 or int8, got 'int4'"):
        export(checkpoints["gpt2"], tmp_path / "other", cache="int4")


def test_what_a_cache_costs_is_measured_where_an_artifact_brings_it(
    portlm, byte_cache, checkpoints, tmp_path
):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 100)
    outcome = portlm("export", byte_cache, tmp_path / "out", "--calibrate", text)
    assert outcome.code == 0, outcome.err
    assert read_manifest(tmp_path / "out").cache.cost.tokens > 100
    outcome = portlm("export", checkpoints["llama"], tmp_path / "other", "--calibrate", text)
    assert outcome.code == 2
    assert "say int8 or int4 as well, or a cache of int8" in outcome.error


def test_graphs_that_were_widened_stay_so(checkpoints, tmp_path):
    """The checkpoint in the artifact still has 16 bits."""
    half = export(checkpoints["llama"], tmp_path / "half", weights="bfloat16")
    wide = export(half, tmp_path / "wide", weights="float32")
    assert "BF16" in {info.dtype for info in read_header(wide / WEIGHTS).values()}
    assert half_weights(read_manifest(export(wide, tmp_path / "again"))) == ()
    assert half_weights(read_manifest(export(half, tmp_path / "same"))) == ("bfloat16",)
    assert half_weights(read_manifest(export(wide, tmp_path / "back", weights="bfloat16"))) == ("bfloat16",)


@pytest.mark.parametrize("engine", ["packed", "ort:cpu"])
def test_activations_of_8_bits_are_kept_until_others_are_asked_for(portlm, quantized, tmp_path, engine):
    folder = shutil.copytree(quantized("gpt2", "int8"), tmp_path / "model")
    said = "fused keeps activations of 8 bits: --activations float32 goes back"

    def compiled(*options):
        outcome = portlm("compile", folder, "--engine", engine, *options)
        assert outcome.code == 0
        (entry,) = read_manifest(folder).compiled
        return takes_bytes(entry.target), said in outcome.err

    assert compiled() == (False, False)
    assert compiled("--activations", "int8") == (True, False)
    assert compiled() == (True, True)
    assert compiled("--activations", "float32") == (False, False)
    assert compiled() == (False, False)


def test_the_environment_asks_too(portlm, quantized, tmp_path, monkeypatch):
    folder = shutil.copytree(quantized("gpt2", "int8"), tmp_path / "model")
    for asked, expected in (("int8", True), ("float32", False)):
        monkeypatch.setenv("PORTLM_ACTIVATIONS", asked)
        assert portlm("compile", folder, "--engine", "packed").code == 0
        assert takes_bytes(read_manifest(folder).compiled[0].target) == expected


def test_code_of_another_machine_is_compiled_here_for_the_same_activations(quantized, tmp_path, monkeypatch):
    monkeypatch.setenv("PORTLM_HOME", str(tmp_path))
    folder, key = quantized("gpt2", "int8"), ("packed", "cpu", "fused")
    manifest = read_manifest(folder)
    with at_activations(BYTES):
        entry = find_or_build(folder, manifest, key, lambda: None).manifest.compiled[0]
    theirs = replace(manifest, compiled=(replace(entry, target="llvm elsewhere, activations int8"),))
    found = find_or_build(folder, theirs, key, lambda: None)
    assert takes_bytes(found.manifest.compiled[0].target)
    assert not takes_bytes(find_or_build(folder, manifest, key, lambda: None).manifest.compiled[0].target)


def test_onnx_runtimes_word_for_activations_of_8_bits_is_known():
    assert takes_bytes(ROUNDED_TARGET)
    assert not takes_bytes("onnxruntime")
