"""Without the compiled extension: what works goes on, and what does not says what is missing and what builds it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from portlm import extension
from portlm.errors import EngineUnavailableError, ExtensionError

ROOT = Path(__file__).resolve().parent.parent.parent
ARTIFACT = ROOT / "tests" / "data" / "artifact-format-1"
MISSING = f"portlm's kernels (portlm._C) are not built, try pip install -e {ROOT}"
# An editable install finds the extension of its own tree for every package of the name.
WITHOUT_EDITABLE = "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'ditable' not in repr(f)]\n"


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Run Python with a view of the package that has no extension."""
    view = tmp_path_factory.mktemp("view")
    subprocess.run(["bash", ROOT / "scripts" / "package_view.sh", view / "package"], check=True)
    (view / "package" / "sitecustomize.py").write_text(WITHOUT_EDITABLE)
    folders = {"PYTHONPATH": str(view / "package"), "XDG_CACHE_HOME": str(view / "cache")}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, **folders},
            cwd=view,
        )

    return run


def test_the_view_has_no_extension_and_its_import_says_what_builds_it(bare):
    done = bare("-c", "import portlm\nprint('here')\nfrom portlm import _C")
    assert done.stdout == "here\n"
    assert done.stderr.splitlines()[-1] == f"portlm.errors.ExtensionError: {MISSING}"


def test_help_needs_no_extension(bare):
    done = bare("-m", "portlm", "--help")
    assert (done.returncode, done.stderr) == (0, "")


def test_doctor_says_of_every_engine_that_needs_it_what_builds_it(bare):
    done = bare("-m", "portlm", "doctor", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert any(MISSING in warning for warning in report["warnings"])
    for row in report["engines"]:
        if row["engine"] == "packed" or (row["engine"] == "tvm" and _has("tvm")):
            assert not row["available"]
            assert "not built" in row["reason"]
            assert row["command"] == f"pip install -e {ROOT}"


def _has(package):
    from importlib.util import find_spec

    return find_spec(package) is not None


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", ARTIFACT, "a", "--engine", "tvm"),
        ("generate", ARTIFACT, "a", "--engine", "packed"),
        ("bench", ARTIFACT, "--prompt", 4, "--tokens", 4),
        ("demo",),
    ],
    ids=["tvm", "packed", "bench", "demo"],
)
def test_what_needs_it_ends_with_one_line(arguments, bare):
    if "tvm" in arguments and not _has("tvm"):
        pytest.skip("apache-tvm is missing: pip install portlm[tvm]")
    done = bare("-m", "portlm", *arguments)
    assert done.returncode == 1
    assert done.stderr == f"portlm: error: {MISSING}\n"


def test_compiling_leaves_out_the_engines_that_need_it(bare, tmp_path):
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is missing: pip install portlm[onnx]")
    model = shutil.copytree(ARTIFACT, tmp_path / "model")
    done = bare("-m", "portlm", "compile", model)
    assert done.returncode == 0, done.stderr
    assert f"packed:cpu:fused left out: {MISSING}" in done.stderr
    assert "ort-cpu-fused" in done.stdout


@pytest.mark.parametrize("engine", ["torch", "ort", "auto"])
def test_engines_that_need_none_generate(engine, bare):
    package = {"torch": "torch", "ort": "onnxruntime", "auto": "onnxruntime"}[engine]
    if not _has(package):
        pytest.skip(f"{package} is missing")
    done = bare("-m", "portlm", "generate", ARTIFACT, "a", "--engine", engine, "--max-new-tokens", 3)
    assert done.returncode == 0, done.stderr


def test_training_says_why_it_is_slow_and_trains(bare, tmp_path):
    pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 200)
    size = ("--layers", 1, "--width", 16, "--heads", 1, "--context", 16, "--steps", 2)
    done = bare("-m", "portlm", "pretrain", tmp_path / "text.txt", "--out", tmp_path / "run", *size)
    assert done.returncode == 0, done.stderr
    assert f"training is slow: {MISSING}" in done.stderr
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_an_extension_that_cannot_be_loaded_says_why(monkeypatch):
    def broken(name):
        raise ImportError("_C.so: undefined symbol: GOMP_parallel", name=name)

    monkeypatch.setattr(extension.importlib, "import_module", broken)
    with pytest.raises(
        ExtensionError, match=r"cannot be loaded \(.*undefined symbol: GOMP_parallel\), try pip"
    ):
        extension.load_extension()


def test_an_installed_package_is_installed_again(tmp_path):
    assert extension.cure(tmp_path / "portlm" / "extension.py") == "pip install --force-reinstall portlm"


def test_the_error_is_what_either_kind_of_caller_expects():
    assert issubclass(ExtensionError, EngineUnavailableError)
    assert issubclass(ExtensionError, ImportError)
