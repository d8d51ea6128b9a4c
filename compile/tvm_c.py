"""The portable graph as C with OpenMP: TVM's importer, its C source, and a C compiler's threads.

TVM's C has no threads. Loops whose iterations do not depend on each other are found by its own schedules and get a
name, by which they are found again in the source, and a pragma of OpenMP. It is there to be compared with other back
ends (portlm.compile.tvm_backends): the engine on the CPU takes TVM's machine code and portlm's kernels.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portlm.compile.tvm_build import Lowering
from portlm.compile.tvm_gpu_portable import trust_indices
from portlm.compile.tvm_portable import bound_gathers, import_graph

if TYPE_CHECKING:
    import tvm

OPTIONS = ("-O2", "-fopenmp")  # of the C compiler
# A loop that was fused with one of a single iteration, which a schedule calls u.
_NAMED = re.compile(r"^( *)(?=for \(int\d+_t u(?:_\d+)?_\w*fused\w* = )", re.MULTILINE)


def c_target(host: "tvm.target.Target") -> "tvm.target.Target":
    """TVM's target for C, whatever the processor."""
    import tvm

    return tvm.target.Target("c")


def c_passes(target: "tvm.target.Target") -> "list[tvm.ir.transform.Pass]":
    """TVM's own passes for CPUs, with outermost loops named that threads may share."""
    import tvm
    from tvm.relax.backend.cpu_generic import pipeline

    @tvm.transform.module_pass(opt_level=0, name="NameParallelLoops")
    def named(module: "tvm.IRModule", _: Any) -> "tvm.IRModule":
        for name, function in module.functions_items():
            if isinstance(function, tvm.tirx.PrimFunc):
                module[name] = name_parallel_loops(function)
        return module

    return [
        *pipeline.library_dispatch_passes(target),
        *pipeline.legalize_passes(target),
        named,
        *pipeline.dataflow_lower_passes(target),
        *pipeline.finalize_passes(target),
    ]


def name_parallel_loops(function: "tvm.tirx.PrimFunc") -> "tvm.tirx.PrimFunc":
    """The function, in which the outermost loop of each computation has a name of ours if TVM finds it parallel."""
    from tvm import s_tir

    schedule = s_tir.Schedule(function)
    try:
        blocks = schedule.get_child_blocks(schedule.get_sblock("root"))
    except s_tir.ScheduleError:  # one that is written as it is to run
        return function
    for block in blocks:
        loops = schedule.get_loops(block)
        if not loops:
            continue
        tried = schedule.copy()
        try:
            tried.parallel(tried.get_loops(tried.get_sblock(schedule.get(block).name_hint))[0])
        except s_tir.ScheduleError:
            continue
        schedule.fuse(schedule.add_unit_loop(loops[0]), loops[0])
    return schedule.mod["main"]


def with_openmp(source: str) -> str:
    """C source with a pragma before each loop that name_parallel_loops has named."""
    return _NAMED.sub(r"\1#pragma omp parallel for\n\1", source)


def link(output: str, objects: Sequence[str], **options: Any) -> None:
    """Compile and link what TVM has written, C source with OpenMP's pragmas in it: its ``fcompile``."""
    from tvm.support import cc

    for path in map(Path, objects):
        if path.suffix == ".c":
            path.write_text(with_openmp(path.read_text()))
    cc.create_shared(output, objects, options=[*OPTIONS, *options.pop("options", ())], **options)


LOWERING = Lowering(
    "portable",
    [("ImportGraph", import_graph), ("TrustIndices", trust_indices), ("BoundGathers", bound_gathers)],
    c_passes,
    "bytecode",
    "cpu",
    c_target,
    language="c",
)
