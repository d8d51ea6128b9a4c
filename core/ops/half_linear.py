"""Linear map on weights of 16 bits, y = activation(x W^T + b) in float32, W as core/ops/half.py says.

Shapes: x is (..., K), weight (N, K) float16 or bfloat16, bias (N,), y (..., N). For inference: it has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from portlm.ops import lazy
from portlm.ops.half import DTYPES, check_weight, pack
from portlm.ops.kernel_op import has_kernel, kernels
from portlm.ops.quantized_linear import ACTIVATIONS, write_activation
from portlm.ops.spec import Attribute, Attributes, Builder, Input, Node, OpSpec, Shape

if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", F="torch.nn.functional", Tensor="torch:Tensor")

__all__ = ["half_linear", "half_linear_reference", "write_widened"]


def half_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """Compute the definition in plain PyTorch: the oracle of the tests and the fallback without a kernel."""
    y = F.linear(x, weight.to(x.dtype), bias)
    if activation == "relu_squared":
        return F.relu(y).square()
    return (
        y if activation == "none" else F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    )


def half_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    packed: Tensor | None = None,
) -> Tensor:
    """Return activation(x W^T + b), computed in float32: the answer of a float32 matrix with the same numbers.

    Args:
        x: (..., K).
        weight: (N, K), float16 or bfloat16.
        bias: (N,).
        activation: "none", "gelu", "gelu_tanh" or "relu_squared".
        packed: what portlm.ops.half.pack gives of the weight, which is made now if it is None.

    Returns:
        (..., N).

    Raises:
        ValueError: the shapes do not fit, or there is no such activation; the message names them.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"[half_linear] activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    check_weight("half_linear", weight, packed)
    N, K = weight.shape
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(
            f"[half_linear] x must be (..., {K}) for weight {tuple(weight.shape)}, got {tuple(x.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"[half_linear] bias must be ({N},) for weight {tuple(weight.shape)}, got {tuple(bias.shape)}"
        )
    if has_kernel(x, bias) and weight.is_cpu:
        packed = pack(weight) if packed is None else packed
        if packed.dtype == weight.dtype:
            return _run(x.contiguous(), packed, bias, N, K, activation)
    wide = weight if packed is None or packed.dtype == weight.dtype else packed
    return half_linear_reference(x, wide, bias, activation)


def _run(x: Tensor, panels: Tensor, bias: Tensor | None, N: int, K: int, activation: str) -> Tensor:
    y = x.new_empty((*x.shape[:-1], N))
    bias = bias if bias is None else bias.contiguous()
    kernels.half_linear(
        x.data_ptr(), panels.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(),
        y.shape[:-1].numel(), N, K, int(panels.dtype == torch.bfloat16), ACTIVATIONS.index(activation),
    )  # fmt: skip
    return y


def write_widened(g: Builder, weight: str) -> str:
    """Write a matrix as float32 (N, K) in standard operators, once for each: its name."""
    return g.shared(
        f"{weight} in float32", lambda: g.op("Cast", (weight,), g.unique(f"{weight}.float32"), to=1)
    )


def _write_turned(g: Builder, weight: str) -> str:
    """Write it as float32 (K, N), once for each."""
    wide = write_widened(g, weight)
    return g.shared(
        f"{wide} turned", lambda: g.op("Transpose", (wide,), g.unique(f"{weight}.turned"), perm=[1, 0])
    )


def _portable(g: Builder, inputs: Sequence[str], outputs: Sequence[str], attributes: Attributes) -> None:
    x, weight, bias = inputs
    (y,) = outputs
    activation = attributes["activation"]
    last = f"{y}.sum" if activation != "none" else y
    total = g.op("MatMul", (x, _write_turned(g, weight)), f"{y}.matmul" if bias else last)
    if bias:
        total = g.op("Add", (total, bias), last)
    write_activation(g, total, activation, y)


def _shapes(shapes: Sequence[Any], attributes: Attributes) -> Sequence[Shape]:
    return [(*shapes[0][:-1], shapes[1][0])]


SPEC = OpSpec(
    name="half_linear",
    summary="activation(x W^T + b) for W of 16 bits",
    forward=("half_linear", "half_panels"),
    functions=("half_linear", "half_linear_no_bias"),
    nodes=(
        Node(
            op_type="HalfLinear",
            torch=(),  # export writes it where a model has a matrix, see compile/quantized_graph.py
            inputs=(Input("x"), Input("weight", dtype="|".join(DTYPES)), Input("bias", optional=True)),
            outputs=("y",),
            attributes=(Attribute("activation", str, default="none", choices=ACTIVATIONS),),
            shapes=_shapes,
            portable=_portable,
            rowwise=True,
            packed=("weight",),
        ),
    ),
)
