"""From a role's graph to a TVM library: the entry of all of them, whose lowerings are in files of their own."""

from pathlib import Path

from portlm.artifact import Compiled
from portlm.compile import tvm_cuda, tvm_fused, tvm_opencl, tvm_portable, tvm_vulkan
from portlm.compile.passes import Note, ignore
from portlm.compile.tvm_build import build_library

LOWERINGS = {
    (lowering.device, lowering.profile): lowering
    for lowering in (
        tvm_portable.LOWERING,
        tvm_fused.LOWERING,
        tvm_vulkan.PORTABLE,
        tvm_vulkan.FUSED,
        tvm_cuda.PORTABLE,
        tvm_cuda.FUSED,
        tvm_opencl.PORTABLE,
        tvm_opencl.FUSED,
    )
}


def compile_library(
    folder: str | Path, device: str, profile: str, role: str = "decoder", note: Note = ignore
) -> Compiled:
    """Compile a role's graph to compiled/tvm-<device>-<profile>; see tvm_build.build_library for what it raises.

    Args:
        folder: the artifact.
        device: "cpu", "cuda", "vulkan" or "opencl".
        profile: "portable" or "fused".
        role: whose graph it is.
        note: called with the name of each pass and the module after it.
    """
    return build_library(Path(folder), LOWERINGS[device, profile], role, note)
