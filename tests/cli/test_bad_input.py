"""Bad input gives one clear line that names what, where and what to do, exit code 1 or 2, and loses nothing."""

import json
import shutil

import pytest

PRETRAIN = ("--steps", 4, "--layers", 1, "--heads", 1, "--width", 16, "--context", 16, "--batch", 2)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "missing.txt"), (b"", "empty"), (b"good text \xff\xfe more", "UTF-8")],
    ids=["missing", "empty", "non-UTF-8"],
)
@pytest.mark.parametrize("verb", ["pretrain", "tokenizer"])
def test_unusable_text_is_named(verb, content, words, portlm, tmp_path):
    path = tmp_path / ("missing.txt" if content is None else "text.txt")
    if content is not None:
        path.write_bytes(content)
    arguments = ("pretrain", path, "--out", tmp_path / "run", *PRETRAIN)
    if verb == "tokenizer":
        arguments = ("tokenizer", "train", path, "--out", tmp_path / "t")
    outcome = portlm(*arguments)
    assert outcome.code in (1, 2)
    assert words in outcome.error
    assert path.name in outcome.error


def test_a_vocabulary_larger_than_the_text_supports_names_both_numbers(portlm, text, tmp_path):
    outcome = portlm("tokenizer", "train", text, "--vocab-size", 50000, "--out", tmp_path / "t")
    assert outcome.code in (1, 2)
    assert "50000" in outcome.error.replace(",", "")
    assert not (tmp_path / "t").exists()


def test_a_prompt_longer_than_the_context_names_both_numbers(portlm, artifacts):
    outcome = portlm("generate", artifacts["gpt2"], "x" * 60, "--engine", "torch")
    assert outcome.code == 2
    assert "60" in outcome.error
    assert "48" in outcome.error


@pytest.mark.parametrize(
    ("option", "value"), [("--engine", "tensorrt"), ("--device", "tpu"), ("--profile", "fast")]
)
def test_an_unknown_choice_is_answered_with_the_known_ones(option, value, portlm, artifacts):
    outcome = portlm("generate", artifacts["gpt2"], "hello", option, value)
    assert outcome.code == 2
    assert value in outcome.error


def test_an_engine_that_is_not_installed_is_one_sentence_with_the_command(portlm, artifacts, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "onnxruntime" else real(name, *a)
    )
    outcome = portlm("generate", artifacts["gpt2"], "hello", "--engine", "ort")
    assert outcome.code == 1
    assert "pip install 'portlm[onnx]'" in outcome.error


DAMAGED = [
    "model.safetensors",
    "onnx/decoder.portable.onnx",
    "onnx/decoder.fused.onnx",
    "onnx/decoder.onnx.data",
    "tokenizer.json",
    "manifest.json",
]


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("damage", ["truncated", "bit flipped", "missing"])
def test_damage_is_noticed_before_anything_runs(name, damage, portlm, artifacts, tmp_path, monkeypatch):
    monkeypatch.setenv(
        "PORTLM_HOME", str(tmp_path / "home")
    )  # where nothing of this model was compiled before
    folder = tmp_path / "model"
    shutil.copytree(artifacts["gpt2"], folder)
    path = folder / name
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "bit flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    engine = "torch" if name == "model.safetensors" else "ort"
    profile = "portable" if "portable" in name else "auto"  # which takes the fused graph
    for arguments in (
        ("generate", folder, "hi", "--engine", engine, "--profile", profile, "--max-new-tokens", 1),
        ("verify", folder),
    ):
        if damage == "missing" and name == "manifest.json" and arguments[0] == "generate":
            continue  # without a manifest the folder is a plain checkpoint, which is another thing, not a damaged one
        outcome = portlm(*arguments)
        assert outcome.code in (1, 2), arguments
        assert path.name in outcome.error, outcome.error


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None], ids=["NaN", "infinity", "nothing"])
def test_verify_fails_where_the_stored_answer_is_no_number(bad, portlm, artifacts, tmp_path):
    """Also where the manifest lists that very file: no engine agrees with NaN, nor with an answer that is not there."""
    from portlm.artifact import read_manifest, refresh_files, write_manifest
    from portlm.compile.parity import REFERENCE
    from portlm.weights import load_numpy, save_tensors

    folder = shutil.copytree(artifacts["gpt2"], tmp_path / "model")
    engine = ("-e", "torch:cpu:native")
    assert portlm("verify", folder, *engine).code == 0
    tensors = {name: tensor.copy() for name, tensor in load_numpy(folder / REFERENCE).items()}
    if bad is None:
        tensors.clear()
    else:
        tensors["logits"][0, 0] = bad
    save_tensors(folder / REFERENCE, tensors, None)
    write_manifest(folder, refresh_files(folder, read_manifest(folder), [REFERENCE]))
    outcome = portlm("verify", folder, *engine)
    assert outcome.code == 1
    assert REFERENCE in outcome.out
    outcome = portlm("verify", folder, *engine, "--json", "--no-bisect")
    assert outcome.code == 1
    assert [REFERENCE in row["problem"] for row in json.loads(outcome.out)] == [True]


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/hostname", "onnx/../../outside.txt", "link.txt"])
def test_a_manifest_path_that_leaves_its_folder_is_refused(name, portlm, artifacts, tmp_path):
    from portlm.artifact import _digest

    folder = tmp_path / "model"
    shutil.copytree(artifacts["gpt2"], folder)
    (tmp_path / "outside.txt").write_text("secret")
    (folder / "link.txt").symlink_to(tmp_path / "outside.txt")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"size": 6, "sha256": "0" * 64}
    manifest.pop("sha256")
    manifest["sha256"] = _digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    outcome = portlm("verify", folder)
    assert outcome.code == 1
    assert name in outcome.error or "link.txt" in outcome.error
    assert "secret" not in outcome.err + outcome.out


def test_a_run_folder_that_is_in_use_is_not_overwritten(portlm, text, tmp_path):
    first = portlm("pretrain", text, "--out", tmp_path / "run", *PRETRAIN)
    assert first.code == 0, first.err
    weights = (tmp_path / "run" / "final" / "model.safetensors").read_bytes()
    second = portlm("pretrain", text, "--out", tmp_path / "run", "--resume", "none", *PRETRAIN)
    assert second.code == 2
    assert "--resume auto" in second.error
    assert (tmp_path / "run" / "final" / "model.safetensors").read_bytes() == weights


def test_a_loss_that_is_not_a_number_stops_with_the_step_named(portlm, text, tmp_path):
    outcome = portlm(
        "pretrain", text, "--out", tmp_path / "run", *PRETRAIN, "--set", "optimizer.lr=1e30", "--set",
        "optimizer.clip=0", "--set", "steps=40", "--checkpoint-interval", 1,
    )  # fmt: skip
    assert outcome.code == 1
    assert "step" in outcome.error
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_a_demo_folder_with_other_files_is_left_alone(portlm, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    outcome = portlm("demo", "--out", tmp_path)
    assert outcome.code == 2
    assert (tmp_path / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize(
    "words", [("generate", "a", "--engine", "ort"), ("verify",), ("compile",)], ids=" ".join
)
def test_a_graph_that_kills_its_reader_is_one_line(portlm, artifacts, tmp_path, monkeypatch, words):
    """A child process dies in place of the command."""
    from portlm.compile import isolated

    monkeypatch.setenv("PORTLM_HOME", str(tmp_path / "of somebody else"))
    monkeypatch.setattr(isolated, "CHILD", ("-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    copy = shutil.copytree(artifacts["gpt2"], tmp_path / "artifact")
    outcome = portlm(words[0], str(copy), *words[1:])
    assert outcome.code == 1
    assert outcome.error.endswith("the process that checked it died (-9); do not use this file")
