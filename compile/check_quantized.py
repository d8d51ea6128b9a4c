"""Whether the parts of quantized weights fit each other, and what a node says of them; the same for weights of 16 bits.

A kernel reads as many bytes as the sizes it is told ask for, and some engines look no further. So sizes that contradict
each other are refused before any engine sees them.
"""

from collections.abc import Mapping
from typing import Any

from portlm.compile.quantize import BITS, GROUPS
from portlm.ops.spec import DOMAIN

Shapes = Mapping[str, tuple[int, ...]]
HALF = (
    (DOMAIN, "HalfLinear"),
    (DOMAIN, "HalfEmbedding"),
)  # whose second input is a weight of 16 bits, the third a bias

# Operators on quantized weights: the places of weight, scales, zero points and bias among their inputs.
_PLACES = {
    (DOMAIN, "QuantizedLinear"): (1, 2, 3, 4),
    (DOMAIN, "QuantizedEmbedding"): (1, 2, 3, None),
    ("com.microsoft", "MatMulNBits"): (1, 2, 3, 5),
    ("com.microsoft", "GatherBlockQuantized"): (0, 2, 3, None),
}


def wrong_sizes(node: Any, weights: Shapes) -> str:
    """Say what does not fit in the weights of a node, in a clause, or "".

    Args:
        node: a NodeProto, or the same as compile/onnx_reader.py reads it, whose form is right.
        weights: shapes of the graph's weights and constants, and of what is a Reshape or a Concat of them.
    """
    if (node.domain, node.op_type) in HALF:
        return _wrong_half(node, weights)
    places = _PLACES.get((node.domain, node.op_type))
    if places is None:
        return ""
    said = {attribute.name: attribute.i for attribute in node.attribute}
    bits = said["bits"]
    names = [node.input[place] if place is not None and place < len(node.input) else "" for place in places]
    weight, scale, zero, bias = names
    for name in filter(None, names):
        if name not in weights:
            return f"reads {name[:80]!r}, which is no weight"
    if bits not in BITS.values():
        return f"has weights of {bits} bits"
    if len(weights[scale]) != 2:
        return f"has scales of the shape {weights[scale]}"
    N, G = weights[scale]
    table = node.op_type == "GatherBlockQuantized"  # its rows are whole
    group = said["block_size"] if table else (weights[weight] or (0,))[-1] * 8 // bits
    if group not in GROUPS:
        return f"has groups of {group} weights"
    size = group * bits // 8
    if weights[weight] != ((N, G * size) if table else (N, G, size)):
        return f"has a weight of the shape {weights[weight]} for scales of the shape {(N, G)}"
    if zero and weights[zero] != (N, -(-G * bits // 8)):
        return f"has zero points of the shape {weights[zero]} for scales of the shape {(N, G)}"
    if bias and weights[bias] != (N,):
        return f"has a bias of the shape {weights[bias]} for {N} outputs"
    wanted = {"N": N, "K": G * group, "block_size": group}
    for name, value in wanted.items():
        if said.get(name, value) != value:
            return f"says {name} is {said[name]}, its weights are for {value}"
    return ""


def together(node: Any, weights: Shapes) -> tuple[int, ...] | None:
    """The shape of weights that a Concat puts one behind the other; None if it does more than that.

    Args:
        node: a Concat, whose form is right.
        weights: as of wrong_sizes().
    """
    if any(name not in weights for name in node.input):
        return None
    shapes, axis = [weights[name] for name in node.input], node.attribute[0].i
    if axis or any(shape[1:] != shapes[0][1:] or not shape for shape in shapes):
        return None
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _wrong_half(node: Any, weights: Shapes) -> str:
    """The same for a node on a weight of 16 bits."""
    weight, *bias = filter(None, node.input[1:])
    for name in (weight, *bias):
        if name not in weights:
            return f"reads {name[:80]!r}, which is no weight"
    if len(weights[weight]) != 2:
        return f"has a weight of the shape {weights[weight]}, which is no matrix"
    if bias and weights[bias[0]] != weights[weight][:1]:
        return f"has a bias of the shape {weights[bias[0]]} for {weights[weight][0]} outputs"
    return ""
