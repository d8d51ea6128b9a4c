"""The device and the packages that are here, and the extension with its CUDA kernels."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from check import make_view
from context import ROOT, Context, MissingError, last_line

PACKAGES = (
    "torch", "triton", "onnxruntime", "onnxruntime-gpu", "onnx", "apache-tvm", "transformers", "numpy",
)  # fmt: skip
WHEELS = "wheels"


def describe(context: Context) -> str:
    """Install wheels that were brought along, and say what the figures depend on. Without a CUDA device it fails."""
    said = _install_wheels(context)
    absent = [name for name in _requirements() if importlib.util.find_spec(name) is None]
    if absent:
        said.append(f"not installed: {', '.join(absent)}")
    for line in _smi("name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem"):
        context.fact("nvidia-smi", line)
    context.fact("nvcc", _nvcc_version())
    context.fact("python", sys.version.split()[0])
    context.fact("packages", ", ".join(f"{name} {v}" for name in PACKAGES if (v := _version(name))))
    if importlib.util.find_spec("torch") is None:
        raise RuntimeError(f"PyTorch is not installed for {sys.executable}")
    import torch

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        context.fact("device", f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}")
        context.fact("CUDA of torch", torch.version.cuda)
    elif not context.dry:
        raise RuntimeError(f"torch {torch.__version__} finds no CUDA device")
    return "; ".join(said)


def _install_wheels(context: Context) -> list[str]:
    """Install every wheel in the folder ``wheels`` of the work folder into its folder ``site``."""
    wheels = sorted((context.work / WHEELS).glob("*.whl"))
    if not wheels:
        return []
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
    done = context.command(*command, "--target", context.work / "site", *wheels)
    return [
        f"{len(wheels)} wheels installed" if done.returncode == 0 else f"wheels: {last_line(done.stderr)}"
    ]


def _requirements() -> list[str]:
    """The modules that some section imports: the package's own dependencies and the tests' tools."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert listed is not None, "pyproject.toml has no list of dependencies"
    names = re.findall(r'"([A-Za-z0-9_-]+)', listed[1])
    return [*names, "torch", "pytest", "hypothesis", "onnx", "onnxruntime"]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _smi(fields: str) -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return ["not here"]
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines() or [last_line(done.stderr)]


def _nvcc_version() -> str:
    if shutil.which("nvcc") is None:
        return "not here"
    done = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=False)
    return next(
        (line.strip() for line in done.stdout.splitlines() if "release" in line), last_line(done.stdout)
    )


def build(context: Context) -> str:
    """Make sure that portlm._C holds this tree's CUDA kernels; a dry run only compiles their sources."""
    have = _usable_extension()
    if have is not None:
        said = f"uses {have.relative_to(ROOT) if have.is_relative_to(ROOT) else have}"
        if not context.dry:
            return said
    else:
        said = "no current extension with CUDA kernels"
    if shutil.which("nvcc") is None:
        if context.dry:
            return f"{said}; there is no nvcc here, so no CUDA source was compiled"
        raise RuntimeError("there is no nvcc, and no extension that was built with it")
    _cmake(context, None if have is None else "portlm_cuda")
    if have is not None:
        return f"{said}; csrc/cuda compiles"
    make_view(context.work)
    if _usable_extension() is None:
        raise RuntimeError("the build ended well, but its extension has no CUDA kernels or does not load")
    return "built"


def kernel_names() -> list[str]:
    """Return the names in csrc/cuda/kernels.def."""
    text = (ROOT / "csrc" / "cuda" / "kernels.def").read_text()
    return re.findall(r"^PORTLM_CUDA_KERNEL\((\w+),", text, re.MULTILINE)


def _usable_extension() -> Path | None:
    """The extension of the view, if it holds every CUDA kernel and is newer than every source."""
    code = (
        "from portlm import _C\nprint(_C.__file__, _C.cuda.architectures() or '-', *dir(_C.cuda), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    file, architectures, *names = done.stdout.splitlines()
    path = Path(file).resolve()
    newest = max(source.stat().st_mtime for source in (ROOT / "csrc").rglob("*.*"))
    current = path.stat().st_mtime > newest
    return path if current and architectures != "-" and set(kernel_names()) <= set(names) else None


def _pybind11() -> str:
    """Return where pybind11's CMake files are: of this Python, or the copy that an installation left in build."""
    copies = sorted((ROOT / "build").glob("pybind11-*/share/cmake/pybind11"))
    if importlib.util.find_spec("pybind11") is None and copies:
        return str(copies[-1])
    import pybind11

    return str(pybind11.get_cmake_dir())


def _cmake(context: Context, target: str | None) -> None:
    """Configure, and build one target or all. Object files survive between runs.

    Raises:
        MissingError: CMake or pybind11 is not here.
        RuntimeError: it does not compile; the message is the compiler's.
    """
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            raise MissingError(f"{tool} is not here, so nothing was built")
    folder = context.work / "cmake"
    found = _smi("compute_cap")[0].strip()
    architectures = found.replace(".", "") if re.fullmatch(r"\d+\.\d", found) else "80;90"
    configure = [
        "cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={_pybind11()}",
        f"-DPORTLM_OUTPUT_DIRECTORY={context.work / 'extension'}",
        f"-DPORTLM_EXTENSION_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}",
        f"-DPORTLM_CUDA_ARCHITECTURES={architectures}",
    ]  # fmt: skip
    compile_ = ["cmake", "--build", folder, "--parallel", str(os.cpu_count() or 1)]
    for command in (configure, [*compile_, *(["--target", target] if target else [])]):
        done = context.command(*command)
        if done.returncode:
            errors = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line.lower()]
            raise RuntimeError(errors[0] if errors else last_line(done.stderr))
