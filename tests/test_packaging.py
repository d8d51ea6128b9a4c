"""What the package promises before any of it is used: light imports, one root, no pickles."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "onnx", "onnxruntime", "tvm", "matplotlib", "transformers")
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


TORCH_ENGINE = {"eager.py", "torch_plan.py", "torch_operators.py", "torch_graphs.py", "dequantized.py"}


@pytest.mark.parametrize(
    ("package", "may_import"),
    [
        ("runtimes", {"torch": TORCH_ENGINE, "onnx": set(), "portlm.compile": set()}),
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


# What is imported under another name than it is installed by.
IMPORT_NAMES = {
    "apache-tvm": "tvm", "apache-tvm-ffi": "tvm_ffi", "onnxruntime-ep-webgpu": "onnxruntime_ep_webgpu",
    "llama-cpp-python": "llama_cpp", "onnxruntime-genai": "onnxruntime_genai",
    "scikit-learn": "sklearn", "pillow": "PIL",
}  # fmt: skip
OPENED = {"wgpu"}  # whose library is opened without an import
FOR_TESTS = {"hf", "dev"}  # extras that no product file needs


def _declared() -> dict[str, set[str]]:
    """Import names by extra, "" for what is always installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return {
        extra: {
            IMPORT_NAMES.get(name, name)
            for name in (re.match(r"[\w-]+", requirement)[0] for requirement in requirements)
            if name != "portlm"
        }
        for extra, requirements in groups.items()
    }


def _imported() -> set[str]:
    """Top-level names of every foreign package that a product file imports, in functions too."""
    names = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"portlm"}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    declared = _declared()
    product = set().union(*(names for extra, names in declared.items() if extra not in FOR_TESTS))
    assert _imported() | OPENED == product


def test_every_pinned_version_is_of_something_declared():
    pins = {
        line.partition("==")[0]
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    requirements = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in project["project"]["optional-dependencies"].values():
        requirements += extra
    assert pins == {re.match(r"[\w-]+", requirement)[0] for requirement in requirements} - {"portlm"}


def test_the_extension_links_neither_pytorch_nor_tvm():
    from portlm import _C

    libraries = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"libtorch|libc10|libtvm", libraries)


@pytest.mark.parametrize(
    "isa", ["scalar", "avx2", "avx512", "avx512_vnni", "avx512_amx", "neon", "neon_dotprod"]
)
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
