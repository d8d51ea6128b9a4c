"""Embedding from a table of 16 bits: rows by token id, as float32. The table is as core/ops/half.py says.

Shapes: ids (...) int64, in graphs (B, T); weight (V, K) float16 or bfloat16; the result (..., K). For inference: it has
no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from portlm.ops import lazy
from portlm.ops.half import DTYPES, check_weight, pack
from portlm.ops.half_linear import write_widened
from portlm.ops.kernel_op import has_kernel, kernels
from portlm.ops.narrow import check_ids, check_range, run_rows
from portlm.ops.spec import Attributes, Builder, Input, Node, OpSpec, Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    lazy.bind(globals(), torch="torch", Tensor="torch:Tensor")

__all__ = ["half_embedding", "half_embedding_reference"]


def half_embedding_reference(ids: Tensor, weight: Tensor) -> Tensor:
    """Compute the definition in plain PyTorch: the oracle of the tests and the fallback without a kernel."""
    return weight[ids].float()


def half_embedding(ids: Tensor, weight: Tensor, packed: Tensor | None = None) -> Tensor:
    """Return rows of the table in float32.

    Args:
        ids: (...) int64, each in [0, V).
        weight: (V, K), float16 or bfloat16.
        packed: what portlm.ops.half.pack gives of the table, in whose place it is read.

    Returns:
        (..., K).

    Raises:
        ValueError: the table is not of 16 bits, or ids are not int64.
        IndexError: an id is outside [0, V); the message names it and V.
    """
    check_weight("half_embedding", weight, packed)
    check_ids("half_embedding", ids)
    if has_kernel() and weight.is_cpu and ids.is_cpu:
        packed = pack(weight) if packed is None else packed
        if packed.dtype == weight.dtype:
            sizes = (*weight.shape, int(weight.dtype == torch.bfloat16))
            return run_rows("half_embedding", kernels.half_rows, ids, packed, sizes)
    check_range("half_embedding", ids, len(weight))
    return half_embedding_reference(ids, weight)


def _portable(g: Builder, inputs: Sequence[str], outputs: Sequence[str], attributes: Attributes) -> None:
    # Widened first, which engines do when they open a model: WebGPU looks no bfloat16 up.
    ids, weight = inputs
    g.op("Gather", (write_widened(g, weight), ids), outputs[0], axis=0)


def _shapes(shapes: Sequence[Any], attributes: Attributes) -> Sequence[Shape]:
    return [(*shapes[0], shapes[1][1])]


SPEC = OpSpec(
    name="half_embedding",
    summary="rows of a table of 16 bits by token id",
    forward=("half_rows", "half_panels"),
    functions=("half_rows",),
    nodes=(
        Node(
            op_type="HalfEmbedding",
            torch=(),  # export writes it where a model looks tokens up, see compile/quantized_graph.py
            inputs=(Input("ids", dtype="int64"), Input("weight", dtype="|".join(DTYPES))),
            outputs=("y",),
            shapes=_shapes,
            portable=_portable,
            packed=("weight",),
        ),
    ),
)
