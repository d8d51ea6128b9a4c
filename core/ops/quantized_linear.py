"""Linear map on quantized weights, y = activation(x W^T + b), W as core/ops/quantized.py says.

Shapes: x is (..., K), weight (N, G, g * bits / 8) uint8, scale (N, G), zero (N, ceil(G * bits / 8)) uint8, bias (N,),
y (..., N). For inference: it has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from portlm.ops import lazy
from portlm.ops.kernel_op import has_kernel, kernels
from portlm.ops.quantized import Layout, check_packed, check_weight, dequantized, pack, width, write_matrix
from portlm.ops.spec import Attribute, Attributes, Builder, Input, Node, OpSpec, Shape

if TYPE_CHECKING:
    import torch.nn.functional as F
    from torch import Tensor
else:
    lazy.bind(globals(), F="torch.nn.functional", Tensor="torch:Tensor")

__all__ = ["ACTIVATIONS", "quantized_linear", "quantized_linear_reference"]

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu_squared")


def quantized_linear_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    bits: int = 4,
    activation: str = "none",
) -> Tensor:
    """Compute the definition in plain PyTorch: the oracle of the tests and the fallback without a kernel."""
    y = F.linear(x, dequantized(weight, scale, zero, bits), bias)
    if activation == "relu_squared":
        return F.relu(y).square()
    return (
        y if activation == "none" else F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    )


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bias: Tensor | None = None,
    bits: int = 4,
    activation: str = "none",
    packed: Tensor | None = None,
) -> Tensor:
    """Return activation(x W^T + b) for the matrix W (N, K) that quantized numbers mean.

    The kernel rounds x to 15 bits, group by group, and gives the same bits on any number of threads.

    Args:
        x: (..., K).
        weight: (N, G, g * bits / 8) uint8, g consecutive k in a group, with 4 bits the even k in the low half of a
            byte.
        scale: (N, G).
        zero: (N, ceil(G * bits / 8)) uint8; None for 2^(bits - 1).
        bias: (N,).
        bits: 4 or 8.
        activation: "none", "gelu", "gelu_tanh" or "relu_squared".
        packed: what portlm.ops.quantized.pack gives of the weight, which is made now if it is None.

    Returns:
        (..., N).

    Raises:
        ValueError: the shapes do not fit, or there is no such activation; the message names them.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"[quantized_linear] activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    check_weight("quantized_linear", weight, scale, zero, bits)
    K = width(weight.shape, bits)
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(
            f"[quantized_linear] x must be (..., {K}) for weight {tuple(weight.shape)} of {bits} bits, "
            f"got {tuple(x.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"[quantized_linear] bias must be ({weight.shape[0]},) for weight {tuple(weight.shape)}, "
            f"got {tuple(bias.shape)}"
        )
    if has_kernel(x, scale, bias) and weight.is_cpu:
        packed = pack(weight, scale, zero, bits) if packed is None else packed
        if packed.numel():
            layout = Layout.of(weight.shape, bits, zero is not None)
            check_packed("quantized_linear", packed, layout)
            return _run(x.contiguous(), packed, bias, layout, activation)
    return quantized_linear_reference(x, weight, scale, zero, bias, bits, activation)


def _run(x: Tensor, packed: Tensor, bias: Tensor | None, layout: Layout, activation: str) -> Tensor:
    y = x.new_empty((*x.shape[:-1], layout.N))
    bias = bias if bias is None else bias.contiguous()
    kernels.packed_linear(
        x.data_ptr(), packed.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(), y.shape[:-1].numel(),
        *layout, ACTIVATIONS.index(activation),
    )  # fmt: skip
    return y


def _portable(g: Builder, inputs: Sequence[str], outputs: Sequence[str], attributes: Attributes) -> None:
    x, weight, scale, zero, bias = inputs
    (y,) = outputs
    activation = attributes["activation"]
    last = f"{y}.sum" if activation != "none" else y
    matrix = write_matrix(g, weight, scale, zero, attributes["bits"])
    total = g.op("MatMul", (x, matrix), f"{y}.matmul" if bias else last)
    if bias:
        total = g.op("Add", (total, bias), last)
    write_activation(g, total, activation, y)


def write_activation(g: Builder, total: str, activation: str, y: str) -> None:
    """Write an activation of a value in standard operators; nothing for "none"."""
    if activation == "relu_squared":
        positive = g.op("Relu", (total,), f"{y}.relu")
        g.op("Mul", (positive, positive), y)
    elif activation != "none":
        g.op("Gelu", (total,), y, approximate="tanh" if activation == "gelu_tanh" else "none")


def _shapes(shapes: Sequence[Any], attributes: Attributes) -> Sequence[Shape]:
    return [(*shapes[0][:-1], shapes[1][0])]


SPEC = OpSpec(
    name="quantized_linear",
    summary="activation(x W^T + b) for W of 4 or 8 bits",
    forward=("packed_linear", "pack_matrix"),
    functions=("packed_linear", "packed_linear_no_bias", "packed_linear_a8", "packed_linear_a8_no_bias"),
    nodes=(
        Node(
            op_type="QuantizedLinear",
            torch=(),  # export writes it where a model has a matrix, see compile/quantized_graph.py
            inputs=(
                Input("x"),
                Input("weight", dtype="uint8"),
                Input("scale"),
                Input("zero", dtype="uint8", optional=True),
                Input("bias", optional=True),
            ),
            outputs=("y",),
            attributes=(
                Attribute("bits", int),
                Attribute("activation", str, default="none", choices=ACTIVATIONS),
            ),
            shapes=_shapes,
            portable=_portable,
            rowwise=True,
            packed=("weight", "scale", "zero"),
        ),
    ),
)
