"""CUDA for TVM: which GPUs the driver has, TVM's runtime for them, and what kernels are compiled for.

TVM's wheel brings that runtime as a library of its own, which loads where both NVIDIA's driver (libcuda.so.1) and
NVIDIA's runtime (libcudart.so.13) are; ``import tvm`` tries once and says nothing. Here the driver is asked first, by
itself, so that there is one sentence for each thing that can be missing.

Kernels are machine code: each cubin is for one architecture, and runs on later ones of the same generation. TVM would
keep CUDA's source in a library and compile that wherever it is loaded, with NVIDIA's compiler. It asks a function of
ours for the machine code (:func:`lend`), which returns what was compiled before.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

from portlm.errors import EngineUnavailableError, UsageError
from portlm.tvm_support import import_tvm

DRIVER, RUNTIME, OLDEST_DRIVER = "libcuda.so.1", "libcudart.so.13", 13
TVM_RUNTIME = "libtvm_runtime_cuda.so"
# What every GPU of these generations has; blocks of more threads would leave fewer registers to each.
MOST_THREADS, SHARED_BYTES, WARP = 256, 48 << 10, 32
_HOMES, USUAL = ("CUDA_HOME", "CUDA_PATH"), Path("/usr/local/cuda")  # of NVIDIA's toolkit
OLDEST = 75  # of what NVIDIA's compiler of that version makes code for

_NO_DEVICE, _MAJOR, _MINOR = 100, 75, 76  # of cuda.h: an error, and two attributes of a device

_asked: ContextVar[tuple[str, ...]] = ContextVar("architectures", default=())
_lent: dict[str, bytes] = {}  # machine code by the digest of its source
_connected = False


class CudaDevice(NamedTuple):
    """A GPU, as its driver describes it.

    Attributes:
        name: its name.
        architecture: "sm_90" for compute capability 9.0.
        memory: bytes.
    """

    name: str
    architecture: str
    memory: int


# --- what is asked for ---------------------------------------------------------------------------------


def read_architectures(text: str) -> tuple[str, ...]:
    """Read "sm_80,sm_90".

    Raises:
        UsageError: it is not of that form, or older than what can be compiled for.
    """
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        match = re.fullmatch(r"sm_([0-9]{2,3})[af]?", name)
        if match is None or int(match[1]) < OLDEST:
            raise UsageError(f"there is no architecture {name[:20]!r}: write sm_80 or sm_90, or sm_80,sm_90")
    return names


@contextlib.contextmanager
def at_architectures(names: Sequence[str]) -> Iterator[None]:
    """Compile for these architectures inside the block; none changes nothing."""
    token = _asked.set(tuple(names) or _asked.get())
    try:
        yield
    finally:
        _asked.reset(token)


def architectures() -> tuple[str, ...]:
    """Return what to compile for: what was asked for, or the first GPU here.

    Raises:
        EngineUnavailableError: nothing was asked for, and there is no GPU.
    """
    if asked := _asked.get():
        return asked
    try:
        return (devices()[0].architecture,)
    except EngineUnavailableError as error:
        reason = str(error).removeprefix("tvm:cuda: ")
        raise EngineUnavailableError(
            f"tvm:cuda: no GPU here to compile for ({reason}): say which with --arch, such as --arch sm_90"
        ) from error


def fitting(found: Sequence[str], device: str) -> str | None:
    """Return which architecture's machine code is best for a device's, None if none of it runs there.

    Code for sm_80 runs on sm_86, and neither on sm_90 nor on sm_75; code for sm_90a on sm_90 alone.
    """

    def number(name: str) -> int:
        return int(name[3:].rstrip("af"))

    there = number(device)
    exact = [name for name in found if name.rstrip("af") == device]
    earlier = [n for n in found if n[-1].isdigit() and number(n) // 10 == there // 10 and number(n) <= there]
    return max(exact, key=len) if exact else max(earlier, key=number, default=None)


def target(host: Any = None) -> Any:
    """Return TVM's target for kernels that run on every architecture asked for: tvm.target.Target.

    Args:
        host: the target of what calls the kernels; LLVM's for this processor if it is None.

    Raises:
        EngineUnavailableError: there is no NVIDIA compiler, or as of architectures().
    """
    find_nvcc()
    tvm = import_tvm()
    oldest = min(architectures(), key=lambda name: int(name[3:].rstrip("af")))
    kernels = {
        "kind": "cuda", "keys": ["cuda", "gpu"], "arch": oldest, "max_num_threads": MOST_THREADS,
        "max_threads_per_block": MOST_THREADS, "max_shared_memory_per_block": SHARED_BYTES, "thread_warp_size": WARP,
    }  # fmt: skip
    return tvm.target.Target(kernels, tvm.target.Target("llvm") if host is None else host)


def find_nvcc() -> str:
    """Return the path of NVIDIA's compiler: on the PATH, or below CUDA_HOME or CUDA_PATH.

    Raises:
        EngineUnavailableError: there is none.
    """
    places = [Path(folder) / "bin" / "nvcc" for name in _HOMES if (folder := os.environ.get(name))]
    for place in (*places, shutil.which("nvcc"), USUAL / "bin" / "nvcc"):
        if place is not None and os.access(place, os.X_OK):
            return str(place)
    raise EngineUnavailableError(
        "tvm:cuda: compiling needs nvcc, of NVIDIA's CUDA toolkit: put it on the PATH, or set CUDA_HOME"
    )


# --- the driver ----------------------------------------------------------------------------------------


def devices() -> list[CudaDevice]:
    """List the GPUs of the driver, of which there is at least one; no memory of theirs is touched.

    Raises:
        EngineUnavailableError: there is no driver, it does not start, or it has no GPU; the message says which.
    """
    driver = _driver()
    count = ctypes.c_int()
    _call(driver, "cuDeviceGetCount", ctypes.byref(count))
    if not count.value:
        raise EngineUnavailableError("tvm:cuda: the NVIDIA driver finds no GPU")
    found = []
    for number in range(count.value):
        name, size = ctypes.create_string_buffer(256), ctypes.c_size_t()
        handle, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        _call(driver, "cuDeviceGet", ctypes.byref(handle), number)
        _call(driver, "cuDeviceGetName", name, len(name), handle)
        _call(driver, "cuDeviceGetAttribute", ctypes.byref(major), _MAJOR, handle)
        _call(driver, "cuDeviceGetAttribute", ctypes.byref(minor), _MINOR, handle)
        _call(driver, "cuDeviceTotalMem_v2", ctypes.byref(size), handle)
        sm = f"sm_{major.value}{minor.value}"
        found.append(CudaDevice(name.value.decode(errors="replace"), sm, size.value))
    return found


def driver_version() -> str:
    """The version of CUDA that the driver is for, such as "13.0".

    Raises:
        EngineUnavailableError: as of devices().
    """
    version = ctypes.c_int()
    _call(_driver(), "cuDriverGetVersion", ctypes.byref(version))
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def check_driver() -> None:
    """Look for a GPU whose driver is new enough for TVM's runtime; TVM is not imported.

    Raises:
        EngineUnavailableError: as of devices(), or the driver is older.
    """
    devices()
    version = driver_version()
    if int(version.partition(".")[0]) < OLDEST_DRIVER:
        raise EngineUnavailableError(
            f"tvm:cuda: the NVIDIA driver is for CUDA {version}, TVM's runtime needs one for {OLDEST_DRIVER}.0 or "
            "later: update the driver"
        )


def _driver() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        raise EngineUnavailableError(f"tvm:cuda: there is no NVIDIA driver here ({DRIVER})") from None
    _call(driver, "cuInit", 0)
    return driver


def _call(driver: ctypes.CDLL, name: str, *arguments: Any) -> None:
    code = getattr(driver, name)(*arguments)
    if code == _NO_DEVICE:
        raise EngineUnavailableError("tvm:cuda: the NVIDIA driver finds no GPU")
    if code:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(code, ctypes.byref(text))
        said = text.value.decode(errors="replace") if text.value else f"error {code}"
        raise EngineUnavailableError(f"tvm:cuda: the NVIDIA driver does not start ({said})")


# --- TVM's runtime -------------------------------------------------------------------------------------


def connect() -> None:
    """Load TVM's runtime for CUDA, once per process, and have it take machine code from lend().

    Raises:
        EngineUnavailableError: TVM, the driver, a GPU or NVIDIA's runtime is missing, or too old; the message says
            which.
    """
    global _connected
    if _connected:
        return
    tvm = import_tvm()
    check_driver()
    import tvm_ffi

    if tvm_ffi.get_global_func("device_api.cuda", allow_missing=True) is None:
        _load_nvidia_runtime()
        library = Path(str(tvm.__file__)).parent / "lib" / TVM_RUNTIME
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            raise EngineUnavailableError(f"tvm:cuda: TVM's runtime does not load: {error}") from error
    theirs = tvm_ffi.get_global_func("tvm_callback_cuda_compile")

    def compiled(source: str) -> Any:
        found = _lent.get(digest(source))
        return theirs(source) if found is None else found

    tvm_ffi.register_global_func("tvm_callback_cuda_compile", compiled, override=True)
    _connected = True


def _load_nvidia_runtime() -> None:
    """Load libcudart, of whatever brings it: the system, a package of NVIDIA's, or the toolkit."""
    spec = importlib.util.find_spec("nvidia")
    packages = (
        [Path(place) / "cu13" / "lib" for place in (spec.submodule_search_locations or ())] if spec else []
    )
    toolkits = [Path(f) / "lib64" for f in (*map(os.environ.get, _HOMES), USUAL) if f]
    for place in (RUNTIME, *(str(folder / RUNTIME) for folder in (*packages, *toolkits))):
        with contextlib.suppress(OSError):
            ctypes.CDLL(place)  # whoever needs a library of this name gets this one
            return
    raise EngineUnavailableError(
        f"tvm:cuda: {RUNTIME}, which TVM's runtime needs, is not here, try pip install "
        "'nvidia-cuda-runtime>=13,<14'"
    )


def device() -> Any:
    """Connect, and return TVM's first device.

    Raises:
        EngineUnavailableError: there is none; the message says why.
    """
    connect()
    found = import_tvm().runtime.device("cuda", 0)
    if not found.exist:
        raise EngineUnavailableError("tvm:cuda: NVIDIA's runtime does not open the GPU that its driver has")
    return found


def described() -> str:
    """Open the device, and say what it is.

    Raises:
        EngineUnavailableError: there is none; the message says why.
    """
    device()
    first = devices()[0]
    return f"{first.name} ({first.architecture}), driver for CUDA {driver_version()}"


def release() -> None:
    """Give memory back to the driver that TVM's pool keeps and nobody uses; the device must be connected."""
    import tvm_ffi

    tvm_ffi.get_global_func("vm.builtin.memory_manager.clear")()


@contextlib.contextmanager
def lend(source: str, code: bytes) -> Iterator[None]:
    """Have TVM's runtime take this machine code for a source inside the block, instead of compiling it.

    Args:
        source: digest() of it.
        code: a cubin.
    """
    _lent[source] = code
    try:
        yield
    finally:
        _lent.pop(source, None)


def digest(source: str) -> str:
    """The sha256 of kernels' source."""
    return hashlib.sha256(source.encode()).hexdigest()
