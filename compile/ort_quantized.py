"""Nodes on quantized weights as ONNX Runtime's own: their weights are taken as they lie in the file."""

from collections.abc import Sequence

import onnx
from onnx import helper

from portlm.compile.check import CONTRIB
from portlm.compile.graph import GraphBuilder
from portlm.ops.narrow import write_activation
from portlm.ops.quantized import width
from portlm.ort_support import EXACT, accuracy_level


def matmul_nbits(g: GraphBuilder, node: onnx.NodeProto, device: str) -> bool:
    """QuantizedLinear: MatMulNBits and the activation, which takes the bias where ORT has one that does.

    Not on the CPU for 8 bits and float32 activations, where it takes ten times as long as float32 weights: the portable
    form is left, of which ORT makes float32 weights when it opens the graph.
    """
    if node.op_type != "QuantizedLinear":
        return False
    x, weight, scale, zero, bias = (*node.input, "", "")[:5]
    said = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if said["bits"] == 8 and device == "cpu" and accuracy_level() == EXACT:
        return False
    activation, y = said.get("activation", b"none").decode(), node.output[0]
    later = {"gelu": "BiasGelu", "gelu_tanh": "FastGelu"}.get(activation, "") if bias else ""
    total = write_product(
        g,
        (x, weight, scale, zero, "" if later else bias),
        g.weight_shape(weight),
        said["bits"],
        y if activation == "none" else f"{y}.matmul" if later else f"{y}.sum",
    )
    if later:
        g.op(later, (total, bias), y, domain=CONTRIB)
    else:
        write_activation(g, total, activation, y)
    return True


def write_product(g: GraphBuilder, inputs: Sequence[str], shape: Sequence[int], bits: int, name: str) -> str:
    """Write MatMulNBits.

    Args:
        g: takes it.
        inputs: x, weight, scale, zero, bias; "" or nothing for the last two.
        shape: of the weight, (N, G, bytes of a group).
        bits: of a weight.
        name: of the product.
    """
    x, weight, scale, zero, bias = (*inputs, "", "")[:5]
    given = [x, weight, scale, zero, "", bias]
    while not given[-1]:
        given.pop()
    N, G, size = shape
    return g.op(
        "MatMulNBits",
        given,
        name,
        domain=CONTRIB,
        K=width((N, G, size), bits),
        N=N,
        accuracy_level=accuracy_level(),
        bits=bits,
        block_size=size * 8 // bits,
    )


def is_product(products: Sequence[onnx.NodeProto]) -> bool:
    """Whether nodes are MatMulNBits on the CPU alike, and nothing else."""
    if any(node.op_type != "QuantizedLinear" for node in products):
        return False
    said = [{a.name: helper.get_attribute_value(a) for a in node.attribute} for node in products]
    alike = all(attributes == said[0] for attributes in said)
    exact = said[0]["bits"] == 8 and accuracy_level() == EXACT
    return alike and not exact and said[0].get("activation", b"none") == b"none"


def gather_block_quantized(g: GraphBuilder, node: onnx.NodeProto, device: str) -> bool:
    """QuantizedEmbedding: GatherBlockQuantized, which wants the bytes of a row without the cut into groups.

    Not on Vulkan where a row's zero points end in half a byte: WebGPU's takes the other half for one too many.
    """
    if node.op_type != "QuantizedEmbedding":
        return False
    ids, weight, scale, *zero = node.input
    bits = helper.get_attribute_value(next(a for a in node.attribute if a.name == "bits"))
    V, G, size = g.weight_shape(weight)
    if device == "vulkan" and zero and G * bits % 8:
        return False
    rows = g.shared(
        f"{weight} in rows",
        lambda: g.op("Reshape", (weight, g.ints(V, G * size)), g.unique(f"{weight}.rows")),
    )
    g.op(
        "GatherBlockQuantized",
        (rows, ids, scale, *zero),
        node.output[0],
        domain=CONTRIB,
        bits=bits,
        block_size=size * 8 // bits,
        gather_axis=0,
        quantize_axis=1,
    )
    return True
