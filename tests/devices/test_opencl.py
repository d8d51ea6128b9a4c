"""The OpenCL device for TVM: what it has alone beside the operators, its errors, and how it is found."""

import os
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

tvm = pytest.importorskip("tvm", reason="tvm is missing: pip install portlm[tvm]")
import tvm_ffi  # noqa: E402
from tvm import relax  # noqa: E402
from tvm.relax import op  # noqa: E402

from portlm import tvm_opencl  # noqa: E402
from portlm.errors import EngineUnavailableError  # noqa: E402

try:
    DEVICE = tvm_opencl.device()
except EngineUnavailableError as error:
    pytest.skip(str(error), allow_module_level=True)

RNG = np.random.default_rng(0)
N = tvm.tirx.Var("n", "int64")


def executable(function, *types, target=None):
    """A module whose function main makes of tensors of these (shape, dtype) what `function` says."""
    builder = relax.BlockBuilder()
    arguments = [relax.Var(f"x{i}", relax.TensorType(shape, dtype)) for i, (shape, dtype) in enumerate(types)]
    with builder.function("main", arguments):
        with builder.dataflow():
            result = builder.emit_output(builder.normalize(function(*arguments)))
        builder.emit_func_output(result)
    return tvm.compile(builder.get(), target=target or tvm_opencl.target())


def run(module, *arrays):
    given = (tvm.runtime.tensor(np.ascontiguousarray(array), DEVICE) for array in arrays)
    return relax.VirtualMachine(module, DEVICE)["main"](*given).numpy()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "uint32"])
def test_kernels_compute_with_small_and_unsigned_numbers(dtype):
    module = executable(lambda x: op.add(op.multiply(x, x), x), ((N, 33), dtype))
    for rows in (1, 5, 0):
        x = RNG.integers(0, 10, (rows, 33)).astype(dtype)
        np.testing.assert_array_equal(run(module, x), x * x + x)


def test_kernels_read_and_write_booleans():
    module = executable(lambda x, y: op.logical_and(x, op.logical_not(y)), *[((N, 33), "bool")] * 2)
    for rows in (1, 5, 0):
        x, y = RNG.integers(0, 2, (2, rows, 33)).astype(bool)
        np.testing.assert_array_equal(run(module, x, y), x & ~y)


def test_float64_is_as_exact_as_numpy():
    if not tvm_opencl.limits()["double"]:
        pytest.skip("this OpenCL device has no float64")
    x = RNG.standard_normal((7, 33))
    found = run(executable(lambda x: op.exp(op.multiply(x, x)), ((N, 33), "float64")), x)
    np.testing.assert_allclose(found, np.exp(x * x), rtol=1e-14)


def test_float16_runs_or_the_error_says_what_the_driver_says():
    module, x = executable(op.exp, ((N, 33), "float16")), RNG.standard_normal((3, 33)).astype(np.float16)
    if tvm_opencl.limits()["half"]:
        np.testing.assert_allclose(run(module, x), np.exp(x.astype(np.float64)), rtol=2e-3)
        return
    with pytest.raises(
        RuntimeError, match=r"compiling tir_exp_kernel, of which its compiler says\n(.*\n)*.*[Hh]alf"
    ):
        run(module, x)


def test_long_rows_are_sorted():
    x = RNG.standard_normal((3, 2000)).astype(np.float32)
    np.testing.assert_array_equal(
        run(executable(lambda x: op.sort(x, -1), ((N, 2000), "float32")), x), np.sort(x, -1)
    )


def test_a_library_on_disk_runs_as_the_module_it_was_exported_from(tmp_path):
    module = executable(lambda x: op.nn.softmax(op.add(x, x)), ((N, 33), "float32"))
    module.export_library(str(tmp_path / "model.so"))
    x = RNG.standard_normal((5, 33)).astype(np.float32)
    before = tvm_opencl.launches()
    found = run(tvm.runtime.load_module(str(tmp_path / "model.so")), x)
    assert tvm_opencl.launches() - before >= 1
    np.testing.assert_array_equal(found, run(module, x))


def test_several_threads_may_call_at_once():
    module = executable(lambda x: op.sum(op.exp(x), -1), ((N, 33), "float32"))

    def work(seed):
        machine = relax.VirtualMachine(module, DEVICE)["main"]  # which is for one thread alone
        x = np.random.default_rng(seed).standard_normal((seed + 1, 33)).astype(np.float32)
        return max(
            np.abs(machine(tvm.runtime.tensor(x, DEVICE)).numpy() - np.exp(x).sum(-1)).max()
            for _ in range(20)
        )

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(work, range(4))) < 1e-4


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def library(**kernels):
    """The bytes of a module of kernels without arguments, as TVM writes them: the body of each by its name."""
    tags = struct.pack("<Q", 2) + text("blockIdx.x") + text("threadIdx.x")
    about = b"".join(text(k) + text(k) + struct.pack("<Q", 0) + tags + struct.pack("<Q", 0) for k in kernels)
    source = "".join(f"// Function: {k}\n__kernel void {k}() {{ {body} }}\n" for k, body in kernels.items())
    return text("cl") + struct.pack("<Q", len(kernels)) + about + text(source)


def load(data):
    return tvm_ffi.get_global_func("ffi.Module.load_from_bytes.opencl")(data)


def test_an_error_of_the_compiler_names_the_kernel_and_others_of_the_module_run():
    module = load(library(good="int x = 1;", bad="int x = nowhere;"))
    before = tvm_opencl.launches()
    module["good"](1, 1)
    assert tvm_opencl.launches() == before + 1
    with pytest.raises(RuntimeError, match=r"compiling bad, of which its compiler says\n(.*\n)*.*nowhere"):
        module["bad"](1, 1)


def test_a_launch_of_nothing_is_no_launch_and_one_of_too_many_threads_says_how_many_it_may_have():
    module, before = load(library(good="int x = 1;")), tvm_opencl.launches()
    module["good"](0, 1)
    assert tvm_opencl.launches() == before
    with pytest.raises(
        RuntimeError, match=r"running good with 16777216 threads of each group, where it may have \d+"
    ):
        module["good"](1, 1 << 24)
    module["good"](1, 1)


def test_a_kernel_may_have_a_name_that_no_file_could_have():
    names = ["fused_" + "add_" * 90 + end for end in ("one", "two")]
    module, before = load(library(**dict.fromkeys(names, "int x = 1;"))), tvm_opencl.launches()
    for name in names:
        module[name](1, 1)
    assert tvm_opencl.launches() == before + 2


def test_damaged_bytes_are_refused():
    whole = library(good="int x = 1;")
    for size in range(0, len(whole), 7):
        with pytest.raises(ValueError, match=r"a module of kernels (ends too soon|counts)"):
            load(whole[:size])
    with pytest.raises(ValueError, match=r"counts \d+ parts it has not"):
        load(text("cl") + struct.pack("<Q", 2**63))
    with pytest.raises(ValueError, match="kernels in spirv are not OpenCL C"):
        load(text("spirv") + whole[10:])
    with pytest.raises(ValueError, match="has no source of its kernel good"):
        load(whole.replace(b"// Function: good", b"// Function: mood"))
    with pytest.raises(ValueError, match=r"is launched with blockIdx\.a"):
        load(whole.replace(b"blockIdx.x", b"blockIdx.a"))


def test_a_tensor_that_is_too_large_is_an_error_that_says_how_large_it_may_be():
    most = tvm_opencl.limits()["bytes"]
    with pytest.raises(RuntimeError, match=f"has no buffers of {most + 1} bytes, but of at most {most}"):
        tvm.runtime.empty((most + 1,), "uint8", DEVICE)
    assert tvm.runtime.empty((0,), "uint8", DEVICE).numpy().shape == (0,)


def test_there_is_one_device_and_tvm_knows_what_it_has():
    assert DEVICE.exist
    assert not tvm.runtime.device("opencl", 1).exist
    assert DEVICE.max_threads_per_block == tvm_opencl.limits()["threads"] >= tvm_opencl.MOST_THREADS
    assert DEVICE.max_shared_memory_per_block == tvm_opencl.limits()["shared"] >= tvm_opencl.SHARED_BYTES
    assert DEVICE.device_name in [each.name for each in tvm_opencl.devices()]
    with pytest.raises(ValueError, match="one OpenCL device is used at a time"):
        tvm.runtime.empty((1,), "float32", tvm.runtime.device("opencl", 1))


@pytest.mark.parametrize("asked", ["0", "nonesuch"])
def test_the_device_is_chosen_by_the_environment(asked):
    code = "from portlm import tvm_opencl; print(tvm_opencl.described())"
    env = os.environ | {"PORTLM_OPENCL_DEVICE": asked}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    if asked == "0":
        assert done.stdout.startswith(tvm_opencl.devices()[0].name)
    else:
        assert (
            f"no OpenCL device is called {asked}; there are 0: {tvm_opencl.devices()[0].name}" in done.stderr
        )


def without_loader(name):
    raise OSError(name)


def test_without_a_loader_the_error_says_how_to_get_one(monkeypatch):
    monkeypatch.setattr(tvm_opencl.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(tvm_opencl.ctypes, "CDLL", without_loader)
    with pytest.raises(EngineUnavailableError, match=r"there is no libOpenCL\.so\.1: .*, try pip install"):
        tvm_opencl.loader()


def test_the_loader_inside_pyopencl_is_taken_where_no_driver_is_installed(monkeypatch, tmp_path):
    package = tmp_path / "pyopencl"
    (package / ".libs").mkdir(parents=True)
    (package / ".libs" / "libOpenCL-1234.so.1.0.0").touch()
    (package / ".libs" / "pocl.icd").write_text("libpocl-1234.so\n")
    opened = []
    monkeypatch.setattr(tvm_opencl.ctypes, "CDLL", opened.append)
    spec = type("Spec", (), {"origin": str(package / "__init__.py")})
    monkeypatch.setattr(tvm_opencl.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(tvm_opencl, "DRIVERS", tmp_path)
    for name in ("OCL_ICD_VENDORS", "OCL_ICD_FILENAMES", "PYOPENCL_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert Path(tvm_opencl.loader()) == package / ".libs" / "libOpenCL-1234.so.1.0.0"
    assert os.environ["PYOPENCL_HOME"] == str(package)
    assert opened == [str(package / ".libs" / "libpocl-1234.so")]
    (tmp_path / "vendor.icd").touch()
    assert tvm_opencl.loader() == tvm_opencl.LOADER
