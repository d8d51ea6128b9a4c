"""Objects of two instruction sets share no symbol: the linker would keep one copy, and it may be the wider one's."""

import shutil
import subprocess
from collections import defaultdict
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECK = ROOT / "csrc" / "cpu" / "check_symbols.cmake"

KERNEL = "namespace portlm::avx2 {{ {inside} int kernel(int n) {{ return {call}; }} }}"


def tools(*names):
    """Return the paths of some programs, or skip the test."""
    found = [shutil.which(name) for name in names]
    if missing := [name for name, path in zip(names, found, strict=True) if path is None]:
        pytest.skip(f"{missing[0]} is needed to look at object files, and is not installed")
    return found


@pytest.mark.parametrize(
    ("before", "inside", "call", "passes"),
    [
        ("", "__attribute__((noinline)) inline int twice(int n) { return 2 * n; }", "twice(n)", True),
        ("__attribute__((noinline)) inline int twice(int n) { return 2 * n; }", "", "twice(n)", False),
        ("template <int N> __attribute__((noinline)) int times(int n) { return N * n; }", "", "times<3>(n)", False),
        ("inline int counter = 1;", "", "counter += n", False),
    ],
    ids=["own namespace", "inline function", "template", "inline variable"],
)  # fmt: skip
def test_the_build_refuses_a_symbol_that_another_instruction_set_could_define(
    tmp_path, before, inside, call, passes
):
    compiler, nm, cmake = tools("g++", "nm", "cmake")
    source, objects = tmp_path / "kernel.cpp", tmp_path / "kernel.o"
    source.write_text(before + "\n" + KERNEL.format(inside=inside, call=call))
    subprocess.run([compiler, "-std=c++17", "-O3", "-c", str(source), "-o", str(objects)], check=True)
    done = subprocess.run(
        [cmake, f"-DNM={nm}", "-DISA=avx2", f"-DOBJECTS={objects}", "-P", str(CHECK)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode == 0) == passes, done.stderr
    if not passes:
        assert "avx2 define symbols that other instruction sets share" in done.stderr


def is_release(cache):
    """Say whether a build is one for other machines: without optimisation every std::min is a shared symbol."""
    return "CMAKE_BUILD_TYPE:STRING=Release\n" in cache and "PORTLM_SANITIZE:BOOL=ON" not in cache


def defined(nm, objects):
    """Return the symbols that object files define and the linker compares by name."""
    lines = subprocess.run(
        [nm, "--defined-only", "--extern-only", "--format=posix", *map(str, objects)],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    # DW.ref.* is the address of the routine that unwinds the stack: data, and the same in every object.
    return {line.split()[0] for line in lines if " " in line and not line.startswith("DW.ref.")}


def test_no_symbol_of_the_built_objects_belongs_to_two_instruction_sets():
    """TVM's functions, the dispatch table and the bindings are compiled for any processor, and count as one more."""
    builds = [path.parents[1] for path in ROOT.glob("build/cmake*/CMakeFiles/portlm_cpu_scalar.dir")]
    optimised = [build for build in builds if is_release((build / "CMakeCache.txt").read_text())]
    if not optimised:
        pytest.skip("there are no object files of a release here: this is no checkout that built the kernels")
    (nm,) = tools("nm")
    for build in optimised:
        groups = defaultdict(list)
        for path in build.glob("CMakeFiles/*.dir/**/*.o"):
            group = path.relative_to(build / "CMakeFiles").parts[0].removesuffix(".dir")
            groups[group if group.startswith("portlm_cpu_") else "any processor"].append(path)
        symbols = {group: defined(nm, objects) for group, objects in groups.items()}
        assert len(symbols) >= 3, "scalar, at least one other set, and what is compiled for any processor"
        assert all(symbols.values())
        shared = {pair: symbols[pair[0]] & symbols[pair[1]] for pair in combinations(sorted(symbols), 2)}
        assert {pair: names for pair, names in shared.items() if names} == {}
