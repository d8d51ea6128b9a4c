"""Linear map on quantized weights, y = activation(x W^T + b), W as core/ops/quantized.py says.

Shapes: x is (..., K), weight (N, G, g * bits / 8) uint8, scale (N, G), zero (N, ceil(G * bits / 8)) uint8, bias (N,),
y (..., N). For inference: it has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from portlm.ops import few_rows, lazy
from portlm.ops.kernel_op import has_kernel, kernels
from portlm.ops.narrow import ACTIVATIONS, check_linear, linear_reference, run_linear, write_linear
from portlm.ops.quantized import (
    Layout,
    check_packed,
    check_scales,
    check_weight,
    dequantized,
    pack,
    width,
    write_matrix,
)
from portlm.ops.spec import Attribute, Attributes, Builder, Input, Node, OpSpec, Shape

if TYPE_CHECKING:
    from torch import Tensor
else:
    lazy.bind(globals(), Tensor="torch:Tensor")

__all__ = ["quantized_linear", "quantized_linear_reference"]


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
    return linear_reference(x, dequantized(weight, scale, zero, bits).to(x.dtype), bias, activation)


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

    The CPU's kernel rounds x to 15 bits, group by group, and gives the same bits on any number of threads. CUDA's takes
    x of float32 or bfloat16 as it is and computes in float32; more than a few rows are a product of what W means.

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
    check_weight("quantized_linear", weight, scale, zero, bits)
    check_linear("quantized_linear", x, len(weight), width(weight.shape, bits), bias, activation)
    if few_rows.takes(weight, x, bias) and few_rows.takes_packed(weight, bits):
        scales = pack(weight, scale, zero, bits) if packed is None else packed
        check_scales("quantized_linear", scales, weight)
        return few_rows.packed_linear(x, weight, scales, zero, bias, bits, activation)
    if has_kernel(x, scale, bias) and weight.is_cpu:
        packed = pack(weight, scale, zero, bits) if packed is None else packed
        if packed.numel():
            layout = Layout.of(weight.shape, bits, zero is not None)
            check_packed("quantized_linear", packed, layout)
            return run_linear(kernels.packed_linear, x, packed, bias, layout, activation)
    return quantized_linear_reference(x, weight, scale, zero, bias, bits, activation)


def _portable(g: Builder, inputs: Sequence[str], outputs: Sequence[str], attributes: Attributes) -> None:
    x, weight, scale, zero, bias = inputs
    matrix = write_matrix(g, weight, scale, zero, attributes["bits"])
    write_linear(g, x, matrix, bias, attributes["activation"], outputs[0])


def _shapes(shapes: Sequence[Any], attributes: Attributes) -> Sequence[Shape]:
    return [(*shapes[0][:-1], shapes[1][0])]


SPEC = OpSpec(
    name="quantized_linear",
    summary="activation(x W^T + b) for W of 4 or 8 bits",
    forward=("packed_linear", "pack_matrix"),
    cuda=("packed_linear",),
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
