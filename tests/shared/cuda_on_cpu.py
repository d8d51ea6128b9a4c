"""The CUDA kernels where there is no GPU: compiled for the CPU (scripts/cuda_on_cpu.sh), in the place of the real ones.

Threads of a block are fibers that change places at barriers alone (tests/cuda_on_cpu). That shows what a kernel
computes, and whether it would hang or depends on the order of its threads; not how fast it is, and not what a device
alone does, such as the rounding of its exponential.
"""

import ctypes
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
MISSING = "" if shutil.which("c++") else "there is no c++ to compile the CUDA kernels for the CPU"
TYPES = {"bool": ctypes.c_bool, "int": ctypes.c_int, "int64_t": ctypes.c_int64, "uint64_t": ctypes.c_uint64,
         "float": ctypes.c_float, "double": ctypes.c_double}  # fmt: skip

calls: Counter[str] = Counter()  # of each kernel in this process


def signatures() -> dict[str, list[type]]:
    """The parameters of every kernel as cuda/kernels.def lists them, the stream last."""
    text = re.sub(r"//.*", "", (ROOT / "csrc" / "cuda" / "kernels.def").read_text())
    found = {}
    for name, parameters in re.findall(r"PORTLM_CUDA_KERNEL\((\w+),([^)]*)\)", text):
        kinds = (p.strip().removeprefix("const ").rpartition(" ")[0] for p in parameters.split(","))
        found[name] = [ctypes.c_void_p if kind.endswith("*") else TYPES[kind] for kind in kinds]
        found[name].append(ctypes.c_void_p)
    return found


def build(folder: Path, *sources: Path) -> Path:
    """Compile the kernels, or such sources, into a folder that is made for it."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "cuda_on_cpu.so"
    command = [ROOT / "scripts" / "cuda_on_cpu.sh", library, *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return library


class Emulator:
    """The compiled kernels.

    Attributes:
        library: as ctypes opened it.
    """

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.library.cuda_on_cpu_kernel.restype = ctypes.c_void_p
        self._kernels = {
            name: ctypes.CFUNCTYPE(ctypes.c_char_p, *types)(self.library.cuda_on_cpu_kernel(name.encode()))
            for name, types in signatures().items()
        }

    def order(self, order: int) -> None:
        """Choose in which order the threads of a block run: 0 forwards, 1 backwards, others shuffled."""
        self.library.cuda_on_cpu_order(order)

    def launch(self, name: str, device: torch.device, *arguments: object) -> None:
        """Stand for `portlm.ops.cuda.launch`; the kernel has ended when it returns."""
        assert device.type == "cpu"
        error = self._kernels[name](*arguments, 0)
        if error is not None:
            raise RuntimeError(error.decode())
        calls[name] += 1


def has_cuda_kernel(first: Tensor, *others: Tensor | None) -> bool:
    """Stand for `portlm.ops.cuda.has_cuda_kernel`, on the CPU."""
    return first.dtype in (torch.float32, torch.bfloat16) and all(
        t is None or t.dtype is first.dtype for t in others
    )


def replace_cuda(emulator: Emulator, patch: pytest.MonkeyPatch) -> None:
    """Have the ops take the emulated kernels for tensors on the CPU."""
    from portlm.ops import cuda

    patch.setattr(cuda, "has_cuda_kernel", has_cuda_kernel)
    patch.setattr(cuda, "on_cuda", lambda tensor: True)
    patch.setattr(cuda, "launch", emulator.launch)
    emulator.order(0)
