"""One role's portable graph through several of TVM's code generators, with its operators fused and one by one.

What comes out is counted and compared (portlm.flows.backends): the same graph, importer and virtual machine, another
language.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from portlm.compile import tvm_c, tvm_opencl, tvm_vulkan
from portlm.compile.tvm_build import Graph, Lowering, compile_graph, need_linker, read_graph
from portlm.trust import private_scratch
from portlm.tvm_support import DEVICES, LIBRARY, device_module, import_tvm, place, virtual_machine

if TYPE_CHECKING:
    import tvm

BACKENDS: Mapping[str, Lowering] = {
    "c": tvm_c.LOWERING,
    "opencl": tvm_opencl.PORTABLE,
    "wgsl": tvm_vulkan.PORTABLE,
}
"""By the language of the kernels."""
_FUSING = {"FuseOps", "FuseTIR"}
_COUNTED = "RewriteDataflowReshape"  # behind it every call is a kernel: reshapes of memory in order are none


class Compiled(NamedTuple):
    """A graph in the language of a back end, ready to run.

    Attributes:
        call: from the graph's inputs, in order, to its outputs, in order.
        kernels: functions of TVM's that a call runs, each of them a kernel of the device at least.
        where: the device underneath, "" for this processor.
    """

    call: Callable[..., list[np.ndarray]]
    kernels: int
    where: str


def compile_for(artifact: Path, role: str, backend: str, *, fused: bool = True) -> Compiled:
    """Compile a role's portable graph for one of BACKENDS, and load it.

    Args:
        artifact: its folder; its weights are float32.
        role: whose graph it is.
        backend: its language.
        fused: whether TVM makes one kernel of operators that follow each other.

    Raises:
        EngineUnavailableError: a compiler, driver or device is missing; the message says which.
        FormatError: as of portlm.compile.tvm_build.
    """
    need_linker()
    lowering = BACKENDS[backend]
    where = "" if lowering.device not in DEVICES else str(device_module(lowering.device).described())
    device, tvm = place(lowering.device), import_tvm()
    graph, kernels = read_graph(artifact, role, lowering.profile), []

    def count(name: str, module: Any) -> None:
        if name == _COUNTED:
            kernels.append(_calls(module))

    executable = compile_graph(graph, lowering if fused else _one_by_one(lowering), count)
    with private_scratch() as scratch:
        path, how = str(scratch / LIBRARY), {"fcompile": tvm_c.link} if backend == "c" else {}
        executable.export_library(path, workspace_dir=str(scratch), **how)
        machine = virtual_machine(tvm.runtime.load_module(path), device)
    weights = [tvm.runtime.tensor(array, device) for array in _weights(graph, artifact)]

    def call(*inputs: np.ndarray) -> list[np.ndarray]:
        given = [tvm.runtime.tensor(np.ascontiguousarray(array), device) for array in inputs]
        results = machine["main"](*given, *weights)
        return [each.numpy() for each in ([results] if len(graph.outputs) == 1 else results)]

    (counted,) = kernels
    return Compiled(call, counted, where)


def _one_by_one(lowering: Lowering) -> Lowering:
    """The same without the passes that fuse."""
    return lowering._replace(
        relax=lambda target: [step for step in lowering.relax(target) if step.info.name not in _FUSING]
    )


def _calls(module: "tvm.IRModule") -> int:
    """How many functions a module's main calls."""
    from tvm import ir, relax

    call = ir.Op.get("relax.call_tir")
    bindings = (binding for block in module["main"].body.blocks for binding in block.bindings)
    return sum(isinstance(each.value, relax.Call) and each.value.op == call for each in bindings)


def _weights(graph: Graph, artifact: Path) -> list[np.ndarray]:
    file = artifact / graph.weights_file
    return [
        np.fromfile(file, "<f4", int(np.prod(weight.shape)), offset=weight.offset).reshape(weight.shape)
        for weight in graph.weights
    ]
