"""A GPU that is none (tests/fake_cuda): TVM's own runtime on CUDA, over libraries of ours in the place of NVIDIA's.

It runs in processes of their own, since a process keeps the first library of a name that it has loaded.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "fake_cuda"
# PyTorch for CUDA, which TVM imports where it is installed, loads NVIDIA's own runtime before any other can be.
OWN = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.cu13") is not None
MISSING = "" if shutil.which("c++") else "there is no c++ to build the fake GPU"
if OWN:
    MISSING = "NVIDIA's own runtime is installed here, and is loaded in the place of the fake GPU's"
CLEAN = {"CUDA_HOME", "CUDA_PATH", "LD_LIBRARY_PATH", "FAKE_CUDA_LOG"}


def build(folder: Path) -> Path:
    """Build it into a folder that is made for it."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([FOLDER / "build.sh", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


class FakeGpu:
    """Starts processes that see a GPU.

    Attributes:
        log: file in which its driver notes what they did, a line each.
    """

    def __init__(self, libraries: Path, log: Path):
        self.libraries, self.log = libraries, log

    def python(
        self, *words: object, nvcc: bool = False, **settings: object
    ) -> subprocess.CompletedProcess[str]:
        """Run Python with these arguments.

        Args:
            words: arguments.
            nvcc: with NVIDIA's own compiler, whose kernels are noted and not run.
            settings: of the GPU: devices, version, architecture, init, order. See tests/fake_cuda/device.h.
        """
        env = {name: value for name, value in os.environ.items() if name not in CLEAN}
        env |= {f"FAKE_CUDA_{name.upper()}": str(value) for name, value in settings.items()}
        env |= {"LD_LIBRARY_PATH": str(self.libraries), "FAKE_CUDA_LOG": str(self.log)}
        env["FAKE_CUDA_EMULATOR"] = str(self.libraries / "emulator.o")
        if not nvcc:
            env["PATH"] = f"{FOLDER}{os.pathsep}{env['PATH']}"
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    def portlm(
        self, *words: object, nvcc: bool = False, **settings: object
    ) -> subprocess.CompletedProcess[str]:
        """Run portlm's command; see python."""
        return self.python("-m", "portlm", *words, nvcc=nvcc, **settings)

    def noted(self) -> list[str]:
        """What happened since the last call."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines
