"""portlm engines: what an artifact holds, and who runs it here."""

import json
import shutil

import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

from portlm.compile.export import export


@pytest.fixture(scope="module")
def half(checkpoints, tmp_path_factory):
    return export(checkpoints["llama"], tmp_path_factory.mktemp("half") / "model", weights="bfloat16")


@pytest.mark.parametrize(
    ("kind", "weights", "cache", "line"),
    [
        ("plain", "float32", "float32", "weights float32, cache float32"),
        ("half", "bfloat16", "float32", "weights of 16 bits (bfloat16), computed with in float32"),
        ("int4", "int4", "float32", "weights of 4 bits in groups of 32, symmetric, round to nearest"),
        ("cache", "float32", "int8", "keys and values are kept in int8, each vector with a scale of its own"),
    ],
)
def test_it_says_what_weights_and_cache_are(
    kind, weights, cache, line, portlm, artifacts, half, quantized, byte_cache
):
    model = {"plain": artifacts["llama"], "half": half, "cache": byte_cache}.get(kind) or quantized(
        "llama", kind
    )
    outcome = portlm("engines", model)
    assert outcome.code == 0
    assert line in outcome.out
    assert f"weights {weights}, cache {cache}" in outcome.out
    found = json.loads(portlm("engines", model, "--json").out)
    assert (found["weights"], found["cache"]) == (weights, cache)
    assert (found["quantization"] or {}).get("bits") == (4 if kind == "int4" else None)
    assert found["model"]["family"] == "llama"


def test_it_lists_what_runs_and_what_was_measured_of_it(portlm, packed, tmp_path):
    model = shutil.copytree(packed["gpt2"], tmp_path / "model")
    assert "never" in portlm("engines", model).out
    assert portlm("verify", model, "-e", "packed", "--no-bisect").code == 0
    rows = {
        (row["engine"], row["profile"]): row["certificate"]
        for row in json.loads(portlm("engines", model, "--json").out)["engines"]
    }
    assert rows["packed", "fused"]["precision"] == "fp32"
    assert rows["packed", "fused"]["max_logit_error"] < 1e-3
    assert rows["torch", "native"] is None


def test_a_folder_that_is_no_artifact_is_named(portlm, checkpoints, tmp_path):
    outcome = portlm("engines", checkpoints["gpt2"])
    assert outcome.code == 1
    assert "this is a checkpoint, run portlm export" in outcome.error
    assert "there is no such folder" in portlm("engines", tmp_path / "nowhere").error
