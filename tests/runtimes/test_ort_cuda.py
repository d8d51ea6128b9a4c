"""What ONNX Runtime is asked on CUDA, by a session that only notes it: no GPU is needed for that."""

import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is missing: pip install portlm[onnx]")

from portlm import ort_support
from portlm.errors import EngineUnavailableError
from portlm.ort_support import CUDA
from portlm.runtimes import ort_devices


@pytest.fixture
def asked(monkeypatch):
    """What sessions were opened with: (model, providers, further arguments)."""
    found = []

    class Session:
        def __init__(self, model, options, providers, **more):
            found.append((model, providers, more))

        def disable_fallback(self):
            """As ONNX Runtime's."""

    monkeypatch.setattr(ort_support.import_onnxruntime(), "InferenceSession", Session)
    return found


def test_matrices_are_multiplied_in_float32(asked):
    """By itself the provider would round them to TF32, 10 bits, and no answer would be within 1e-4 of PyTorch's."""
    options = ort_support.session_options("cuda", None, None, allow_fallback=False)
    ort_support.open_session(b"", options, "cuda")
    assert asked == [(b"", [(CUDA, {"use_tf32": "0"})], {"enable_fallback": 0})]
    assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"


def test_the_cpu_gets_no_options_of_the_gpu(asked):
    ort_support.open_session(b"", ort_support.session_options("cpu", None, None), "cpu")
    assert asked == [(b"", ["CPUExecutionProvider"], {"enable_fallback": 0})]


def test_nvidias_python_packages_are_loaded_and_what_is_said_of_it_is_no_result(monkeypatch, capsys):
    calls = []

    def preload_dlls():
        calls.append("once")
        print("Failed to load libcudnn.so.9")

    monkeypatch.setattr(ort_devices.onnxruntime, "get_available_providers", lambda: [CUDA])
    monkeypatch.setattr(ort_devices.onnxruntime, "preload_dlls", preload_dlls)
    assert ort_devices.find_device("cuda") == (None, "")
    assert calls == ["once"]
    assert capsys.readouterr() == ("", "")


def test_a_wheel_without_cuda_is_told_from_one_with_it(monkeypatch):
    monkeypatch.setattr(ort_devices.onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(
        EngineUnavailableError, match=r"^ort:cuda: the installed onnxruntime has no CUDA provider"
    ):
        ort_devices.find_device("cuda")
