"""The portable graph through TVM's own importer and code generator.

Every operator becomes TVM code: no kernel of portlm runs, so this profile shows what the graph alone gives, on one
thread of any processor TVM knows. Matrix products get the schedule of tvm_schedule.py, those with quantized matrices
that of tvm_quantized.py, the rest TVM's default.
"""

import warnings
from typing import TYPE_CHECKING

import numpy as np
import onnx

from portlm.compile.tvm_build import Graph, Lowering
from portlm.compile.tvm_byte_cache import read_bytes
from portlm.compile.tvm_quantized import read_numbers
from portlm.compile.tvm_schedule import cpu_passes
from portlm.errors import FormatError
from portlm.ops.quantized import width
from portlm.tvm_support import DTYPES, import_tvm

if TYPE_CHECKING:
    import tvm


def import_graph(graph: Graph) -> "tvm.IRModule":
    """The graph as a Relax module whose function main takes the graph's inputs, its weights and its packed matrices.

    Raises:
        FormatError: TVM's importer does not take it.
    """
    import_tvm()
    from tvm.relax.frontend.onnx import from_onnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the importer renames inputs and says so one by one
        try:
            module = from_onnx(_with_weights_as_inputs(graph))
        except Exception as error:  # the importer raises whatever its converters raise
            raise FormatError(f"TVM cannot import this graph: {error}") from error
    if not graph.packed:
        return module
    return read_numbers(module, len(graph.inputs) + len(graph.weights), graph.packed)


def _with_weights_as_inputs(graph: Graph) -> onnx.ModelProto:
    """A copy without weights: each is an input instead, so that TVM neither reads nor stores it. So are matrices.

    Those of 16 bits are float32 to the library, and widened when it is opened: its code would widen them at every call.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    names = {weight.name for weight in graph.weights}
    constants = [tensor for tensor in proto.graph.initializer if tensor.name not in names]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(constants)
    for weight in graph.weights:
        dtype = "float32" if weight.dtype in DTYPES else weight.dtype
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        value = onnx.helper.make_tensor_value_info(weight.name, kind, weight.shape)
        proto.graph.input.append(value)
    for matrix in graph.packed:
        N, K = matrix.weight.shape[0], width(matrix.weight.shape, matrix.bits)
        value = onnx.helper.make_tensor_value_info(matrix.name, onnx.TensorProto.FLOAT, [K, N])
        proto.graph.input.append(value)
    return proto


def bound_gathers(module: "tvm.IRModule") -> "tvm.IRModule":
    """Clamp every gather's indices: the importer's own mode reads wherever a wrong token id points to."""
    from tvm import ir, relax
    from tvm.relax.expr_functor import PyExprMutator, mutator

    take = ir.Op.get("relax.take")

    @mutator
    class Clamp(PyExprMutator):
        def visit_call_(self, call: relax.Call) -> relax.Expr:
            call = self.visit_expr_post_order(call)
            if call.op == take:
                return relax.op.take(call.args[0], call.args[1], axis=call.attrs.axis, mode="clip")
            return call

    clamp = Clamp(module)
    for name, function in module.functions_items():
        if isinstance(function, relax.Function):
            clamp.builder_.update_func(name, clamp.visit_expr(function))
    return clamp.builder_.get()


LOWERING = Lowering(
    "portable",
    [("ImportGraph", import_graph), ("BoundGathers", bound_gathers), ("ReadBytes", read_bytes)],
    cpu_passes,
    "bytecode",
)
