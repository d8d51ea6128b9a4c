"""The portable graph on OpenCL: TVM's importer, its schedules for GPUs, and its kernels in OpenCL C.

OpenCL has the types of the graph, whole numbers of 64 bits and bytes among them, so nothing is cast as for Vulkan. What
the importer does for negative indices, which no graph of portlm has, is left out here, too.
"""

from portlm import tvm_opencl
from portlm.compile.tvm_build import Graph, Lowering
from portlm.compile.tvm_gpu_fused import in_panels, lower
from portlm.compile.tvm_gpu_portable import trust_indices
from portlm.compile.tvm_gpu_schedule import gpu_passes
from portlm.compile.tvm_portable import bound_gathers, import_graph
from portlm.errors import EngineUnavailableError


def unquantized(graph: Graph) -> Graph:
    """The graph as it is.

    Raises:
        EngineUnavailableError: it has quantized weights, which only portlm's own kernels read.
    """
    if graph.packed:
        raise EngineUnavailableError(
            "tvm:opencl has no portable form for quantized weights: compile --profile fused"
        )
    return graph


PORTABLE = Lowering(
    "portable",
    [
        ("Unquantized", unquantized),
        ("ImportGraph", import_graph),
        ("TrustIndices", trust_indices),
        ("BoundGathers", bound_gathers),
    ],
    gpu_passes,
    "bytecode",
    "opencl",
    tvm_opencl.target,
    language="opencl-c",
)
FUSED = Lowering(
    "fused",
    [("CallKernels", lower)],
    gpu_passes,
    "bytecode",
    "opencl",
    tvm_opencl.target,
    in_panels,
    language="opencl-c",
)
