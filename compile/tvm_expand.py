"""Nodes of ai.portlm that have no native function, in standard operators, before TVM's fused lowering calls kernels."""

from collections.abc import Container
from dataclasses import replace

import onnx

from portlm.compile.graph import GraphBuilder, WeightFile
from portlm.compile.ort_lowering import portable_form
from portlm.compile.tvm_build import Graph
from portlm.ops.spec import DOMAIN, DOMAIN_VERSION


def expanded(graph: Graph, known: Container[tuple[str, str]]) -> Graph:
    """Return a graph in which every node of ai.portlm that is not known is written in its standard form.

    Args:
        graph: of the fused profile.
        known: domain and operator of the nodes that stay.
    """
    proto: onnx.ModelProto = graph.proto
    if all(node.domain != DOMAIN or (DOMAIN, node.op_type) in known for node in proto.graph.node):
        return graph
    g = GraphBuilder(proto.graph.name, {}, WeightFile(""), {DOMAIN: DOMAIN_VERSION})
    g.adopt(proto.graph)
    for node in proto.graph.node:
        if node.domain != DOMAIN or (DOMAIN, node.op_type) in known:
            g.copy(node)
        else:
            portable_form(g, node, "cpu")
    return replace(graph, proto=g.model({entry.key: entry.value for entry in proto.metadata_props}))
