"""Models of every kind on TVM's Vulkan, as anyone would have them: exported, compiled, and verified against PyTorch."""

import shutil

import pytest

pytest.importorskip("tvm", reason="tvm is missing: pip install portlm[tvm]")
pytest.importorskip("torch", reason="torch is missing: pip install portlm[train]")
pytest.importorskip("onnx", reason="onnx is missing: pip install portlm[onnx]")

from portlm import tvm_vulkan  # noqa: E402
from portlm.compile.build import build_choice  # noqa: E402
from portlm.errors import EngineUnavailableError  # noqa: E402
from portlm.flows.targets import Target  # noqa: E402
from portlm.flows.verify import verify_artifact  # noqa: E402

try:
    tvm_vulkan.device()
except EngineUnavailableError as error:
    pytest.skip(str(error), allow_module_level=True)
