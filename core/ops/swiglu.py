"""SwiGLU gate (Shazeer 2020), y = silu(gate) * up, fused into one pass over memory.

Shapes: gate, up and y are (..., F), equal. All float32 in the kernel; on CUDA all bfloat16, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from portlm.ops import cuda, lazy
from portlm.ops.kernel_op import KernelOp, has_kernel, kernels
from portlm.ops.spec import Attributes, Builder, Input, Node, OpSpec, like_first

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", F="torch.nn.functional", Tensor="torch:Tensor")

__all__ = ["swiglu", "swiglu_reference"]


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """Compute the definition in plain PyTorch: the oracle of the tests and the fallback without a kernel."""
    return F.silu(gate) * up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, where silu(g) = g / (1 + e^-g).

    Args:
        gate: (..., F).
        up: (..., F).

    Returns:
        (..., F).

    Raises:
        ValueError: the shapes differ; the message names them.
    """
    if gate.shape != up.shape:
        raise ValueError(f"[swiglu] shapes must match, got {tuple(gate.shape)} and {tuple(up.shape)}")
    if not has_kernel(gate, up) and not cuda.has_cuda_kernel(gate, up):
        return swiglu_reference(gate, up)
    return _fused(gate.contiguous(), up.contiguous())


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty_like(gate)
    arguments = (gate.data_ptr(), up.data_ptr(), y.data_ptr(), gate.numel())
    if cuda.on_cuda(gate):
        cuda.launch("swiglu_fwd", gate.device, *arguments, gate.dtype is torch.bfloat16)
    else:
        kernels.swiglu_fwd(*arguments)
    return y


def _gradients(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    arguments = (
        dy.data_ptr(), gate.data_ptr(), up.data_ptr(), dgate.data_ptr(), dup.data_ptr(), gate.numel()
    )  # fmt: skip
    if cuda.on_cuda(gate):
        cuda.launch("swiglu_bwd", gate.device, *arguments, gate.dtype is torch.bfloat16)
    else:
        kernels.swiglu_bwd(*arguments)
    return dgate, dup


_fused_gradients = KernelOp(
    "swiglu_backward",
    _gradients,
    fake=lambda dy, gate, up: (torch.empty_like(gate), torch.empty_like(up)),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    return (None, None) if dy is None else _fused_gradients(dy.contiguous(), *ctx.saved_tensors)


_fused = KernelOp(
    "swiglu",
    _forward,
    fake=lambda gate, up: gate.new_empty(gate.shape),
    backward=_backward,
    setup_context=_save,
)


def _portable(g: Builder, inputs: Sequence[str], outputs: Sequence[str], attributes: Attributes) -> None:
    gate, up = inputs
    (y,) = outputs
    sigmoid = g.op("Sigmoid", (gate,), f"{y}.sigmoid")
    silu = g.op("Mul", (gate, sigmoid), f"{y}.silu")
    g.op("Mul", (silu, up), y)


SPEC = OpSpec(
    name="swiglu",
    summary="silu(gate) * up",
    forward=("swiglu_fwd",),
    backward=("swiglu_bwd",),
    cuda=("swiglu_fwd", "swiglu_bwd"),
    nodes=(
        Node(
            op_type="SwiGlu",
            torch=("portlm::swiglu",),
            inputs=(Input("gate"), Input("up")),
            outputs=("y",),
            suffix="swiglu",
            shapes=like_first(),
            portable=_portable,
            rowwise=True,
            tvm="swiglu",
        ),
    ),
)
