"""Graphs on Vulkan: the portable one by TVM's importer and its schedules for GPUs, the fused one by our kernels.

Kernels of both are WGSL, which has no bytes: the portable graph has no form for quantized weights here.
"""

from typing import TYPE_CHECKING

from onnx import helper

from portlm import tvm_vulkan
from portlm.compile.tvm_build import Graph, Lowering
from portlm.compile.tvm_gpu_fused import in_panels, lower
from portlm.compile.tvm_gpu_portable import plain_casts, trust_indices
from portlm.compile.tvm_gpu_schedule import gpu_passes
from portlm.compile.tvm_portable import bound_gathers, import_graph
from portlm.errors import EngineUnavailableError

if TYPE_CHECKING:
    pass

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
