"""The portable graph on Vulkan: TVM's importer, its schedules for GPUs, and its kernels in WGSL.

WGSL has no 64 bits and no bytes, so the graph's whole numbers become 32 bits wide before TVM sees them; whoever runs
the library converts its inputs, with a look at their range. What TVM gets wrong there is left out: negative indices,
which no graph of portlm has, would be counted in 64 bits.
"""

from typing import TYPE_CHECKING, Any

import onnx
from onnx import TensorProto

from portlm.compile.tvm_build import Graph, Lowering
from portlm.compile.tvm_portable import bound_gathers, import_graph
from portlm.errors import FormatError

if TYPE_CHECKING:
    import tvm

# What every WebGPU device has; kernels for more threads would run on fewer devices.
MOST_THREADS, SHARED_BYTES = 256, 16384
_NARROW = {TensorProto.INT64: TensorProto.INT32}
_READABLE = (
    TensorProto.FLOAT,
    TensorProto.INT32,
    TensorProto.UNDEFINED,
)  # the last of inner values, which are floats


def in_32_bits(graph: Graph) -> Graph:
    """The graph with inputs of whole numbers in 32 bits.

    Raises:
        FormatError: a weight or an input has a type that kernels in WGSL cannot read.
    """
    if graph.packed:
        raise FormatError("tvm:vulkan has no form for quantized weights yet: export without --quantize")
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    for value in (*proto.graph.input, *proto.graph.output):
        kind = value.type.tensor_type
        kind.elem_type = _NARROW.get(kind.elem_type, kind.elem_type)
        if kind.elem_type not in _READABLE:
            name = TensorProto.DataType.Name(kind.elem_type).lower()
            raise FormatError(f"tvm:vulkan has no form for {value.name}, a tensor of {name}")
    return Graph(proto, graph.weights_file, graph.weights, graph.packed, graph.panels)


def trust_indices(module: "tvm.IRModule") -> "tvm.IRModule":
    """Take indices as they are: where(i < 0, i + size, i), as the importer writes it, becomes i."""
    from tvm import ir, relax
    from tvm.relax.expr_functor import PyExprMutator, mutator

    where, less = ir.Op.get("relax.where"), ir.Op.get("relax.less")

    @mutator
    class Trust(PyExprMutator):
        def visit_call_(self, call: relax.Call) -> relax.Expr:
            call = self.visit_expr_post_order(call)
            if call.op != where or not isinstance(call.args[0], relax.Var):
                return call
            condition = self.lookup_binding(call.args[0])
            compared = isinstance(condition, relax.Call) and condition.op == less
            return call.args[2] if compared and condition.args[0].same_as(call.args[2]) else call

    trust = Trust(module)
    for name, function in module.functions_items():
        if isinstance(function, relax.Function):
            trust.builder_.update_func(name, trust.visit_expr(function))
    return relax.transform.DeadCodeElimination()(trust.builder_.get())


def target(host: "tvm.target.Target") -> "tvm.target.Target":
    """TVM's target: kernels in WGSL, and what calls them for the host."""
    import tvm

    return tvm.target.Target(
        {"kind": "webgpu", "max_num_threads": MOST_THREADS, "max_shared_memory_per_block": SHARED_BYTES}, host
    )


def gpu_passes(target: "tvm.target.Target") -> "list[tvm.ir.transform.Pass]":
    """TVM's own passes for GPUs."""
    from tvm.relax.backend.gpu_generic import pipeline

    steps: list[Any] = [
        *pipeline.library_dispatch_passes(target),
        *pipeline.legalize_passes(target),
        *pipeline.dataflow_lower_passes(target),
        *pipeline.finalize_passes(target),
    ]
    return steps


LOWERING = Lowering(
    "portable",
    [
        ("In32Bits", in_32_bits),
        ("ImportGraph", import_graph),
        ("TrustIndices", trust_indices),
        ("BoundGathers", bound_gathers),
    ],
    gpu_passes,
    "bytecode",
    "vulkan",
    target,
)
