"""What the package promises before any of it is used: light imports, one root, no pickles."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "onnx", "onnxruntime", "tvm", "matplotlib", "transformers", "numba")
SOURCES = sorted(path for folder in ("core", "compile", "runtimes") for path in (ROOT / folder).rglob("*.py"))


def _modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import portlm",
        "import portlm.runtimes",
        "import portlm.ops.token_selection",
        "import portlm.tokenizer",
        "import portlm.artifact",
        "import portlm.cli\ntry: portlm.cli.main(['--help'])\nexcept SystemExit: pass",
    ],
)
def test_importing_what_everyone_imports_loads_nothing_heavy(statement):
    assert not _modules_after(statement).intersection(HEAVY)


@pytest.mark.parametrize("name", ["compile", "runtimes"])
def test_no_folder_in_core_shadows_a_subpackage(name):
    assert not (ROOT / "core" / name).exists()


def test_nothing_reads_or_writes_pickles():
    forbidden = re.compile(r"\bimport pickle\b|\btorch\.(load|save)\(|allow_pickle=True|\bmarshal\b")
    offenders = [str(path) for path in SOURCES if forbidden.search(path.read_text())]
    assert not offenders


@pytest.mark.parametrize(
    ("package", "may_import"),
    [
        ("runtimes", {"torch": {"eager.py"}, "onnx": set(), "portlm.compile": set()}),
        ("core/ops", {"onnx": set()}),
    ],
)
def test_packages_import_only_downwards(package, may_import):
    for path in (ROOT / package).rglob("*.py"):
        text = path.read_text()
        for module, exceptions in may_import.items():
            pattern = rf"^\s*(import|from) {re.escape(module)}(\.|\s|$)"
            if path.name not in exceptions and path.name != "registry.py":
                assert not re.search(pattern, text, re.MULTILINE), f"{path} imports {module}"


def test_the_extension_links_neither_pytorch_nor_tvm():
    from portlm import _C

    libraries = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"libtorch|libc10|libtvm", libraries)


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "neon"])
def test_one_environment_variable_forces_the_instruction_set(isa):
    from portlm import _C

    if isa not in _C.usable_isas():
        pytest.skip(f"this machine or build has no {isa}")
    code = "from portlm import _C; print(_C.isa())"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={"PORTLM_ISA": isa, "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == isa


def test_an_unknown_instruction_set_is_refused_by_name():
    result = subprocess.run(
        [sys.executable, "-c", "from portlm import _C"],
        env={"PORTLM_ISA": "mmx", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "PORTLM_ISA=mmx cannot run here: choose one of scalar" in result.stderr
