"""What a session reads of a folder is compared with the manifest first, and damage is named."""

import json
import shutil

import pytest
from engine_cases import needs_ort

from portlm.artifact import read_manifest, refresh_files, replace, write_manifest
from portlm.errors import (
    FormatError,
    UsageError,
)
from portlm.flows.load import load


@pytest.fixture
def artifact(artifacts, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(artifacts["gpt2"], tmp_path / "model")


@needs_ort
@pytest.mark.parametrize(
    ("engine", "name"),
    [
        ("ort", "onnx/decoder.portable.onnx"), ("ort", "onnx/decoder.onnx.data"), ("ort", "tokenizer.json"),
        ("ort", "generation_config.json"), ("torch", "model.safetensors"), ("torch", "config.json"),
        ("null", "tokenizer.json"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("damage", ["altered", "truncated", "missing"])
def test_a_damaged_file_is_found_before_it_is_used(artifact, engine, name, damage):
    path = artifact / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
    profile = "portable" if engine == "ort" else "auto"
    with pytest.raises(FormatError, match=f"{path.name}.*{damage}"):
        load(artifact, engine, profile=profile)


def test_what_is_read_of_config_json_is_compared_with_the_manifest(artifact):
    """It may name the class of the tokenizer and, without generation_config.json, say how text is made."""
    content = (artifact / "config.json").read_text()
    (artifact / "config.json").write_text(content + " ")
    with pytest.raises(FormatError, match=r"config\.json: altered"):
        load(artifact, "null")
    (artifact / "config.json").write_text(content)
    manifest = read_manifest(artifact)
    (artifact / "generation_config.json").unlink()
    files = {name: entry for name, entry in manifest.files.items() if name != "generation_config.json"}
    write_manifest(artifact, replace(manifest, files=files))
    load(artifact, "null").close()
    content = json.loads((artifact / "config.json").read_text())
    (artifact / "config.json").write_text(json.dumps({**content, "temperature": 2.0, "do_sample": True}))
    with pytest.raises(FormatError, match=r"config\.json"):
        load(artifact, "null")


TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@pytest.mark.parametrize("name", TEXT_FILES)
@pytest.mark.parametrize("damage", ["altered", "truncated", "missing"])
def test_every_file_that_a_session_reads_is_compared_with_the_manifest(artifact, name, damage):
    path = artifact / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":  # what is written is valid JSON
        path.write_bytes(content + b" " if damage == "altered" else b"{}")
    with pytest.raises(FormatError, match=f"{name}: {damage}"):
        load(artifact, "null")


@pytest.mark.parametrize("name", TEXT_FILES)
@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_file_that_would_be_used_and_is_not_listed_is_refused(artifact, tmp_path, name, kind):
    manifest = read_manifest(artifact)
    files = {other: entry for other, entry in manifest.files.items() if other != name}
    write_manifest(artifact, replace(manifest, files=files))
    if kind == "link":
        (artifact / name).rename(tmp_path / name)
        (artifact / name).symlink_to(tmp_path / name)
    with pytest.raises(FormatError, match=f"{name} is not in the manifest; export again"):
        load(artifact, "null")
    (artifact / name).unlink()
    with load(artifact, "null") as session:  # without it, as if it had never been there
        assert session.generate([[1, 2]], max_new_tokens=2)[0].new_tokens == 2


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer_config.json", "README.md"])
def test_an_artifact_that_a_model_is_taken_from_again_is_compared_with_its_manifest(artifact, tmp_path, name):
    pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")
    from portlm.compile.export import export
    from portlm.hub import export_hf, import_hf

    (artifact / "README.md").write_text("its licence")
    write_manifest(artifact, refresh_files(artifact, read_manifest(artifact), ["README.md"]))
    path = artifact / name
    content = path.read_bytes()
    path.write_bytes(content + b" ")
    for again in (export, export_hf, import_hf):
        with pytest.raises(FormatError, match=f"{name}: altered"):
            again(artifact, tmp_path / "out")
    path.write_bytes(content)
    (artifact / "chat_template.jinja").write_text("its user put this here")
    export(artifact, tmp_path / "out")
    assert "chat_template.jinja" in read_manifest(tmp_path / "out").files


def test_bench_compares_the_graph_that_it_counts_in_with_the_manifest(artifact):
    pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")
    from portlm.compile.work import token_work

    token_work(artifact, read_manifest(artifact))
    graph = artifact / "onnx/decoder.portable.onnx"
    graph.write_bytes(graph.read_bytes() + b"\x32\x00")
    with pytest.raises(FormatError, match=r"decoder\.portable\.onnx: altered"):
        token_work(artifact, read_manifest(artifact))
    with pytest.raises(FormatError, match="the manifest has no graph of a decoder"):
        token_work(artifact, replace(read_manifest(artifact), roles={}))


@needs_ort
def test_a_file_that_is_not_used_may_be_damaged(artifact):
    (artifact / "model.safetensors").unlink()
    with load(artifact, "ort") as session:
        assert session.generate("hello", max_new_tokens=2).new_tokens == 2


def test_a_damaged_manifest_is_an_error(artifact):
    text = (artifact / "manifest.json").read_text()
    (artifact / "manifest.json").write_text(text.replace('"vocab_size": 257', '"vocab_size": 258'))
    with pytest.raises(FormatError, match=r"manifest\.json"):
        load(artifact, "null")


def test_a_folder_that_is_no_model_is_an_error(tmp_path):
    with pytest.raises(FormatError, match="no such folder"):
        load(tmp_path / "nothing", "null")
    with pytest.raises(FormatError, match=r"neither manifest\.json nor config\.json"):
        load(tmp_path, "null")
    (tmp_path / "file").write_text("")
    with pytest.raises(FormatError, match="is a file: give the folder that holds it"):
        load(tmp_path / "file", "null")


@pytest.mark.parametrize(
    "path", [None, 5, b"model", ["model"], object()], ids=lambda path: type(path).__name__
)
def test_a_folder_of_another_type_is_an_error(path):
    with pytest.raises(UsageError, match="the folder of a model must be a str or a Path"):
        load(path, "null")


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", ""], ids=["long", "null", "empty"])
def test_a_folder_that_cannot_be_is_an_error(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FormatError):
        load(path, "null")


@pytest.mark.parametrize("config", ["[]", '{"vocab_size": 0, "n_positions": 8}', '{"vocab_size": 300}'])
def test_sizes_that_cannot_be_are_an_error(checkpoints, tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    shutil.copy(checkpoints["gpt2"] / "tokenizer.json", tmp_path)
    with pytest.raises(FormatError, match=r"config\.json"):
        load(tmp_path, "null")


@needs_ort
@pytest.mark.parametrize(
    "content",
    [b"", b"\x08\x08", b"\x08\x08 this is no graph", b"\x08\x08\x3a\x80", b"\x08\x08\x3a\x05 cut"],
    ids=["empty", "version", "words", "endless", "cut"],
)
def test_a_file_that_is_no_graph_is_an_error_that_names_it(artifact, content):
    path = artifact / "onnx/decoder.portable.onnx"
    path.write_bytes(content)
    from portlm.artifact import refresh_files

    write_manifest(artifact, refresh_files(artifact, read_manifest(artifact)))
    with pytest.raises(FormatError, match=r"decoder\.portable\.onnx: .*; export again"):
        load(artifact, "ort", profile="portable")
