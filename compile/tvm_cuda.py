"""Graphs on CUDA: the kernels that TVM makes for GPUs, or ours in its code, as machine code made by nvcc.

They are those of compile/tvm_vulkan.py, in another language. TVM's library holds their source, and machine code lies
beside it: one cubin for each architecture. So nothing is compiled where it is loaded, and what was asked for is what
is there. No GPU is needed.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from portlm import tvm_cuda
from portlm.compile.tvm_build import Graph, Kernels, Lowering
from portlm.compile.tvm_gpu_fused import in_panels, lower
from portlm.compile.tvm_gpu_portable import plain_casts, trust_indices
from portlm.compile.tvm_gpu_schedule import gpu_passes
from portlm.compile.tvm_portable import bound_gathers, import_graph
from portlm.errors import EngineUnavailableError, FormatError
from portlm.tvm_support import cubin_name

_SOURCE_ONLY = "TVM_COMPILE_FORCE_FALLBACK"  # TVM's: leave kernels as source, also where its runtime is


def readable(graph: Graph) -> Graph:
    """The graph as it is.

    Raises:
        FormatError: it has quantized weights.
    """
    if graph.packed:
        raise FormatError("tvm:cuda has no portable form for quantized weights: compile --profile fused")
    return graph


@contextmanager
def source_only() -> Iterator[None]:
    """Have TVM keep CUDA's source inside the block, on machines with a GPU, too."""
    before = os.environ.get(_SOURCE_ONLY)
    os.environ[_SOURCE_ONLY] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SOURCE_ONLY]
        else:
            os.environ[_SOURCE_ONLY] = before


def machine_code(executable: Any, folder: Path) -> Kernels:
    """Compile the kernels of an executable for every architecture asked for.

    Args:
        executable: tvm.relax.VMExecutable.
        folder: for temporary files.

    Raises:
        EngineUnavailableError: nvcc is missing, or does not know an architecture.
    """
    sources = list(_sources(executable.mod))
    if not sources:
        return Kernels()
    assert len(sources) == 1, "TVM puts all kernels of a target into one module"
    source = folder / "kernels.cu"
    source.write_text(sources[0])
    files = {name: _cubin(source, name) for name in tvm_cuda.architectures()}
    return Kernels(
        {cubin_name(name): code for name, code in files.items()}, tuple(files), tvm_cuda.digest(sources[0])
    )


def _sources(module: Any) -> Iterator[str]:
    """The source of every module of kernels below one."""
    if module.kind == "cuda":
        yield module.inspect_source()
    for other in module.imports:
        yield from _sources(other)


def _cubin(source: Path, architecture: str) -> bytes:
    """Machine code, with IEEE's division and square root: TVM's own way is --use_fast_math."""
    made = source.with_name(cubin_name(architecture))
    command = [tvm_cuda.find_nvcc(), "-cubin", f"-arch={architecture}", "-w", "-o", str(made), str(source)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise EngineUnavailableError(f"tvm:cuda: nvcc does not start: {error}") from error
    if done.returncode or not made.is_file():
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        said = next(
            (line for line in lines if "error" in line or "fatal" in line), (lines or ["nothing"])[-1]
        )
        raise EngineUnavailableError(
            f"tvm:cuda: nvcc makes no code for {architecture}, it says: {said[:200]}"
        )
    return made.read_bytes()


PORTABLE = Lowering(
    "portable",
    [
        ("Readable", readable),
        ("ImportGraph", import_graph),
        ("TrustIndices", trust_indices),
        ("PlainCasts", plain_casts),
        ("BoundGathers", bound_gathers),
    ],
    gpu_passes,
    "bytecode",
    "cuda",
    tvm_cuda.target,
    around=source_only,
    kernels=machine_code,
)
FUSED = Lowering(
    "fused",
    [("CallKernels", lower)],
    gpu_passes,
    "bytecode",
    "cuda",
    tvm_cuda.target,
    in_panels,
    source_only,
    machine_code,
)
