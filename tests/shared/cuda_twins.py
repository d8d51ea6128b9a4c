"""What the tests of the CUDA twins have in common: whether there is a GPU for them, and how near results have to be."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from portlm.agreement import within
from portlm.ops.cuda import has_cuda_kernel
from portlm.ops.kernel_op import kernels

DTYPES = [torch.float32, torch.bfloat16]

if kernels is None:
    MISSING = "portlm._C was not built"
elif not torch.cuda.is_available():
    MISSING = "no CUDA device"
elif not kernels.cuda.architectures():
    MISSING = "this build has no CUDA kernels: nvcc was not found"
elif not has_cuda_kernel(torch.zeros(1, device="cuda")):
    MISSING = f"the device is older than compute capability {kernels.cuda.architectures()}"
else:
    MISSING = ""

needs_gpu = pytest.mark.skipif(bool(MISSING), reason=MISSING)
gpu = pytest.mark.gpu


def results(function: Callable[..., Any], tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return outputs and gradients of every input that takes part."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    device = tensors[0].device
    generator = torch.Generator(device).manual_seed(0)
    upstream = [
        torch.randn(y.shape, device=device, generator=generator).to(tensors[0].dtype) for y in outputs
    ]
    grads = torch.autograd.grad(outputs, leaves, [u.to(y.dtype) for u, y in zip(upstream, outputs, strict=True)],
                                allow_unused=True)  # fmt: skip
    return [*(y.detach() for y in outputs), *(g for g in grads if g is not None)]


def assert_as_accurate(
    ours: Tensor, eager: Tensor, oracle: Tensor, dtype: torch.dtype, roundings: int = 1
) -> None:
    """Assert that ours errs at most twice as much as eager, plus one or more roundings of the largest value."""
    assert ours.shape == oracle.shape
    if ours.numel():
        error, theirs = (float((t.double() - oracle).abs().max()) for t in (ours, eager))
        scale = max(1.0, float(oracle.abs().max()))
        assert within(error, 2 * theirs + roundings * torch.finfo(dtype).eps * scale), (error, theirs)


def run_twice(device: str, request: pytest.FixtureRequest) -> Iterator[int]:
    """Have threads and blocks run in another order the second time: a device's own, or the emulation's opposite."""
    for order in range(2):
        if device == "cpu":
            request.getfixturevalue("emulator").order(order)
        yield order
