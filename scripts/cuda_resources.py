"""Print docs/cuda-kernels.md: registers, spills and shared memory of every CUDA kernel, as ptxas gives them out.

    scripts/cuda_resources.py [--architectures 80 90 90a] [--check] [FILE.cu ...]

Compiles the files, all of csrc/cuda without any, with warnings as errors. With --check it prints no table; with it or
without, the exit code is 1 if a kernel spills, needs memory of its own, or has more registers than LIMITS allows.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("80", "90", "90a")
FLAGS = ("-std=c++17", "-O3", "--Werror", "all-warnings", "--ptxas-options=-v")

# A multiprocessor has 65,536 registers: with 64 it holds 1024 threads, as many as keep memory busy.
LIMIT = 64
# By patterns of file and kernel, the first that fits, where more is right: products, which arithmetic bounds, keep
# tiles in registers; and what reads weights or a cache for several rows or queries at once keeps the sums of each.
LIMITS = {
    "gru: forward_step*": 80,
    "lstm: forward_step*": 80,
    "dense_linear: few_rows<*, 4>": 96,
    "dense_linear: few_rows<*, 8>": 127,
    "packed_linear: few_rows<*<4>, 8>": 249,
    "packed_linear: few_rows<*<8>, 8>": 167,
    "packed_linear: few_rows<*>": 128,
    "quantized_attention: attend<*, 1>": 96,
    "quantized_attention: attend<*, 4>": 249,
    "attention_forward: attend<*>": 128,
    "attention_backward: query_gradients<*>": 158,
    "attention_backward: key_gradients<*>": 156,
    "attention_backward: bias_gradients<*>": 164,
    "attention_mma_forward: attend<*>": 254,
    "attention_mma_backward: query_gradients<*>": 230,
    "attention_mma_backward: key_gradients<*>": 252,
    "attention_parts: part_of_keys<*, 1>": 128,
    "attention_parts: part_of_keys<*, 2>": 168,
    "attention_parts: part_of_keys<*, 4>": 219,
    "attention_parts: part_of_keys<*, 8>": 255,
}


class Kernel(NamedTuple):
    """What one kernel takes on one architecture.

    Attributes:
        file: the source, without its suffix.
        name: with template arguments.
        architecture: as "90".
        registers: of a thread.
        spilled: bytes of registers that a thread writes to memory and reads back.
        stack: bytes of memory that a thread has for itself.
        shared: bytes of a block, without what a launch adds.
    """

    file: str
    name: str
    architecture: str
    registers: int
    spilled: int
    stack: int
    shared: int


def compiled(file: Path, architectures: Sequence[str]) -> list[Kernel]:
    """Compile one file and return its kernels.

    Raises:
        RuntimeError: it does not compile without a warning; the message is the compiler's.
    """
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "nvcc",
            *FLAGS,
            *codes,
            f"-I{ROOT / 'csrc'}",
            '-DPORTLM_CUDA_ARCHITECTURES=""',
            "-c",
            str(file),
        ]
        command += ["-o", f"{folder}/kernels.o"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{file.name} does not compile:\n{done.stdout}{done.stderr}")
    return list(_read(file.stem, demangled(done.stdout + done.stderr)))


def demangled(text: str) -> str:
    """Return text with names as they are written in the sources."""
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


def _read(file: str, text: str) -> Iterable[Kernel]:
    entry = re.compile(
        r"Compiling entry function '(?P<name>[^\n]*)' for 'sm_(?P<arch>\w+)'"
        r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
        r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    for found in entry.finditer(text):
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        yield Kernel(
            file,
            plain(found["name"]),
            found["arch"],
            int(found["registers"]),
            int(found["stores"]) + int(found["loads"]),
            int(found["stack"]),
            int(shared[1]) if shared else 0,
        )


def plain(name: str) -> str:
    """Return a kernel's name without its result, namespaces and parameters: "rotate<float, 4>"."""
    name = re.sub(r"portlm::cuda::|_GLOBAL__N__\w+::|\(anonymous namespace\)::", "", name)
    name = name.replace("__nv_bfloat16", "bfloat16").removeprefix("void ")
    depth = 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            return name[:i]
    return name


def limit(kernel: Kernel) -> int:
    """Return how many registers a kernel may have."""
    name = f"{kernel.file}: {kernel.name}"
    return next((most for pattern, most in LIMITS.items() if fnmatchcase(name, pattern)), LIMIT)


def faults(kernels: Iterable[Kernel]) -> list[str]:
    """Return what is wrong with some of them, a line for each."""
    found = []
    for k in kernels:
        where = f"{k.file}.cu: {k.name} for sm_{k.architecture}"
        if k.spilled or k.stack:
            found.append(
                f"{where} has {k.stack} bytes of memory of its own and moves {k.spilled} bytes of registers there"
            )
        if k.registers > limit(k):
            found.append(f"{where} has {k.registers} registers, more than {limit(k)}")
    return found


def table(kernels: Sequence[Kernel], architectures: Sequence[str]) -> list[str]:
    """Return the lines of the table, a row for each kernel."""
    columns = [f"registers, sm_{a}" for a in architectures]
    lines = ["| file | kernel | " + " | ".join(columns) + " | spilled | shared memory |"]
    lines.append("| --- | --- |" + " ---: |" * (len(columns) + 2))
    rows: dict[tuple[str, str], dict[str, Kernel]] = {}
    for k in kernels:
        rows.setdefault((k.file, k.name), {})[k.architecture] = k
    for (file, name), found in sorted(rows.items()):
        registers = [str(found[a].registers) if a in found else "" for a in architectures]
        spilled, shared = (max(getattr(k, of) for k in found.values()) for of in ("spilled", "shared"))
        lines.append(f"| {file} | `{name}` | " + " | ".join(registers) + f" | {spilled} | {shared} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="CUDA sources (default: all of csrc/cuda)")
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES, help="(default: 80 90 90a)")
    parser.add_argument("--check", action="store_true", help="print what is wrong, and no table")
    options = parser.parse_args()
    if shutil.which("nvcc") is None:
        print("cuda_resources: there is no nvcc here", file=sys.stderr)
        return 2
    files = options.files or sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            parts = pool.map(lambda file: compiled(file, options.architectures), files)
            kernels = [kernel for part in parts for kernel in part]
    except RuntimeError as error:
        print(f"cuda_resources: {error}", file=sys.stderr)
        return 1
    if not options.check:
        print(HEAD)
        print("\n".join(table(kernels, options.architectures)))
    wrong = faults(kernels)
    for line in wrong:
        print(f"cuda_resources: {line}", file=sys.stderr)
    return 1 if wrong else 0


HEAD = """# CUDA kernels: what they take of a multiprocessor

Generated by `scripts/cuda_resources.py > docs/cuda-kernels.md`, which compiles every kernel and reads what ptxas
says. It fails, as `--check` does without the table, if a kernel's registers spill or are more than the script allows: a
multiprocessor has 65,536 registers and runs 2048 threads, so with up to 32 they all run at once, with 64 half of them.
"spilled" are bytes per thread that registers are moved to memory and back; "shared memory" is of a block, in bytes,
without what a launch adds. A name is that in the file; `<bfloat16, 8>` moves eight elements at once.
"""


if __name__ == "__main__":
    sys.exit(main())
