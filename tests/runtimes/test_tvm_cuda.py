"""The TVM engine on CUDA, on machines that have no GPU: kernels as machine code, and all around them on a fake one.

Everything between portlm and the kernels is what runs on a GPU, TVM's own runtime included; the kernels are the source
that nvcc gets, compiled for the processor (tests/fake_cuda). How fast they are, and what only NVIDIA's libraries do, is
not seen here: benchmarks/gpu looks at that.
"""

import os
import re
import shutil
import stat
import struct
import subprocess
import sys
from pathlib import Path

import fake_cuda
import numpy as np
import pytest

pytest.importorskip("tvm_ffi", reason="TVM is missing: pip install portlm[tvm]")

from portlm import tvm_cuda
from portlm.artifact import read_manifest
from portlm.errors import EngineUnavailableError, FormatError, UsageError
from portlm.tvm_support import LIBRARY, SIGNATURE, Signature, cubin_name, folder_name

pytestmark = pytest.mark.skipif(bool(fake_cuda.MISSING), reason=fake_cuda.MISSING)

CASE = Path(__file__).parent / "tvm_cuda_case.py"
COMPILED = folder_name("cuda", "portable")
TOLERANCE = 1e-4  # of logits, as of every engine; here they are within 1e-5
CUDA_MACHINE = 190  # in the header of a cubin


@pytest.fixture(scope="module")
def libraries(once):
    return once("fake-cuda", fake_cuda.build)


@pytest.fixture
def gpu(libraries, tmp_path):
    return fake_cuda.FakeGpu(libraries, tmp_path / "log")


@pytest.fixture(scope="module")
def lookup(tmp_path_factory):
    """An artifact with few kernels: what each of two ids is in a table, through a matrix."""
    torch = pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
    pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")
    from portlm.compile.export import export_module
    from portlm.models.layers import Embedding, Linear
    from portlm.models.roles import Role
    from portlm.roles import TensorSpec

    class Lookup(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = type("Config", (), {"vocab_size": 70, "context_length": 32})
            self.table, self.head = Embedding(70, 8), Linear(8, 4, bias=True)
            for weight in self.parameters():
                torch.nn.init.normal_(weight)

        def tag(self, ids):
            return (self.head(self.table(ids)),)

        def roles(self):
            ids = TensorSpec("input_ids", "int64", ("batch", "sequence"))
            tags = TensorSpec("tags", "float32", ("batch", "sequence", 4))
            return {"head:tags": Role(self.tag, (ids,), (tags,), ())}

    torch.manual_seed(0)
    return export_module(Lookup().eval(), tmp_path_factory.mktemp("lookup") / "model")


def code_for(cubin):
    """The architecture that machine code says it is for, from its ELF header."""
    data = cubin.read_bytes()
    assert data[:4] == b"\x7fELF"
    machine, flags = struct.unpack_from("<H", data, 18)[0], struct.unpack_from("<I", data, 48)[0]
    assert machine == CUDA_MACHINE
    return f"sm_{flags >> 8 & 0xFF}"


def tools_for_cubins():
    """Where cuobjdump is, or None."""
    beside = Path(tvm_cuda.find_nvcc()).with_name("cuobjdump")
    return str(beside) if beside.exists() else shutil.which("cuobjdump")


@pytest.fixture(scope="module")
def ahead(lookup):
    """The artifact compiled here for two GPUs by NVIDIA's compiler."""
    try:
        tvm_cuda.find_nvcc()
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    from portlm.compile.build import build

    with tvm_cuda.at_architectures(("sm_80", "sm_90")):
        (entry,) = build(lookup, [("tvm", "cuda", "portable")])
    assert entry.target.startswith("sm_80 sm_90 llvm ")
    return lookup


def test_machine_code_for_each_gpu_is_made_where_none_is(ahead):
    folder = ahead / f"{COMPILED}-head-tags"
    signature = Signature.read(folder / SIGNATURE, ahead)
    assert signature.architectures == ("sm_80", "sm_90")
    for name in signature.architectures:
        cubin = folder / cubin_name(name)
        assert code_for(cubin) == name
        kernels = [part for part in cubin.read_bytes().split(b"\0") if part.startswith(b".text.")]
        assert any(b"take" in kernel for kernel in kernels)
        assert any(b"matmul" in kernel for kernel in kernels)
        if dump := tools_for_cubins():
            shown = subprocess.run([dump, "-sass", cubin], capture_output=True, text=True, check=True).stdout
            assert f"code for {name}" in shown
            assert "FFMA" in shown
    assert (folder / LIBRARY).read_bytes()[18:20] != struct.pack("<H", CUDA_MACHINE)


SMALLEST_CALL = """
import sys, numpy, portlm
engine = portlm.load(sys.argv[1], "tvm", "cuda").engine
print(engine.device, dict(engine.placement().nodes).keys() == {"cuda"})
state = engine.start("head:tags", 1)
tags = engine.run("head:tags", {"input_ids": numpy.array([[1, 2]])}, state)[0]["tags"]
print(tags.shape)
"""


def test_a_gpu_gets_the_machine_code_of_its_generation_and_every_launch_fits_a_device(ahead, gpu):
    done = gpu.python("-c", SMALLEST_CALL, ahead, nvcc=True, architecture=86)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["cuda True", "(1, 2, 4)", ""]
    noted = gpu.noted()
    assert [line for line in noted if line.startswith("module")] == ["module sm_80"]
    assert any(line.startswith("launch ") and "matmul" in line for line in noted)
    assert not any(line.startswith("nvcc") for line in noted)


def test_a_kernel_that_fails_is_named_in_one_line(ahead, gpu):
    done = gpu.python("-c", SMALLEST_CALL, ahead, nvcc=True, fault=700)
    said = done.stderr.strip().splitlines()[-1]
    assert re.fullmatch(
        r"portlm\.errors\.PortlmError: tvm: CUDALaunch Error: CUDA_ERROR_ILLEGAL_ADDRESS grid=\(1,1,1\), +"
        r"block=\(\d+,1,1\) // func_name=\w+_kernel",
        said,
    ), said


def test_a_gpu_without_machine_code_of_its_own_is_named_with_the_command_that_makes_it(ahead, gpu):
    done = gpu.python("-c", SMALLEST_CALL, ahead, nvcc=True, architecture=75)
    assert done.returncode
    said = done.stderr.strip().splitlines()[-1]
    command = f"portlm compile {ahead} --engine tvm --device cuda --profile portable --arch sm_75"
    assert said.endswith(f"tvm:cuda: compiled for sm_80, sm_90, this GPU is sm_75: run {command}")


def test_machine_code_that_was_changed_is_not_loaded(ahead, gpu, tmp_path):
    model = shutil.copytree(ahead, tmp_path / "model")
    cubin = model / f"{COMPILED}-head-tags" / cubin_name("sm_90")
    data = bytearray(cubin.read_bytes())
    data[-1] ^= 1
    cubin.write_bytes(data)
    from portlm.engine import OpenRequest
    from portlm.runtimes.tvm import _load

    manifest = read_manifest(model)
    request = OpenRequest(model, manifest, "cuda", "portable")
    with pytest.raises(FormatError, match=r"kernels\.sm_90\.cubin"):
        _load(request, manifest, "head:tags", f"{COMPILED}-head-tags", "portable", "portlm compile")


@pytest.fixture(scope="module", params=["llama:fused", "gpt2:portable"])
def running(request, artifacts, libraries, tmp_path_factory):
    """A decoder whose kernels run on the fake GPU, as `portlm compile` makes it there, and the profile."""
    family, _, profile = request.param.partition(":")
    folder = tmp_path_factory.mktemp("running")
    model = shutil.copytree(artifacts[family], folder / "model")
    gpu = fake_cuda.FakeGpu(libraries, folder / "log")
    done = gpu.portlm("compile", model, "-e", f"tvm:cuda:{profile}")
    assert done.returncode == 0, done.stderr
    assert gpu.noted() == ["nvcc -arch=sm_90"]
    return model, profile


def results(gpu, model, place, *target, **settings):
    done = gpu.python(CASE, model, *target, place, **settings)
    assert done.returncode == 0, done.stderr
    with np.load(place) as found:
        return dict(found)


def test_logits_are_those_of_onnx_runtime_and_depend_on_no_order_of_threads(running, gpu, tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is missing: pip install portlm[onnx]")
    model, profile = running
    found = results(gpu, model, tmp_path / "tvm.npz", "tvm", "cuda", profile)
    noted = gpu.noted()
    wanted = results(gpu, model, tmp_path / "ort.npz", "ort", "cpu", "portable")
    assert found.keys() == wanted.keys()
    for name, logits in wanted.items():
        for row, length in enumerate((5, 2, 4) if name == "at once" else (2,) * len(logits)):
            theirs = logits[row, -length:]  # what is before it is padding
            np.testing.assert_allclose(found[name][row, -length:], theirs, atol=TOLERANCE, rtol=0)
    gpu.noted()
    backwards = results(
        gpu, model, tmp_path / "backwards.npz", "tvm", "cuda", profile, order=1, memory=20_000
    )
    again = gpu.noted()
    for name, logits in found.items():
        assert logits.tobytes() == backwards[name].tobytes(), f"{name}: a barrier is missing"
    step = noted[noted.index("step") + 1 : noted.index("end of step")]
    down = [line for line in step if line.endswith("to the host")]
    assert down == [f"copy {wanted['a step'].nbytes} to the host"], "nothing but logits leaves the device"
    up = [int(line.split()[1]) for line in step if line.endswith("to the device")]
    assert sum(up) <= 3 * 8 * (1 + 1 + 6) + 8, "nothing but tokens, positions, mask and place enters it"
    assert not any(line.startswith("fault") for line in noted)
    inputs = len(read_manifest(model).roles["decoder"].inputs)
    assert last_step(noted).count("free") == inputs, "what a step leaves is there for the next one"
    assert last_step(again).count("free") > inputs, "and not for ever, on a GPU with little memory"


def last_step(noted):
    """What happened from the beginning of the last step but one to that of the last."""
    *_, begin, end = (i for i, line in enumerate(noted) if line == "later step")
    return [line.split()[0] for line in noted[begin:end]]


def test_doctor_says_which_gpu_it_is(gpu):
    done = gpu.python("-m", "portlm.runtimes.probe", "tvm", "cuda", architecture=89)
    assert done.stdout == '{"detail": "Fake GPU (sm_89), driver for CUDA 13.0"}\n', done.stderr


CHECK = "from portlm import tvm_cuda; tvm_cuda.check_driver()"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"devices": 0}, "tvm:cuda: the NVIDIA driver finds no GPU"),
        ({"init": 999}, "tvm:cuda: the NVIDIA driver does not start (a fake error)"),
        ({"version": 12040}, "tvm:cuda: the NVIDIA driver is for CUDA 12.4, TVM's runtime needs one for 13.0 or later: "
         "update the driver"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_driver_is_one_sentence(gpu, settings, words):
    done = gpu.python("-c", CHECK, **settings)
    assert (
        done.stderr.strip().splitlines()[-1].removeprefix("portlm.errors.EngineUnavailableError: ") == words
    )


def test_no_driver_is_one_sentence(monkeypatch):
    monkeypatch.setattr(tvm_cuda, "DRIVER", "libcuda-that-nobody-has.so.1")
    with pytest.raises(EngineUnavailableError, match=r"^tvm:cuda: there is no NVIDIA driver here \(libcuda"):
        tvm_cuda.check_driver()
    with pytest.raises(
        EngineUnavailableError, match=r"^tvm:cuda: no GPU here to compile for .*--arch sm_90$"
    ):
        tvm_cuda.architectures()


def test_a_missing_library_of_nvidias_is_named_with_what_brings_it(monkeypatch):
    monkeypatch.setattr(tvm_cuda, "RUNTIME", "libcudart-that-nobody-has.so.13")
    with pytest.raises(
        EngineUnavailableError, match=r"is not here, try pip install 'nvidia-cuda-runtime>=13,<14'$"
    ):
        tvm_cuda._load_nvidia_runtime()


@pytest.mark.parametrize(
    ("have", "device", "best"),
    [
        (("sm_80", "sm_90"), "sm_80", "sm_80"),
        (("sm_80", "sm_86"), "sm_89", "sm_86"),
        (("sm_86",), "sm_80", None),
        (("sm_80",), "sm_90", None),
        (("sm_90", "sm_90a"), "sm_90", "sm_90a"),
        (("sm_100a",), "sm_103", None),
        (("sm_100",), "sm_103", "sm_100"),
        ((), "sm_90", None),
    ],
)  # fmt: skip
def test_machine_code_runs_on_later_gpus_of_its_generation_alone(have, device, best):
    assert tvm_cuda.fitting(have, device) == best


def test_without_nvidias_compiler_the_error_says_where_it_is_looked_for(monkeypatch, lookup, tmp_path):
    from portlm.compile.build import build

    monkeypatch.setattr(tvm_cuda, "USUAL", tmp_path / "nothing")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    kept = tmp_path / "bin"
    kept.mkdir()
    (kept / "c++").symlink_to(shutil.which("c++"))
    monkeypatch.setenv("PATH", str(kept))
    with (
        pytest.raises(
            EngineUnavailableError, match=r"^tvm:cuda: compiling needs nvcc, .*on the PATH, or set CUDA_HOME$"
        ),
        tvm_cuda.at_architectures(("sm_90",)),
    ):
        build(shutil.copytree(lookup, tmp_path / "model"), [("tvm", "cuda", "portable")])


def test_what_the_compiler_says_of_an_architecture_is_passed_on(monkeypatch, tmp_path):
    from portlm.compile import tvm_cuda as compiling

    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'nvcc fatal   : Value sm_199 is not defined' >&2\nexit 1\n")
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    source = tmp_path / "kernels.cu"
    source.write_text("")
    with pytest.raises(
        EngineUnavailableError, match="no code for sm_199, it says: nvcc fatal   : Value sm_199"
    ):
        compiling._cubin(source, "sm_199")


@pytest.mark.parametrize("text", ["sm_9", "90", "sm_70", "sm_90;rm", "sm_80,", ""])
def test_what_is_no_architecture_is_refused(text):
    with pytest.raises(UsageError, match="there is no architecture"):
        tvm_cuda.read_architectures(text)


def test_tvm_imports_and_says_nothing_where_there_is_no_gpu():
    """The library that lends machine code is not loaded by importing portlm.tvm_cuda, and neither is TVM."""
    code = "import sys, portlm.tvm_cuda; print('tvm' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True
    )
    assert (done.stdout, done.stderr) == ("False\n", "")
