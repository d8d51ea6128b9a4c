"""Graphs on Vulkan: the portable one by TVM's importer and its schedules for GPUs, the fused one by our kernels.

Kernels of both are WGSL, which has no bytes: the portable graph has no form for quantized weights here. What the
importer does for negative indices, which no graph of portlm has, is left out: it would be four kernels for each lookup.
"""

from typing import TYPE_CHECKING, Any

from onnx import helper

from portlm import tvm_vulkan
from portlm.compile.tvm_build import Graph, Lowering
from portlm.compile.tvm_gpu_fused import in_panels, lower
from portlm.compile.tvm_portable import bound_gathers, import_graph
from portlm.compile.tvm_vulkan_schedule import gpu_passes
from portlm.errors import EngineUnavailableError

if TYPE_CHECKING:
    import tvm

_READABLE = {"float32", "int64", "int32"}  # by kernels in WGSL, int64 as int32


def readable(graph: Graph) -> Graph:
    """The graph as it is.

    Raises:
        EngineUnavailableError: a weight or an input has a type that kernels in WGSL cannot read.
    """
    if graph.packed:
        raise EngineUnavailableError(
            "tvm:vulkan has no portable form for quantized weights: compile --profile fused"
        )
    return readable_inputs(graph)


def readable_inputs(graph: Graph) -> Graph:
    """The graph as it is.

    Raises:
        EngineUnavailableError: an input has a type that kernels in WGSL cannot read.
    """
    for value in graph.proto.graph.input:
        dtype = str(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
        if dtype not in _READABLE:
            raise EngineUnavailableError(f"tvm:vulkan has no form for {value.name}, a tensor of {dtype}")
    return graph


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

    return _mutated(module, Trust(module))


def plain_casts(module: "tvm.IRModule") -> "tvm.IRModule":
    """Cast to int32 at once: the importer takes a detour through 64 bits, to wrap numbers that are too large.

    No graph of portlm has such numbers, or any that are not finite, where it casts.
    """
    from tvm import ir, relax
    from tvm.relax.expr_functor import PyExprMutator, mutator

    cast, where, mod, negation = (
        ir.Op.get(f"relax.{name}") for name in ("astype", "where", "floor_mod", "logical_not")
    )

    @mutator
    class Plain(PyExprMutator):
        def made_by(self, op: ir.Op, value: relax.Expr) -> relax.Call | None:
            """The call of an operator that a value is the result of, or None."""
            made = self.lookup_binding(value) if isinstance(value, relax.Var) else value
            return made if isinstance(made, relax.Call) and made.op == op else None

        def visit_call_(self, call: relax.Call) -> relax.Expr:
            call = self.visit_expr_post_order(call)
            if call.op != cast or str(call.attrs.dtype) != "int32":
                return call
            if (wrapped := self.made_by(where, call.args[0])) is None:
                return call
            if (rest := self.made_by(mod, wrapped.args[2])) is None:
                return call
            if (wide := self.made_by(cast, rest.args[0])) is None:
                return call
            finite = self.made_by(where, wide.args[0])
            known = finite is not None and self.made_by(negation, finite.args[0]) is not None
            return relax.op.astype(finite.args[2] if known else wide.args[0], "int32")

    return _mutated(module, Plain(module))


def _mutated(module: "tvm.IRModule", mutator: Any) -> "tvm.IRModule":
    """What a mutator makes of a module's functions, without what nobody uses any more."""
    from tvm import relax

    for name, function in module.functions_items():
        if isinstance(function, relax.Function):
            mutator.builder_.update_func(name, mutator.visit_expr(function))
    return relax.transform.DeadCodeElimination()(mutator.builder_.get())


PORTABLE = Lowering(
    "portable",
    [
        ("Readable", readable),
        ("ImportGraph", import_graph),
        ("TrustIndices", trust_indices),
        ("PlainCasts", plain_casts),
        ("BoundGathers", bound_gathers),
    ],
    gpu_passes,
    "bytecode",
    "vulkan",
    tvm_vulkan.target,
    language="wgsl",
)
FUSED = Lowering(
    "fused",
    [("Readable", readable_inputs), ("CallKernels", lower)],
    gpu_passes,
    "bytecode",
    "vulkan",
    tvm_vulkan.target,
    in_panels,
    language="wgsl",
)
