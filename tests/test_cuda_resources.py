"""scripts/cuda_resources.py reads what ptxas says of kernels, and finds those that spill or have too many registers."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"
PAGE = ROOT / "docs" / "cuda-kernels.md"

spec = importlib.util.spec_from_file_location("cuda_resources", ROOT / "scripts" / "cuda_resources.py")
resources = importlib.util.module_from_spec(spec)
spec.loader.exec_module(resources)

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")

SAID = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'void portlm::cuda::_GLOBAL__N__8_x_1::f<__nv_bfloat16, 8>(float*)' for 'sm_80'
ptxas info    : Function properties for f
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 65 registers, used 1 barriers, 4224 bytes smem
ptxas info    : Compile time = 3.1 ms
ptxas info    : Compiling entry function 'portlm::cuda::(anonymous namespace)::g(long)' for 'sm_90a'
ptxas info    : Function properties for g
    24 bytes stack frame, 16 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
"""


def test_what_ptxas_says_is_read_and_what_is_too_much_is_named():
    f, g = resources._read("file", SAID)
    assert f == ("file", "f<bfloat16, 8>", "80", 65, 0, 0, 4224)
    assert g == ("file", "g", "90a", 12, 24, 24, 0)
    assert resources.faults([f, g]) == [
        "file.cu: f<bfloat16, 8> for sm_80 has 65 registers, more than 64",
        "file.cu: g for sm_90a has 24 bytes of memory of its own and moves 24 bytes of registers there",
    ]
    assert resources.table([f, g], ["80", "90a"])[2:] == [
        "| file | `f<bfloat16, 8>` | 65 |  | 0 | 4224 |",
        "| file | `g` |  | 12 | 24 | 0 |",
    ]


def test_the_documented_table_has_every_file_and_nothing_that_is_too_much():
    """That it is of these very sources is seen by whoever writes it again: compiling all of them takes minutes."""
    rows = re.findall(r"^\| (\w+) \| `(.+)` \| ([\d |]+) \|$", PAGE.read_text(), re.MULTILINE)
    sources = {file.stem for file in CUDA.glob("*.cu") if "__global__" in file.read_text() + included(file)}
    assert {file for file, _, _ in rows} == sources
    for file, name, numbers in rows:
        *registers, spilled, shared = (int(n) for n in numbers.split(" | "))
        assert len(registers) == len(resources.ARCHITECTURES)
        found = (
            resources.Kernel(file, name, architecture, used, spilled, 0, shared)
            for architecture, used in zip(resources.ARCHITECTURES, registers, strict=True)
        )
        assert resources.faults(found) == []


def included(file: Path) -> str:
    """The headers of csrc/cuda that a file includes, but the one that all do."""
    names = re.findall(r'#include "cuda/(\w+\.cuh)"', file.read_text())
    return "".join((CUDA / name).read_text() for name in names if name != "common.cuh")


@needs_nvcc
def test_kernels_compile_without_a_warning_and_keep_within_their_registers():
    kernels = resources.compiled(CUDA / "swiglu.cu", ["90"])
    assert {k.name for k in kernels} >= {"forward<float, 4>", "backward<bfloat16, 8>"}
    assert resources.faults(kernels) == []


@needs_nvcc
def test_a_kernel_with_memory_of_its_own_and_a_warning_are_seen(tmp_path):
    source = tmp_path / "spills.cu"
    source.write_text(
        "__global__ void spills(int* x, int n) {\n  int a[64];\n  for (int i = 0; i < 64; ++i) a[i] = i * x[i];\n"
        "  for (int i = 0; i < n; ++i) a[x[i] & 63] += x[64 + i];\n  x[0] = a[n & 63];\n}\n"
    )
    (fault,) = resources.faults(resources.compiled(source, ["90"]))
    assert "spills.cu: spills for sm_90 has 256 bytes of memory of its own" in fault
    source.write_text("__global__ void warns(int* x) {\n  int unused;\n  x[0] = 1;\n}\n")
    with pytest.raises(RuntimeError, match="unused"):
        resources.compiled(source, ["90"])
