"""Embedding from a quantized table: rows by token id, as float32. The table is as core/ops/quantized.py says.

Shapes: ids (...) int64, in graphs (B, T); weight (V, G, g * bits / 8) uint8, scale (V, G), zero (V, ceil(G * bits / 8))
uint8; the result (..., K). For inference: it has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from portlm.ops import few_rows, lazy
from portlm.ops.kernel_op import has_kernel, kernels
from portlm.ops.narrow import check_ids, check_range, run_rows
from portlm.ops.quantized import (
    Layout,
    check_packed,
    check_scales,
    check_weight,
    dequantized,
    pack,
    width,
    write_rows,
)
from portlm.ops.spec import Attribute, Attributes, Builder, Input, Node, OpSpec, Shape

if TYPE_CHECKING:
    from torch import Tensor
else:
    lazy.bind(globals(), Tensor="torch:Tensor")

__all__ = ["quantized_embedding", "quantized_embedding_reference"]


def quantized_embedding_reference(
    ids: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None = None, bits: int = 4
) -> Tensor:
    """Compute the definition in plain PyTorch: the oracle of the tests and the fallback without a kernel."""
    return dequantized(weight[ids], scale[ids], None if zero is None else zero[ids], bits)


def quantized_embedding(
    ids: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None = None,
    bits: int = 4,
    packed: Tensor | None = None,
) -> Tensor:
    """Return rows of the table (V, K) that quantized numbers mean.

    Args:
        ids: (...) int64, each in [0, V).
        weight: (V, G, g * bits / 8) uint8.
        scale: (V, G).
        zero: (V, ceil(G * bits / 8)) uint8; None for 2^(bits - 1).
        bits: 4 or 8.
        packed: what portlm.ops.quantized.pack gives of the table, which is made now if it is None.

    Returns:
        (..., K).

    Raises:
        ValueError: the parts of the table do not fit each other, or ids are not int64.
        IndexError: an id is outside [0, V); the message names it and V. CUDA's kernel, for which nobody waits, gives
            NaN instead.
    """
    check_weight("quantized_embedding", weight, scale, zero, bits)
    check_ids("quantized_embedding", ids)
    if few_rows.takes(weight, scale) and ids.device == weight.device and few_rows.takes_packed(weight, bits):
        scales = pack(weight, scale, zero, bits) if packed is None else packed
        check_scales("quantized_embedding", scales, weight)
        return few_rows.packed_rows(ids, weight, scales, zero, bits, scale.dtype)
    if has_kernel(scale) and weight.is_cpu and ids.is_cpu:
        packed = pack(weight, scale, zero, bits) if packed is None else packed
        if packed.numel():
            layout = Layout.of(weight.shape, bits, zero is not None)
            check_packed("quantized_embedding", packed, layout)
            return run_rows("quantized_embedding", kernels.packed_rows, ids, packed, layout)
    check_range("quantized_embedding", ids, len(weight))
    return quantized_embedding_reference(ids, weight, scale, zero, bits)


def _portable(g: Builder, inputs: Sequence[str], outputs: Sequence[str], attributes: Attributes) -> None:
    ids, weight, scale, zero = inputs
    write_rows(g, weight, scale, zero, ids, attributes["bits"], outputs[0])


def _shapes(shapes: Sequence[Any], attributes: Attributes) -> Sequence[Shape]:
    return [(*shapes[0], width(shapes[1], attributes["bits"]))]


SPEC = OpSpec(
    name="quantized_embedding",
    summary="rows of a table of 4 or 8 bits by token id",
    forward=("packed_rows", "pack_matrix"),
    cuda=("packed_rows",),
    functions=("packed_rows",),
    nodes=(
        Node(
            op_type="QuantizedEmbedding",
            torch=(),  # export writes it where a model looks tokens up, see compile/quantized_graph.py
            inputs=(
                Input("ids", dtype="int64"),
                Input("weight", dtype="uint8"),
                Input("scale"),
                Input("zero", dtype="uint8", optional=True),
            ),
            outputs=("y",),
            attributes=(Attribute("bits", int),),
            shapes=_shapes,
            portable=_portable,
            packed=("weight", "scale", "zero"),
        ),
    ),
)
