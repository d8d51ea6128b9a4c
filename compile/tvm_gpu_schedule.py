"""Schedules for GPUs: TVM's own for GPUs, and one for what those cannot prove.

TVM fuses all loops over a result before it gives them to threads. Where a size is a sum of several symbols, as behind a
concatenation of caches, it cannot prove what it needs for that, and raises. Such loops are given to threads one by one.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tvm


def gpu_passes(target: "tvm.target.Target") -> "list[tvm.ir.transform.Pass]":
    """TVM's own passes for GPUs, with our fallback in the place of theirs."""
    from tvm.relax import transform
    from tvm.relax.backend.gpu_generic import pipeline
    from tvm.s_tir import dlight

    return [
        *pipeline.library_dispatch_passes(target),
        transform.LegalizeOps(),
        transform.AnnotateTIROpPattern(),
        transform.FoldConstant(),
        transform.FuseOps(),
        transform.FuseTIR(),
        dlight.ApplyDefaultSchedule(
            dlight.gpu.Matmul(),
            dlight.gpu.GEMV(),
            dlight.gpu.Reduction(),
            dlight.gpu.GeneralReduction(),
            _fallback(),
        ),
        *pipeline.dataflow_lower_passes(target),
        *pipeline.finalize_passes(target),
    ]


def _fallback() -> Any:
    from tvm import error
    from tvm.s_tir import dlight

    theirs = dlight.gpu.Fallback()

    class Careful(dlight.ScheduleRule):
        """TVM's fallback, or loops one by one."""

        def apply(self, function: Any, target: Any, tunable: bool) -> Any:
            try:
                return theirs.apply(function, target, tunable)
            except error.InternalError:
                return one_by_one(function, int(target.attrs["max_num_threads"]))

    return Careful()


def one_by_one(function: Any, threads: int) -> Any:
    """Schedule a function without fusing loops of symbolic size: tvm.s_tir.Schedule.

    The innermost loops of known sizes are the threads, the first two others the grid, and each thread walks the rest.
    """
    from tvm import s_tir, tirx

    schedule = s_tir.Schedule(function)
    for block in schedule.get_child_blocks(schedule.get_sblock("root")):
        loops, kinds = schedule.get_loops(block), [v.iter_type for v in schedule.get(block).iter_vars]
        over = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == tirx.IterVar.DataPar]
        inside = [loop for loop in loops if loop not in over]
        schedule.reorder(*over, *inside)
        known: list[Any] = []
        while over and isinstance(schedule.get(over[-1]).extent, tirx.IntImm):
            known.insert(0, over.pop())
        last = schedule.fuse(*known) if known else schedule.add_unit_loop(block if not inside else inside[0])
        grid, lanes = schedule.split(last, factors=[None, threads])
        schedule.bind(lanes, "threadIdx.x")
        axes = [*over[:2]] if over else []
        if not axes:
            schedule.bind(grid, "blockIdx.x")
            continue
        for loop, axis in zip(axes, ("blockIdx.x", "blockIdx.y"), strict=False):
            schedule.bind(loop, axis)
    return schedule
