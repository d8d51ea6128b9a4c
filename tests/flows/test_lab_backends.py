"""One forward pass in several languages of kernels: what is counted, and what is said of those that are missing."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

from portlm.errors import EngineUnavailableError
from portlm.flows import backends
from portlm.flows.backends import Column

IDS = np.arange(12).reshape(2, 6)


def test_a_loop_gets_a_pragma_if_it_was_named_and_no_other():
    tvm_c = pytest.importorskip("portlm.compile.tvm_c")
    source = (
        "void f() {\n  for (int32_t u_i_fused = 0; u_i_fused < 9; ++u_i_fused) {\n"
        "    for (int64_t k = 0; k < 9; ++k) {\n  for (int32_t umbrella = 0;\n"
    )
    marked = tvm_c.with_openmp(source).splitlines()
    assert marked == [
        "void f() {",
        "  #pragma omp parallel for",
        *source.splitlines()[1:],
    ]


def test_c_on_threads_gives_the_logits_of_eager_pytorch_in_fewer_kernels_than_operators(
    artifacts, monkeypatch
):
    pytest.importorskip("tvm", reason="tvm is missing: pip install portlm[tvm]")
    from portlm.compile import tvm_backends, tvm_c

    seen, real = [], tvm_c.with_openmp
    monkeypatch.setattr(tvm_c, "with_openmp", lambda source: seen.append(real(source)) or seen[-1])
    given = backends._inputs(artifacts["llama"], IDS)
    expected = backends._answer(artifacts["llama"], "torch", "cpu", "native", given)[0]
    found, (fused, one_by_one), where = backends._by_tvm(artifacts["llama"], "c", given)
    assert where == ""
    assert 0 < fused <= 0.6 * one_by_one
    for logits in found:
        assert np.abs(logits - expected).max() < 1e-4
    shared = [
        source.count("#pragma omp parallel for") for source in seen
    ]  # of kernels, and of what holds no loop
    assert sum(loops >= 10 for loops in shared) == 2  # each form's kernels; its products alone are more
    assert set(tvm_backends.BACKENDS) == {language for language, _ in backends.RAN.values() if language}


def test_back_ends_that_are_missing_are_told_and_the_others_compared(checkpoints, monkeypatch):
    def by_tvm(artifact, language, given):
        if language == "opencl":
            raise EngineUnavailableError("no OpenCL device")
        logits = backends._answer(artifact, "torch", "cpu", "native", given)[0]
        return [logits, logits + (0.5 if language == "wgsl" else 0)], (3, 6), "" if language == "c" else "Box"

    def by_ort(artifact, given):
        raise EngineUnavailableError("no Vulkan loader")

    monkeypatch.setattr(backends, "_by_tvm", by_tvm)
    monkeypatch.setattr(backends, "_by_ort", by_ort)
    said = []
    columns, missing = backends.compare(checkpoints["gpt2"], IDS, said.append)
    ran = {name: words for name, (_, words) in backends.RAN.items()}
    assert columns == [
        Column("c-openmp", ran["c-openmp"], 0.0, 3, 6),
        Column("wgsl", f"{ran['wgsl']}: Box", pytest.approx(0.5), 3, 6),
    ]
    assert missing == {"opencl": "no OpenCL device", "vulkan": "no Vulkan loader"}
    assert len(said) == 4
