import errno
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from portlm.artifact import check_files, read_manifest
from portlm.compile import export as export_module
from portlm.compile.export import export
from portlm.compile.graph import WeightFile
from portlm.errors import FormatError, StorageError, UsageError
from portlm.weights import load_numpy, save_tensors

NAMES = ("gpt2", "llama", "gpt2-erf", "gpt2-one-head", "llama-tied", "llama-one-kv-head")

# Logits reach 10 here; float32 rounding over a few layers leaves about 1e-5 of that. The promise to users is 1e-4.
TOLERANCE = 4e-5


@pytest.fixture
def checkpoint(checkpoints, tmp_path):
    return shutil.copytree(checkpoints["llama"], tmp_path / "checkpoint")


@pytest.mark.parametrize("name", NAMES)
def test_portable_graph_gives_the_logits_of_transformers(exported, ragged_error, ort_step, name):
    folder = exported[name]
    assert ragged_error(folder, ort_step(folder / "onnx" / "decoder.portable.onnx")) < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_portable_graph_gives_the_logits_of_transformers_on_vulkan(exported, ragged_error, ort_step, name):
    """Every node on the device: fallback to the CPU is disabled."""
    folder = exported[name]
    assert ragged_error(folder, ort_step(folder / "onnx" / "decoder.portable.onnx", "vulkan")) < TOLERANCE


def test_several_tokens_at_once_equal_single_steps(artifacts, ort_step):
    """On a filled cache, so that the causal mask and not only the padding is tested."""
    folder = artifacts["llama"]
    step = ort_step(folder / "onnx" / "decoder.portable.onnx")
    ids = np.arange(9)[None]
    empty = {s.name: np.zeros((1, 2, 0, 8), np.float32) for s in read_manifest(folder).roles["decoder"].state}

    def read(cuts):
        cache, start, parts = empty, 0, []
        for end in cuts:
            mask, positions = np.ones((1, end), np.int64), np.arange(start, end)[None]
            inputs = {"input_ids": ids[:, start:end], "position_ids": positions, "attention_mask": mask}
            inputs["logits_to_keep"] = np.arange(end - start)
            outputs = step(inputs | cache)
            cache = {name: outputs[name.replace("past_key_values", "present")] for name in cache}
            parts.append(outputs["logits"])
            start = end
        return np.concatenate(parts, axis=1)

    together, apart = read([2, 9]), read(range(1, 10))
    assert np.abs(together - apart).max() < TOLERANCE


def test_a_row_of_padding_alone_stays_finite(artifacts, ort_step):
    folder = artifacts["gpt2"]
    step = ort_step(folder / "onnx" / "decoder.portable.onnx")
    cache = {s.name: np.zeros((2, 4, 0, 8), np.float32) for s in read_manifest(folder).roles["decoder"].state}
    mask = np.array([[1, 1, 1], [0, 0, 0]])
    ids = np.zeros((2, 3), np.int64)
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
    outputs = step(inputs | {"logits_to_keep": np.arange(3)} | cache)
    assert np.isfinite(outputs["logits"]).all()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_artifact_is_complete_and_verifies(artifacts, checkpoints, family):
    folder = artifacts[family]
    manifest = check_files(folder)
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == {
        "manifest.json",
        *manifest.files,
    }
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (folder / name).read_bytes() == (checkpoints[family] / name).read_bytes()
    tensors = load_numpy(folder / "model.safetensors")
    assert manifest.model.parameters == sum(tensor.size for tensor in tensors.values())
    assert [s.output for s in manifest.roles["decoder"].state] == [
        f"present.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")
    ]


def test_export_needs_no_engine(checkpoints, tmp_path):
    code = (
        "import sys; from portlm.compile.export import export; export(sys.argv[1], sys.argv[2]); "
        "sys.exit(any(m in sys.modules for m in ('tvm', 'onnxruntime', 'transformers')))"
    )
    subprocess.run([sys.executable, "-c", code, checkpoints["gpt2"], tmp_path / "out"], check=True)


def test_one_profile_alone_can_be_exported(checkpoint, tmp_path):
    folder = export(checkpoint, tmp_path / "out", profiles=("portable",))
    assert set(read_manifest(folder).roles["decoder"].profiles) == {"portable"}
    assert not (folder / "onnx" / "decoder.fused.onnx").exists()


def test_artifact_is_replaced_and_other_folders_are_refused(checkpoint, tmp_path):
    out = export(checkpoint, tmp_path / "out")
    (out / "onnx" / "stale").write_text("from the export before")
    assert export(checkpoint, out) == out
    assert not (out / "onnx" / "stale").exists()

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="not empty and not an artifact"):
        export(checkpoint, precious)
    assert (precious / "thesis.tex").read_text() == "years of work"
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="not a folder"):
        export(checkpoint, tmp_path / "file")


@pytest.mark.parametrize("where", [".", "..", "../checkpoint"])
def test_export_over_its_own_checkpoint_is_refused(checkpoint, where):
    with pytest.raises(UsageError, match="holds the checkpoint itself"):
        export(checkpoint, checkpoint / where)
    assert (checkpoint / "model.safetensors").exists()


@pytest.mark.parametrize("previous", [False, True], ids=["nothing before", "artifact before"])
def test_failed_export_leaves_what_was_there(checkpoint, tmp_path, monkeypatch, previous):
    out = tmp_path / "out"
    if previous:
        export(checkpoint, out)
    before = (out / "manifest.json").read_bytes() if previous else None

    def full_disk(*_):
        raise StorageError("the disk is full")

    monkeypatch.setattr(export_module, "write_manifest", full_disk)
    with pytest.raises(StorageError):
        export(checkpoint, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", *(["out"] if previous else [])]
    if previous:
        assert (out / "manifest.json").read_bytes() == before
        check_files(out)


def test_full_disk_is_a_storage_error_and_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    def no_space(self, path, release):
        path.write_bytes(b"some of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(WeightFile, "write", no_space)
    with pytest.raises(
        StorageError, match=r"out cannot be written: No space left.*\d+ bytes are needed and \d+ are free"
    ):
        export(checkpoint, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_export_into_an_empty_folder_that_exists(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    check_files(export(checkpoint, tmp_path / "out"))


def test_unknown_profile_is_refused(checkpoint, tmp_path):
    with pytest.raises(UsageError, match="profiles must be among portable, fused, got fast"):
        export(checkpoint, tmp_path / "out", profiles=("fast",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type must be one of .*, got 'mamba'"),
        ({"model_type": ["gpt2"]}, "model_type must be one of"),
        ({"num_attention_heads": 5}, "width 32 must be a multiple of n_head 5"),
        ({"num_attention_heads": 0}, "n_head must be an integer from 1"),
        ({"num_key_value_heads": 3}, "n_head 4 must be a multiple of n_kv_head 3"),
        ({"num_key_value_heads": 0}, "n_kv_head must be an integer from 1"),
        ({"num_hidden_layers": 10**9}, "n_layer must be an integer from 1 to 1024"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be an integer"),
        ({"vocab_size": -1}, "vocab_size must be an integer from 1"),
        ({"max_position_embeddings": 2**63}, "context_length must be an integer"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a number from"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_scaling = .* is not supported"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": 2.0}},
            "rope_parameters = .* is not supported",
        ),
        ({"attention_bias": "yes"}, "attention_bias must be true or false"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map is not supported: it asks for code"),
        ({"sliding_window": 8}, "sliding_window = 8 is not supported"),
        ({"window_size": 8}, "'window_size' is a key portlm does not know"),
    ],
    ids=str,
)
def test_configuration_that_cannot_be_followed_is_refused(checkpoint, tmp_path, change, message):
    config = json.loads((checkpoint / "config.json").read_text()) | change
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=message):
        export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_that_do_not_fit_the_configuration_are_refused(checkpoint, tmp_path):
    path = checkpoint / "model.safetensors"
    tensors = {name: tensor.copy() for name, tensor in load_numpy(path).items()}
    name = "model.layers.0.mlp.up_proj.weight"
    for damaged, message in (
        ({n: t for n, t in tensors.items() if n != name}, f"tensor {name} of shape .* is missing"),
        (tensors | {"extra": np.zeros(1, np.float32)}, "tensor 'extra' of shape .* is unexpected"),
        (tensors | {name: tensors[name][:-1]}, f"{name} has shape"),
        (tensors | {name: tensors[name].astype(np.int32)}, f"{name} is I32, but must be F32 or F16"),
        (tensors | {name: tensors[name].astype(np.float64)}, f"{name} is F64, but must be F32 or F16"),
        (tensors | {name: tensors[name] * np.inf}, f"{name} holds NaN or infinity"),
    ):
        save_tensors(path, damaged, None)
        with pytest.raises(FormatError, match=message):
            export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_half_precision_checkpoint_is_widened_exactly(checkpoint, tmp_path):
    path = checkpoint / "model.safetensors"
    halves = {name: tensor.astype(np.float16) for name, tensor in load_numpy(path).items()}
    save_tensors(path, halves, None)
    folder = export(checkpoint, tmp_path / "half", weights="float32")
    save_tensors(path, {name: tensor.astype(np.float32) for name, tensor in halves.items()}, None)
    same = export(checkpoint, tmp_path / "single")
    data = "onnx/decoder.onnx.data"
    assert (folder / data).read_bytes() == (same / data).read_bytes()


def test_a_graph_records_where_it_comes_from(exported):
    found = read_manifest(exported["gpt2"]).roles["decoder"].provenance
    assert {"portlm", "torch", "onnx"} <= found.versions.keys()
    assert found.settings["opset"] == 20
    batch, sequence = found.traced["input_ids"]
    past = found.traced["past_key_values.0.key"][2]
    assert found.traced["attention_mask"] == (batch, past + sequence)
