"""The devices of TVM's that portlm brings."""

import pytest

from portlm.errors import EngineUnavailableError

MODULES = ("vulkan", "opencl")


@pytest.fixture(params=MODULES, scope="module")
def place(request):
    """The module of a device; tests are skipped where this machine has none."""
    pytest.importorskip("tvm", reason="tvm is missing: pip install portlm[tvm]")
    from portlm.tvm_support import device_module

    module = device_module(request.param)
    try:
        module.device()
    except EngineUnavailableError as error:
        pytest.skip(str(error))
    return module
