"""Linear map on weights of 16 bits, y = activation(x W^T + b) in float32, W as core/ops/half.py says.

Shapes: x is (..., K), weight (N, K) float16 or bfloat16, bias (N,), y (..., N). For inference: it has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from portlm.ops import few_rows, lazy
from portlm.ops.half import DTYPES, check_weight, pack
from portlm.ops.kernel_op import has_kernel, kernels
from portlm.ops.narrow import ACTIVATIONS, check_linear, linear_reference, run_linear, write_linear
from portlm.ops.spec import Attribute, Attributes, Builder, Input, Node, OpSpec, Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", Tensor="torch:Tensor")

__all__ = ["half_linear", "half_linear_reference", "write_widened"]


def half_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """Compute the definition in plain PyTorch: the oracle of the tests and the fallback without a kernel."""
    return linear_reference(x, weight.to(x.dtype), bias, activation)


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
    check_weight("half_linear", weight, packed)
    N, K = weight.shape
    check_linear("half_linear", x, N, K, bias, activation)
    if few_rows.takes(weight, x, bias):
        return few_rows.dense_linear(x, weight, bias, activation)
    if has_kernel(x, bias) and weight.is_cpu:
        packed = pack(weight) if packed is None else packed
        if packed.dtype == weight.dtype:
            sizes = (N, K, int(weight.dtype == torch.bfloat16))
            return run_linear(kernels.half_linear, x, packed, bias, sizes, activation)
    wide = weight if packed is None or packed.dtype == weight.dtype else packed
    return half_linear_reference(x, wide, bias, activation)


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
    write_linear(g, x, _write_turned(g, weight), bias, attributes["activation"], outputs[0])


def _shapes(shapes: Sequence[Any], attributes: Attributes) -> Sequence[Shape]:
    return [(*shapes[0][:-1], shapes[1][0])]


SPEC = OpSpec(
    name="half_linear",
    summary="activation(x W^T + b) for W of 16 bits",
    forward=("half_linear", "half_panels"),
    cuda=("dense_linear",),
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
