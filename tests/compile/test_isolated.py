"""Graphs from elsewhere are read in a child process first. What ends it here stands for a library that crashes."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

import portlm
from portlm import seen_graphs
from portlm.artifact import read_manifest, refresh_files, write_manifest
from portlm.compile import isolated, source
from portlm.compile.build import build
from portlm.compile.isolated import Job, check_isolated, ensure_checked, graph_of, weights_of
from portlm.errors import FormatError
from portlm.flows.verify import verify_artifact

PORTABLE, FUSED = "onnx/decoder.portable.onnx", "onnx/decoder.fused.onnx"
KILLED = ("-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")


@pytest.fixture
def artifact(artifacts, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(artifacts["llama"], tmp_path / "artifact")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The home of a user who has seen none of these graphs."""
    monkeypatch.setenv("PORTLM_HOME", str(tmp_path / "home"))


@pytest.fixture
def children(monkeypatch):
    """How many graphs were given to child processes, a number for each call."""
    counts = []
    real = check_isolated

    def counting(jobs):
        counts.append(len(jobs))
        return real(jobs)

    monkeypatch.setattr(isolated, "check_isolated", counting)
    return counts


def job(path):
    return Job(str(path), hashlib.sha256(path.read_bytes()).hexdigest(), 48)


def rewrite(artifact, change, name=PORTABLE):
    """Change a graph of an artifact as its maker could have, the manifest with it."""
    model = onnx.load(artifact / name, load_external_data=False)
    change(model.graph)
    (artifact / name).write_bytes(model.SerializeToString(deterministic=True))
    write_manifest(artifact, refresh_files(artifact, read_manifest(artifact), [name]))


def turn_a_weight(graph):
    """The same bytes with the other shape: a graph that says what cannot be computed, and harms nobody."""
    tensor = next(t for t in graph.initializer if t.external_data and len(set(t.dims)) == 2)
    tensor.dims[:] = reversed(tensor.dims)


# --- the child ------------------------------------------------------------------------------------------------


def test_what_export_and_lowering_write_passes_with_every_library(compiled, exported):
    folders = [*compiled.values(), *(folder for name, folder in exported.items() if name not in compiled)]
    paths = [folder / name for folder in folders for name in weights_of(read_manifest(folder))]
    assert len(paths) >= 2 * len(folders) + 2 * len(compiled)
    check_isolated([job(path) for path in paths])


@pytest.mark.parametrize("name", [PORTABLE, FUSED])
def test_a_graph_that_onnx_runtime_refuses_is_an_error_that_says_why(artifact, name):
    """Of nodes of ai.portlm, what they are lowered to is tried."""
    rewrite(artifact, turn_a_weight, name)
    with pytest.raises(FormatError, match=r"onnx: .*[Ii]ncompatible.*; export again from the checkpoint"):
        check_isolated([job(artifact / name)])


def test_a_child_that_dies_is_an_error_and_names_the_graph_that_it_died_of(artifact, monkeypatch):
    monkeypatch.setattr(isolated, "CHILD", KILLED)
    with pytest.raises(
        FormatError, match=r"decoder\.portable\.onnx: the process that checked it died \(-9\)"
    ):
        check_isolated([job(artifact / PORTABLE)])
    monkeypatch.setattr(isolated, "CHILD", ("-c", f"print('accepted', flush=True); {KILLED[1]}"))
    with pytest.raises(FormatError, match=r"decoder\.fused\.onnx: the process that checked it died \(-9\)"):
        check_isolated([job(artifact / PORTABLE), job(artifact / FUSED)])


def test_a_child_that_says_nothing_has_accepted_nothing(artifact, monkeypatch):
    monkeypatch.setattr(isolated, "CHILD", ("-c", "pass"))
    with pytest.raises(FormatError, match=r"died \(0\)"):
        check_isolated([job(artifact / PORTABLE)])


def test_a_child_that_hangs_is_stopped(artifact, monkeypatch):
    monkeypatch.setattr(isolated, "CHILD", ("-c", "import time; time.sleep(60)"))
    monkeypatch.setattr(isolated, "SECONDS", 0.2)
    with pytest.raises(FormatError, match=r"took more than 0\.2\d* s; do not use this file"):
        check_isolated([job(artifact / PORTABLE)])


def test_the_child_has_bounded_memory_and_leaves_no_core(artifact, monkeypatch):
    program = """
import resource
from portlm.compile import isolated

def read(job):
    raise ValueError(f"{resource.getrlimit(resource.RLIMIT_AS)} {resource.getrlimit(resource.RLIMIT_CORE)}")

isolated._read = read
isolated._main()
"""
    monkeypatch.setattr(isolated, "CHILD", ("-c", program))
    with pytest.raises(FormatError) as error:
        check_isolated([job(artifact / PORTABLE)])
    size = (artifact / "onnx/decoder.onnx.data").stat().st_size
    limit = int(str(error.value).partition("(")[2].partition(",")[0])
    assert 4 * 2**30 < limit <= 4 * 2**30 + 4 * size
    assert str(error.value).count(f"({limit}, {limit}) (0, 0)") == 1


def test_what_native_code_prints_is_no_answer(artifact, monkeypatch):
    program = """
import os
from portlm.compile import isolated

def read(job):
    os.write(1, b"accepted" + bytes([10]))
    raise ValueError("no")

isolated._read = read
isolated._main()
"""
    monkeypatch.setattr(isolated, "CHILD", ("-c", program))
    with pytest.raises(FormatError, match=r"onnx: no; export again"):
        check_isolated([job(artifact / PORTABLE)])


@pytest.mark.parametrize("module", ["onnx", "onnxruntime", "portlm"])
def test_the_child_imports_nothing_from_the_folder_that_the_user_is_in(
    artifact, tmp_path, monkeypatch, module
):
    """`python -m` would look there first, and an artifact has a folder called onnx."""
    trap = tmp_path / "trap"
    (trap / module).mkdir(parents=True)
    (trap / module / "__init__.py").write_text(f"open({str(trap / 'sprung')!r}, 'w')\n")
    monkeypatch.chdir(trap)
    check_isolated([job(artifact / PORTABLE)])
    assert not (trap / "sprung").exists()


def test_no_child_of_ours_looks_there():
    root, starting = Path(__file__).resolve().parents[2], set()
    for path in (
        path for folder in ("core", "compile", "runtimes") for path in (root / folder).rglob("*.py")
    ):
        text = path.read_text()
        assert '"-m"' not in text.replace('"-P", "-m"', ""), path
        if "sys.executable" in text:
            assert not re.search(r'sys\.executable,\s*"-[mc]"', text), path
            starting.add(path.name)
    assert {"isolated.py", "probe.py", "worker_process.py"} <= starting


def test_a_graph_that_is_not_the_one_that_was_asked_for_is_refused(artifact):
    wrong = job(artifact / PORTABLE)._replace(sha256="0" * 64)
    with pytest.raises(FormatError, match="altered while it was read"):
        check_isolated([wrong])
    task = json.dumps({"bytes": 2**33, "jobs": [wrong]})
    done = subprocess.run([sys.executable, *isolated.CHILD], input=task, capture_output=True, text=True)
    assert done.stdout == "refused: altered while it was read\n"


def test_structure_is_refused_before_there_is_a_child(artifact, monkeypatch):
    monkeypatch.setattr(isolated, "CHILD", KILLED)
    rewrite(artifact, lambda graph: graph.node[-1].input.append("input_ids"))
    with pytest.raises(FormatError, match=r"has \d inputs, \w+ has \d"):
        check_isolated([job(artifact / PORTABLE)])


# --- who is asked, and how often ------------------------------------------------------------------------------


def test_what_was_written_here_is_not_checked_again(compiled, children):
    for folder in compiled.values():
        ensure_checked(folder, read_manifest(folder), weights_of(read_manifest(folder)))
    assert children == []


def test_a_graph_from_elsewhere_is_checked_once_and_a_line_says_so(artifact, elsewhere, children, capsys):
    manifest = read_manifest(artifact)
    for _ in range(2):
        ensure_checked(artifact, manifest, [PORTABLE])
    assert children == [1]
    line = f"portlm: checking {PORTABLE} of {artifact}, which was made elsewhere, once on this machine\n"
    assert capsys.readouterr().err == line
    ensure_checked(artifact, manifest, [PORTABLE, FUSED])
    assert children == [1, 1]


def test_another_version_of_a_library_checks_again(artifact, elsewhere, children, monkeypatch):
    manifest = read_manifest(artifact)
    ensure_checked(artifact, manifest, [PORTABLE])
    real = seen_graphs.version
    for name in ("portlm", "onnx", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setattr(seen_graphs, "version", lambda n, name=name: "9" if n == name else real(n))
            ensure_checked(artifact, manifest, [PORTABLE])
            ensure_checked(artifact, manifest, [PORTABLE])
    assert children == [1, 1, 1, 1]


def test_the_same_graph_with_other_weights_is_another(artifact, elsewhere, children):
    ensure_checked(artifact, read_manifest(artifact), [PORTABLE])
    data = artifact / "onnx/decoder.onnx.data"
    data.write_bytes(bytes(4) + data.read_bytes()[4:])
    with pytest.raises(FormatError, match="altered"):
        portlm.load(artifact, "ort", profile="portable")
    write_manifest(artifact, refresh_files(artifact, read_manifest(artifact)))
    ensure_checked(artifact, read_manifest(artifact), [PORTABLE])
    assert children == [1, 1]


@pytest.mark.parametrize("mode", [0o755, 0o777], ids=oct)
def test_what_others_may_write_to_is_not_believed(artifact, elsewhere, children, tmp_path, mode):
    manifest = read_manifest(artifact)
    ensure_checked(artifact, manifest, [PORTABLE])
    (tmp_path / "home" / seen_graphs.FOLDER).chmod(mode)
    ensure_checked(artifact, manifest, [PORTABLE])
    assert children == [1, 1]


def test_without_a_place_to_remember_every_graph_is_checked_each_time(
    artifact, children, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PORTLM_HOME", str(tmp_path / "file" / "home"))
    for _ in range(2):
        portlm.load(artifact, "ort", profile="portable").close()
    assert children == [1, 1]


# --- no way around it -----------------------------------------------------------------------------------------


@pytest.fixture
def guarded(elsewhere, monkeypatch):
    """A machine on which reading these graphs kills, and a process that must not read them."""
    from portlm.runtimes import ort

    def asked(*arguments):
        pytest.fail("a library of this process was given a graph that nobody had checked")

    monkeypatch.setattr(isolated, "CHILD", KILLED)
    monkeypatch.setattr(ort, "open_session", asked)
    monkeypatch.setattr(source, "check_model", asked)


@pytest.mark.parametrize(
    "way",
    [
        lambda folder: portlm.load(folder, "ort", profile="portable"),
        lambda folder: portlm.load(folder, "ort", profile="fused"),
        lambda folder: portlm.load(folder, "tvm", profile="portable"),
        lambda folder: portlm.load(folder, "torch", profile="portable"),
        lambda folder: build(folder, [("ort", "cpu", "fused")]),
        lambda folder: build(folder, [("tvm", "cpu", "fused")]),
        lambda folder: build(folder, [("torch", "cpu", "portable")]),
        verify_artifact,
    ],
    ids=[
        "load portable",
        "load fused",
        "load tvm",
        "load plan",
        "compile ort",
        "compile tvm",
        "compile plan",
        "verify",
    ],
)
def test_a_graph_that_kills_its_reader_is_an_error_wherever_it_comes_in(artifact, guarded, way):
    with pytest.raises(FormatError, match=r"decoder\.\w+\.onnx: the process that checked it died \(-9\)"):
        way(artifact)


def test_a_lowered_graph_that_came_with_an_artifact_is_checked_as_well(compiled, guarded):
    with pytest.raises(FormatError, match=r"decoder\.ort-cpu-fused\.onnx: the process that checked it died"):
        portlm.load(compiled["llama"], "ort", profile="fused")


def test_what_is_lowered_from_elsewhere_is_tried_too(artifact, elsewhere, children):
    """In the artifact and in the cache of what is compiled at first use alike."""
    build(artifact, [("ort", "cpu", "fused")])
    assert children == [1, 2]  # the graph, and the two that are made of it
    for name in ("onnx/decoder.ort-cpu-fused.onnx", "onnx/decoder.ort-cpu-fused-even.onnx"):
        assert seen_graphs.may_be_read(graph_of(read_manifest(artifact), name))
        assert not seen_graphs.was_written(graph_of(read_manifest(artifact), name))
    portlm.load(artifact, "ort", profile="fused").close()
    assert children == [1, 2]
