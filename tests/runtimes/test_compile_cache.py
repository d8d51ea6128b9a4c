"""An artifact that was only exported runs everywhere: what an engine needs compiled is compiled at first use."""

import importlib.util
import os
import shutil
import stat
import subprocess
import sys

import pytest

from portlm.artifact import read_manifest
from portlm.compile.isolated import graph_of, weights_of
from portlm.errors import EngineUnavailableError, FormatError, UsageError
from portlm.flows import compile_cache
from portlm.flows.load import load
from portlm.seen_graphs import record_written
from portlm.trust import home

pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

TARGETS = [
    ("ort", "cpu", "auto", "fused"), ("ort", "vulkan", "auto", "fused"), ("tvm", "cpu", "auto", "fused"),
    ("tvm", "cpu", "portable", "portable"), ("auto", "auto", "fused", "fused"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def own_home(monkeypatch, tmp_path):
    monkeypatch.setenv("PORTLM_HOME", str(tmp_path / "home"))


@pytest.fixture
def artifact(artifacts, tmp_path):
    """One that was exported here, as the home that is new knows too."""
    folder = shutil.copytree(artifacts["gpt2"], tmp_path / "model")
    manifest = read_manifest(folder)
    for name in weights_of(manifest):
        record_written(graph_of(manifest, name))
    return folder


def open_session(*arguments):
    try:
        return load(*arguments)
    except EngineUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("engine", "device", "profile", "found"), TARGETS)
def test_an_exported_artifact_is_compiled_at_first_use_and_not_again(
    artifact, engine, device, profile, found, capsys
):
    before = sorted(artifact.rglob("*"))
    with load(artifact, "torch", "cpu") as session:
        expected = session.generate("hello", max_new_tokens=8).token_ids
    for count in (1, 0, 0):
        with open_session(artifact, engine, device, profile) as session:
            assert session.engine.profile == found
            assert session.generate("hello", max_new_tokens=8).token_ids == expected
        said = capsys.readouterr().err
        assert said.count("\n") == said.count("once on this machine") == count
    assert sorted(artifact.rglob("*")) == before


def test_an_artifact_from_elsewhere_is_checked_and_compiled_with_a_line_for_each(artifact, capsys):
    shutil.rmtree(home())
    for count in (1, 0):
        open_session(artifact, "ort").close()
        said = capsys.readouterr().err
        assert said.count("\n") == 2 * count
        assert (
            said.count(f"portlm: checking onnx/decoder.fused.onnx of {artifact}, which was made elsewhere")
            == count
        )
        assert said.count(f"portlm: compiling {artifact} for ort:cpu:fused, once on this machine") == count


def test_what_was_compiled_is_private_and_holds_no_weights(artifact):
    open_session(artifact, "tvm").close()
    root = home() / "compiled"
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    (entry,) = root.iterdir()
    assert not list(entry.rglob("*.data"))
    os.chmod(root, 0o755)  # noqa: PTH101
    with pytest.raises(FormatError, match="nobody else can enter"):
        load(artifact, "tvm")


def test_a_copy_of_an_artifact_shares_its_entry_and_another_model_does_not(artifact, artifacts, tmp_path):
    open_session(artifact, "ort").close()
    open_session(shutil.copytree(artifact, tmp_path / "copy"), "ort").close()
    assert len(list((home() / "compiled").iterdir())) == 1
    open_session(artifacts["llama"], "ort").close()
    assert len(list((home() / "compiled").iterdir())) == 2


def test_a_damaged_entry_is_made_again(artifact, capsys):
    open_session(artifact, "tvm").close()
    (library,) = (home() / "compiled").rglob("*.so")
    library.write_bytes(library.read_bytes()[:-1])
    capsys.readouterr()
    with load(artifact, "tvm") as session:
        assert session.generate("hello", max_new_tokens=2).new_tokens == 2
    assert "compiling" in capsys.readouterr().err


def test_a_compiler_that_fails_leaves_nothing_behind(artifact, monkeypatch):
    def fail(*arguments):
        raise FormatError("the compiler does not like it")

    monkeypatch.setattr("portlm.flows.compile_entry.build", fail)
    with pytest.raises(FormatError, match="does not like it"):
        load(artifact, "ort")
    assert list((home() / "compiled").iterdir()) == []


def test_without_onnx_the_portable_graph_runs_and_the_fused_one_names_the_package(artifact, monkeypatch):
    def fail(*arguments):
        raise ModuleNotFoundError("No module named 'onnx'", name="onnx")

    monkeypatch.setattr("portlm.flows.compile_entry.build", fail)
    with open_session(artifact, "ort") as session:
        assert session.engine.profile == "portable"
    with pytest.raises(EngineUnavailableError, match=r"compiling needs the package onnx, .*portlm\[onnx\]"):
        load(artifact, "ort", profile="fused")


def test_code_that_another_machine_compiled_is_compiled_anew(compiled, tmp_path, monkeypatch, capsys):
    if importlib.util.find_spec("tvm") is None:
        pytest.skip("TVM is missing: pip install portlm[tvm]")
    folder = shutil.copytree(compiled["gpt2"], tmp_path / "model")
    with load(
        folder, "tvm"
    ) as session:  # PORTLM_HOME is new: nothing in it says that these libraries are from here
        assert session.generate("hello", max_new_tokens=2).new_tokens == 2
    assert "compiling" in capsys.readouterr().err


def test_the_table_says_when_there_is_nothing_to_compile(artifacts, compiled):
    exported = read_manifest(artifacts["gpt2"])
    assert compile_cache.needed("ort", "cpu", "portable", exported) is None
    assert compile_cache.needed("ort", "cpu", "auto", read_manifest(compiled["gpt2"])) is None
    assert compile_cache.needed("ort", "cpu", "auto", exported) == "fused"
    with pytest.raises(UsageError, match="tvm has no profile native"):
        open_session(artifacts["gpt2"], "tvm", "cpu", "native")


def test_two_processes_may_compile_the_same_at_once(artifact):
    program = "import sys, portlm; print(portlm.load(sys.argv[1], 'ort').generate('hello', max_new_tokens=2).token_ids)"
    command = [sys.executable, "-c", program, str(artifact)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert answers[0] == answers[1] != ""
    assert len(list((home() / "compiled").iterdir())) == 1
