"""`portlm export --quantize`: one clear line for what cannot be, and what it says of what it did."""

import json
import shutil

import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

from portlm.artifact import read_manifest, replace, write_manifest
from portlm.quantization import QuantizationCost


def test_export_says_what_the_weights_are_and_prints_the_path(portlm, divisible, tmp_path):
    outcome = portlm(
        "export", divisible["llama"], tmp_path / "out", "--quantize", "int4", "--group", 32, "--asymmetric"
    )
    assert outcome.code == 0
    assert outcome.out.strip() == str(tmp_path / "out")
    assert "export: weights of 4 bits in groups of 32, with zero points, round to nearest" in outcome.err
    assert read_manifest(tmp_path / "out").quantization.bits == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--group", 32), ("--group", "--quantize int8 or int4")),
        (("--asymmetric",), ("--asymmetric", "--quantize int8 or int4")),
        (("--quantize", "int3"), ("int3", "int8", "int4")),
        (("--quantize", "int4", "--group", 48), ("48", "32", "64", "128")),
        (("--quantize", "int4"), ("wte.weight", "96 inputs", "groups of 64", "choose 32")),
        (("--quantize", "int4", "--to", "hf"), ("--quantize", "--to hf")),
    ],
    ids=range(6),
)
def test_what_cannot_be_quantized_is_one_line(portlm, divisible, tmp_path, options, words):
    outcome = portlm("export", divisible["gpt2"], tmp_path / "out", *options)
    assert outcome.code == 2
    for word in words:
        assert word in outcome.error
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_artifact_is_no_checkpoint(portlm, quantized, tmp_path):
    outcome = portlm(
        "export", quantized("gpt2", "int4"), tmp_path / "out", "--quantize", "int8", "--group", 32
    )
    assert outcome.code == 2
    assert "artifact with quantized weights" in outcome.error
    assert "give its checkpoint" in outcome.error
    outcome = portlm("export", quantized("gpt2", "int4"), tmp_path / "out", "--to", "hf")
    assert outcome.code in (1, 2)
    assert list(tmp_path.iterdir()) == []


def test_compile_takes_activations_of_8_bits_where_weights_are_quantized(
    portlm, quantized, artifacts, tmp_path
):
    folder = shutil.copytree(quantized("gpt2", "int8"), tmp_path / "model")
    for asked, target in (("int8", "onnxruntime, accuracy level 4"), ("float32", "onnxruntime")):
        outcome = portlm("compile", folder, "--engine", "ort:cpu", "--activations", asked)
        assert outcome.code == 0
        assert [entry.target for entry in read_manifest(folder).compiled] == [target]
    outcome = portlm("compile", folder, "--engine", "packed", "--activations", "int8")
    assert outcome.code == 0
    assert read_manifest(folder).compiled[-1].target == "any, activations int8"
    outcome = portlm("compile", artifacts["gpt2"], "--engine", "ort:cpu", "--activations", "int8")
    assert outcome.code == 2
    assert "has float32 weights" in outcome.error
    assert "--quantize" in outcome.error


@pytest.mark.parametrize("target", ["tvm:cpu:portable", "torch:cpu:fused"])
def test_compile_says_who_can_have_activations_of_8_bits_where_the_chosen_cannot(
    portlm, quantized, tmp_path, target
):
    folder = shutil.copytree(quantized("gpt2", "int8"), tmp_path / "model")
    outcome = portlm("compile", folder, "--engine", target, "--activations", "int8")
    assert outcome.code == 2
    for words in (
        "nothing here rounds activations to 8 bits",
        "packed:cpu:fused",
        "tvm:cpu:fused",
        "ort:cpu:fused",
    ):
        assert words in outcome.error
    assert read_manifest(folder).compiled == ()


def test_rivals_are_not_given_quantized_weights(portlm, quantized):
    pytest.importorskip("transformers", reason="transformers is missing: pip install portlm[hf]")
    model = quantized("gpt2", "int4")
    outcome = portlm("bench", model, "--against", "transformers", "--prompt", 8, "-n", 4)
    assert outcome.code == 2
    assert "has quantized weights alone" in outcome.error
    assert "portlm export without --quantize" in outcome.error


def test_verify_says_what_quantizing_costs_where_that_was_measured(portlm, quantized, tmp_path):
    folder = shutil.copytree(quantized("gpt2", "int8"), tmp_path / "model")
    manifest = read_manifest(folder)
    cost = QuantizationCost(1000, 12.5, 12.6, 0.001, 0.975, "the end of a text")
    write_manifest(folder, replace(manifest, quantization=replace(manifest.quantization, cost=cost)))
    outcome = portlm("verify", folder, "-e", "torch:cpu:fused", "-e", "torch:cpu:portable", "--no-bisect")
    assert outcome.code == 0, outcome.err
    said = " ".join(outcome.out.split())
    assert "weights of 8 bits in groups of 32, symmetric" in said
    assert (
        "perplexity from 12.5 to 12.6, diverges by 0.001 nats a token and keeps 97.5% of the best guesses"
        in said
    )
    assert "torch:cpu fused: activations have 15 bits where they meet quantized weights" in said


def test_generate_says_the_precision_of_what_it_ran_on(portlm, quantized):
    outcome = portlm(
        "generate", quantized("gpt2", "int8"), "the", "--max-new-tokens", 2, "--engine", "torch", "--json"
    )
    assert outcome.code == 0
    assert json.loads(outcome.out)["precision"] == "a15"
