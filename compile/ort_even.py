"""The graph for calls in which nothing is masked: attention needs no mask there, rotates, and reads one product.

Row b of such a call is at slot P + t with its token t, so GroupQueryAttention's own rotary embedding and its own idea
of what is visible are right, and it takes its blocked kernel, which takes no bias. The position of the last token says
how many slots there are. So the mask, whose shape changes from step to step, is not read, and whoever runs the graph
need not bind it again: the metadata says so (portlm.ort_support.UNREAD). Queries, keys and values come from one
product: their weights lie one behind the other in a constant that ONNX Runtime makes when it opens the graph, and no
weight is stored twice.
"""

from collections import Counter
from typing import Any, NamedTuple

import onnx
from onnx import helper

from portlm.compile.check import CONTRIB
from portlm.compile.graph import GraphBuilder, WeightFile
from portlm.compile.ort_quantized import is_product, write_product
from portlm.ops.registry import nodes
from portlm.ops.spec import DOMAIN, DOMAIN_VERSION

MASK, POSITIONS = "attention_mask", "position_ids"
ROTARY_WIDTH = 16  # of a head: GroupQueryAttention rotates multiples of it


class Absorbed(NamedTuple):
    """What one attention node takes over.

    Attributes:
        qkv: its queries, keys and values before that.
        tables: cos and sin, if it rotates.
        rotaries: nodes that it stands for.
        products: of queries, keys and values, if they are to be one.
    """

    qkv: tuple[str, ...]
    tables: tuple[str, ...]
    rotaries: tuple[onnx.NodeProto, ...]
    products: tuple[onnx.NodeProto, ...]


def can_be_even(model: onnx.ModelProto) -> bool:
    """Whether it can be seen from a role's inputs that nothing is masked, and where its tokens are."""
    names = {value.name for value in model.graph.input}
    attention = [node for node in model.graph.node if _is(node, "CachedAttention")]
    return {MASK, POSITIONS} <= names and all(node.input[5] == MASK for node in attention)


def even_attention(model: onnx.ModelProto, context_length: int, metadata: dict[str, str]) -> onnx.ModelProto:
    """The graph with its CachedAttention nodes, and what they absorb, replaced.

    Args:
        model: a graph of the fused profile that can_be_even(), whose caches can grow in place.
        context_length: of the model.
        metadata: of the new graph.
    """
    graph = model.graph
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(value.name for value in graph.output)
    makers = {name: node for node in graph.node for name in node.output}
    g = GraphBuilder(graph.name, {}, WeightFile(""), {DOMAIN: DOMAIN_VERSION, CONTRIB: 1}, context_length)
    g.adopt(graph)
    weights = {tensor.name for tensor in graph.initializer}
    found = {
        node.output[0]: _absorbed(g, node, makers, readers, weights)
        for node in graph.node
        if _is(node, "CachedAttention")
    }
    gone = {
        node.output[0] for absorbed in found.values() for node in (*absorbed.rotaries, *absorbed.products)
    }
    for node in graph.node:
        if _is(node, "CachedAttention"):
            _write(g, node, found[node.output[0]])
        elif node.output[0] not in gone:
            g.copy(node)
    return g.model(metadata)


def _absorbed(
    g: GraphBuilder,
    node: onnx.NodeProto,
    makers: dict[str, onnx.NodeProto],
    readers: Counter[str],
    weights: set[str],
) -> Absorbed:
    """What an attention node can take over from those before it."""
    q, k, v, past_key = node.input[:4]
    rotaries = [makers[name] for name in (q, k) if name in makers and _is(makers[name], "Rotary")]
    tables: tuple[str, ...] = ()
    if rotaries:
        alike = len(rotaries) == 2 and rotaries[0].input[1:] == rotaries[1].input[1:]
        alone = all(readers[rotary.output[0]] == 1 for rotary in rotaries)
        wide = int(g.input_shape(past_key)[3]) % ROTARY_WIDTH == 0
        if not (alike and alone and wide and rotaries[0].input[1] == POSITIONS):
            return Absorbed((q, k, v), (), (), ())
        tables = tuple(rotaries[0].input[2:])
        q, k = (rotary.input[0] for rotary in rotaries)
    products = tuple(makers[name] for name in (q, k, v) if name in makers)
    together = (
        len(products) == 3
        and all(readers[product.output[0]] == 1 for product in products)
        and len({product.input[0] for product in products}) == 1
        and all(name in weights for product in products for name in product.input[1:] if name)
        and (all(_plain(p) for p in products) or is_product(products))
        and len({tuple(map(bool, product.input)) for product in products}) == 1
    )
    return Absorbed((q, k, v), tables, tuple(rotaries), products if together else ())


def _plain(node: onnx.NodeProto) -> bool:
    """Whether a node is a Linear whose matrix is (in, out)."""
    return _is(node, "Linear") and not attributes_of(node)["transposed"]


def _write(g: GraphBuilder, node: onnx.NodeProto, absorbed: Absorbed) -> None:
    """Write GroupQueryAttention for CachedAttention."""
    name, attributes = node.output[0], attributes_of(node)

    def newest() -> str:
        return g.op("Gather", (POSITIONS, g.axis(-1)), "slots.newest", axis=1)  # (B,)

    def last() -> str:
        return g.op("Cast", (g.shared("slots.newest", newest),), "slots.last", to=onnx.TensorProto.INT32)

    def count() -> str:
        first = g.op("Gather", ("slots.newest", g.ints(0)), "slots.first", axis=0)  # (1,), as all are alike
        slots = g.op("Sub", (first, g.ints(-1)), "slots")
        return g.op("Cast", (slots,), "slots.int32", to=onnx.TensorProto.INT32)

    rows, total = g.shared("slots.last", last), g.shared("slots", count)
    qkv = absorbed.qkv
    if absorbed.products:
        qkv = (_product(g, absorbed.products, f"{name}.qkv"), "", "")
    inputs = [*qkv, *node.input[3:5], rows, total, *absorbed.tables]
    bounds = {"local_window_size": attributes["window"], "softcap": attributes["softcap"]}
    g.split_op(
        "GroupQueryAttention", inputs, name, node.output, domain=CONTRIB, scale=attributes["scale"],
        num_heads=attributes["num_heads"], kv_num_heads=attributes["num_kv_heads"],
        do_rotary=int(bool(absorbed.tables)), **{key: bound for key, bound in bounds.items() if bound},
    )  # fmt: skip


def _product(g: GraphBuilder, products: tuple[onnx.NodeProto, ...], name: str) -> str:
    """Write several products of one value as one, with their results side by side."""

    def together(place: int, axis: int) -> str:
        parts = [product.input[place] for product in products]
        return g.op("Concat", parts, f"{name}.{place}", axis=axis)

    x, *rest = products[0].input
    if _is(products[0], "Linear"):
        product = g.op("MatMul", (x, together(1, 1)), f"{name}.matmul" if rest[1:] else name)
        return g.op("Add", (product, together(2, 0)), name) if rest[1:] else product
    given = [together(place, 0) if value else "" for place, value in enumerate(rest, 1)]
    shapes = [g.weight_shape(product.input[1]) for product in products]
    shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    return write_product(g, (x, *given), shape, attributes_of(products[0])["bits"], name)


def _is(node: onnx.NodeProto, op_type: str) -> bool:
    return bool(node.domain == DOMAIN and node.op_type == op_type)


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes of a node of ai.portlm, defaults filled in."""
    written = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    found = {a.name: written.get(a.name, a.default) for a in nodes()[node.op_type].attributes}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}
