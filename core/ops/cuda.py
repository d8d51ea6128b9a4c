"""The CUDA twins of the kernels: which tensors they take, and on which device and stream they run."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from portlm.ops import lazy
from portlm.ops.kernel_op import has_kernel, is_exporting, kernels

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", Tensor="torch:Tensor")

__all__ = [
    "MOST_HEAD_WIDTH",
    "can_wait",
    "has_cuda_kernel",
    "has_float_kernel",
    "launch",
    "on_cuda",
    "row_blocks",
    "run",
]

MOST_HEAD_WIDTH = 256  # of attention


def has_cuda_kernel(first: Tensor, *others: Tensor | None) -> bool:
    """Say whether the CUDA kernels take these tensors: built, one device, all float32 or all bfloat16, no export."""
    if not first.is_cuda or first.dtype not in (torch.float32, torch.bfloat16):
        return False
    if is_exporting() or not has_kernel():
        return False
    return _runs_on(first.device) and all(
        t is None or (t.device == first.device and t.dtype is first.dtype) for t in others
    )


def has_float_kernel(mask: Tensor | None, first: Tensor, *others: Tensor | None) -> bool:
    """Say whether the CPU's kernels of an op with a mask take these tensors, or twins that take float32 alone."""
    if has_kernel(first, *others):
        return True
    near = mask is None or mask.device == first.device
    return near and first.dtype is torch.float32 and has_cuda_kernel(first, *others)


def on_cuda(tensor: Tensor) -> bool:
    """Say whether it is the CUDA kernels that take a tensor which one or the other does."""
    return tensor.is_cuda


def run(name: str, first: Tensor, *arguments: Any) -> None:
    """Call a kernel whose twin has the same parameters: the one for the device of the tensor ``first``."""
    if on_cuda(first):
        launch(name, first.device, *arguments)
    else:
        getattr(kernels, name)(*arguments)


@functools.cache
def _runs_on(device: torch.device) -> bool:
    """Say whether this build holds code for a device: the oldest architecture it was compiled for, or a newer one."""
    architectures = kernels.cuda.architectures()
    if not architectures or not torch.cuda.is_available():
        return False
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor >= min(int(a) for a in architectures.split(","))


def launch(name: str, device: torch.device, *arguments: Any) -> None:
    """Start ``portlm._C.cuda.<name>`` on PyTorch's current stream of a device; it does not wait for the end.

    Raises:
        RuntimeError: the launch failed; the message names the CUDA error.
    """
    with torch.cuda.device(device):
        getattr(kernels.cuda, name)(*arguments, torch.cuda.current_stream().cuda_stream)


def can_wait(tensor: Tensor) -> bool:
    """Say whether a tensor's device can be waited for, and asked for a value.

    Not while its work is being recorded, and not where PyTorch was told to make waiting an error
    (``torch.cuda.set_sync_debug_mode``), as in the calls that come before a recording.
    """
    if not tensor.is_cuda:
        return True
    return not torch.cuda.is_current_stream_capturing() and torch.cuda.get_sync_debug_mode() < 2


def row_blocks(rows: int) -> int:
    """Return how many blocks add up the rows of a gradient: enough to fill any device, 16 rows or more for each.

    It depends on nothing but ``rows``, so that sums over rows have the same bits on every device.
    """
    return max(1, min(1024, rows // 16))
