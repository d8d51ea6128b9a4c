"""Build portlm: map the three source roots to one package, and compile portlm._C with CMake.

The extension links neither PyTorch nor TVM, so an ordinary isolated build needs only CMake, Ninja, pybind11 and two
packages for their headers, and one wheel serves every version of both. portlm._opencl and portlm._vulkan, beside it,
are for one version of TVM, which they compare before they say anything.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
ROOTS = {"portlm": "core", "portlm.compile": "compile", "portlm.runtimes": "runtimes"}


class CMakeExtension(Extension):
    """An extension whose sources are listed in CMakeLists.txt instead of here.

    One that is optional is not there where CMake lacks what it needs.
    """

    def __init__(self, name: str, optional: bool = False):
        super().__init__(name, sources=[], optional=optional)


class CMakeBuild(build_ext):
    """Configure and build with CMake in a directory that survives between installs.

    setuptools gives every editable install a fresh temporary directory; building in
    ``build/cmake-<python tag>`` instead lets a second install only relink what changed.
    """

    def build_extension(self, ext: Extension) -> None:
        """Configure, and build all extensions into the place setuptools asks for."""
        if ext is not self.extensions[0]:
            return  # built with the first, and copied from where that is, if it could be built
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = HERE / "build" / f"cmake-{sys.implementation.cache_tag}"
        self._drop_stale_cache(build)
        configure = [
            "cmake",
            "-S",
            str(HERE),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_BUILD_TYPE={os.environ.get('PORTLM_BUILD_TYPE', 'Release')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPORTLM_OUTPUT_DIRECTORY={target.parent}",
            f"-DPORTLM_EXTENSION_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}",
            f"-Dpybind11_DIR={_copied('pybind11') / 'share/cmake/pybind11'}",
            *_device_headers(),
            *os.environ.get("PORTLM_CMAKE_ARGS", "").split(),
        ]
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel"], check=True)

    @staticmethod
    def _drop_stale_cache(build: Path) -> None:
        # An isolated build runs in a new environment each time. CMake refuses to swap the generator's
        # program under an existing cache, so forget the remembered paths but keep every object file.
        (build / "CMakeCache.txt").unlink(missing_ok=True)


def _copied(name: str, part: str = ".") -> Path:
    """Return where a folder of an installed package is, at a path that does not change from one build to the next.

    pip gives each isolated build a new folder. With headers under a new path every object that includes them would be
    compiled again, so they are copied once per version. The package is not imported.
    """
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    distribution = {"tvm_ffi": "apache-tvm-ffi"}.get(name, name)
    copy = HERE / "build" / f"{name}-{importlib.metadata.version(distribution)}"
    if not copy.exists():
        folder = Path(spec.origin).parent / part
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("__pycache__", "*.so*"))
    return copy


def _device_headers() -> list[str]:
    """Tell CMake where the headers are that the devices for TVM need, those that are installed."""
    return [
        f"-DPORTLM_{name.upper()}_INCLUDE={_copied(name, part)}"
        for name, part in {"tvm_ffi": "include", "wgpu": "resources"}.items()
        if importlib.util.find_spec(name)
    ]


setup(
    package_dir=ROOTS,
    packages=[
        name
        for root, path in ROOTS.items()
        for name in (root, *(f"{root}.{package}" for package in find_packages(path)))
    ],
    package_data={"portlm": ["py.typed", "_C.pyi"], "portlm.flows": ["report.html.jinja"]},
    ext_modules=[
        CMakeExtension("portlm._C"),
        CMakeExtension("portlm._opencl", optional=True),
        CMakeExtension("portlm._vulkan", optional=True),
    ],
    cmdclass={"build_ext": CMakeBuild},
)
