"""A product of activations and a quantized matrix in TVM's own code: numbers become floats where they are multiplied.

The definition says nothing of a processor. For x (M, K) and a matrix in panels of 64 rows (portlm.panels.byte_panels)
it has two forms, and M decides between them when it runs. Few rows of x meet each number once: they multiply it as it
is, and the sum of a group is multiplied by its scale. For many, a panel is made float32 once, and rows of x are taken
BLOCK at a time. The schedule for a processor is apart, schedule_for_cpu.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from portlm.panels import PANEL
from portlm.tvm_support import Packed

if TYPE_CHECKING:
    import tvm

BLOCK = 4  # rows of x; fewer than so many are few
FORM = "portlm.form"  # attribute of a function that says what its schedule is
NAME = "quantized_product"
ZEROS = 3  # the place of zero points among the parameters
# Columns of a block of sums, whose BLOCK * COLUMNS float32 numbers stay in registers: 8 of 16 registers of 8 numbers,
# or of 32 registers of 16.
COLUMNS = {"x86-64-v4": 32}
FEW_COLUMNS = 16


def read_numbers(module: "tvm.IRModule", first: int, matrices: Sequence[Packed]) -> "tvm.IRModule":
    """Let products read numbers where they read matrices.

    Args:
        module: whose function main has a float32 parameter (K, N) for each matrix, which only products read.
        first: the number of the first of these parameters; nothing follows the last.
        matrices: those that the parameters stand for.

    Returns:
        The module; each such parameter is now the parts of its matrix, in panels.
    """
    from tvm import ir, relax
    from tvm.relax.expr_functor import PyExprMutator, mutator

    matmul = ir.Op.get("relax.matmul")
    main = module["main"]
    by_variable = dict(zip(main.params[first:], matrices, strict=True))
    parts = {
        variable: [relax.Var(f"{matrix.name}.{place}", ty) for place, ty in enumerate(_types(matrix))]
        for variable, matrix in by_variable.items()
    }

    @mutator
    class ReadNumbers(PyExprMutator):
        def visit_call_(self, call: relax.Call) -> relax.Expr:
            call = self.visit_expr_post_order(call)
            if call.op != matmul or call.args[1] not in by_variable:
                return call
            x, matrix = call.args[0], by_variable[call.args[1]]
            *lead, K = x.ty.shape
            N = matrix.weight.shape[0]
            rows = x if len(lead) == 1 else self.builder_.emit(relax.op.reshape(x, [-1, K]))
            function = self.builder_.add_func(define(matrix), NAME)
            result = relax.TensorType([rows.ty.shape[0], N], "float32")
            y = relax.call_tir(function, [rows, *parts[call.args[1]]], result)
            return y if len(lead) == 1 else relax.op.reshape(self.builder_.emit(y), [*lead, N])

    change = ReadNumbers(module)
    body = change.visit_expr(main.body)
    parameters = [*main.params[:first], *(part for group in parts.values() for part in group)]
    change.builder_.update_func(
        module.get_global_var("main"), relax.Function(parameters, body, main.ret_ty, attrs=main.attrs)
    )
    return change.builder_.get()


def _types(matrix: Packed) -> list[Any]:
    """Of the parts of a matrix in panels."""
    from tvm import relax

    N, G, size = matrix.weight.shape
    P = -(-N // PANEL)
    types = [
        relax.TensorType((P, G, size, PANEL), "int8"),
        relax.TensorType((P, G, PANEL), "float32"),
        relax.TensorType((P, G, PANEL), "int8"),
    ]
    return types[: len(matrix.parts())]


def define(matrix: Packed) -> "tvm.tirx.PrimFunc":
    """Return the product y (M, N) = x (M, K) W^T for the sizes of a matrix, for any M, without a schedule.

    Its parameters are x, the parts of the matrix and y.
    """
    from tvm import tirx
    from tvm.script import tirx as T

    rows, groups, size = matrix.weight.shape
    bits, each = matrix.bits, 8 // matrix.bits
    N, G, B, W = (T.int64(extent) for extent in (rows, groups, size, PANEL))
    P, R, g = T.int64(-(-rows // PANEL)), T.int64(BLOCK), T.int64(size * each)
    K, per = T.int64(groups * size * each), T.int64(each)

    def number(q: Any, z: Any, p: Any, group: Any, k: Any, j: Any) -> Any:
        """What is stored for row j of a panel, less its zero point, as float32: shifted up and back for its sign."""
        byte, down = q[p, group, k // per, j].astype("int32"), T.int32(32 - bits)
        if each > 1:
            byte = (byte << (down - (k % per).astype("int32") * bits)) >> down
        return (byte - z[p, group, j].astype("int32") if matrix.zero else byte).astype("float32")

    @T.prim_func(s_tir=True, private=True)
    def product(x_: T.handle, q_: T.handle, s_: T.handle, z_: T.handle, y_: T.handle) -> None:
        M = T.int64()
        x = T.match_buffer(x_, (M, K), "float32")
        q = T.match_buffer(q_, (P, G, B, W), "int8")
        s = T.match_buffer(s_, (P, G, W), "float32")
        z = T.match_buffer(z_, (P, G, W), "int8")
        y = T.match_buffer(y_, (M, N), "float32")
        if M < R:
            with T.sblock("few"):
                partial = T.sblock_alloc_buffer((M, P, G, W), "float32")
                total = T.sblock_alloc_buffer((M, P, W), "float32")
                for m, p, j, group, k in T.grid(M, P, W, G, g):
                    with T.sblock("partial"):
                        vm, vp, vg, vj, vk = T.axis.remap("SSSSR", [m, p, group, j, k])
                        with T.init():
                            partial[vm, vp, vg, vj] = T.float32(0)
                        partial[vm, vp, vg, vj] += x[vm, vg * g + vk] * number(q, z, vp, vg, vk, vj)
                for m, p, j, group in T.grid(M, P, W, G):
                    with T.sblock("total"):
                        vm, vp, vj, vg = T.axis.remap("SSSR", [m, p, j, group])
                        with T.init():
                            total[vm, vp, vj] = T.float32(0)
                        total[vm, vp, vj] += partial[vm, vp, vg, vj] * s[vp, vg, vj]
                for m, p, j in T.grid(M, P, W):
                    with T.sblock("few_results"):
                        vm, vp, vj = T.axis.remap("SSS", [m, p, j])
                        if vp * W + vj < N:
                            y[vm, vp * W + vj] = total[vm, vp, vj]
        else:
            with T.sblock("many"):
                w = T.sblock_alloc_buffer((P, G, g, W), "float32")
                sums = T.sblock_alloc_buffer(((M + R - 1) // R, R, P, W), "float32")
                for p, group, k, j in T.grid(P, G, g, W):
                    with T.sblock("weights"):
                        vp, vg, vk, vj = T.axis.remap("SSSS", [p, group, k, j])
                        w[vp, vg, vk, vj] = number(q, z, vp, vg, vk, vj) * s[vp, vg, vj]
                # The last block reads the last row again for those that x has not.
                for b, r, p, j, group, k in T.grid((M + R - 1) // R, R, P, W, G, g):
                    with T.sblock("sums"):
                        vb, vr, vp, vj, vg, vk = T.axis.remap("SSSSRR", [b, r, p, j, group, k])
                        with T.init():
                            sums[vb, vr, vp, vj] = T.float32(0)
                        sums[vb, vr, vp, vj] += x[T.min(vb * R + vr, M - 1), vg * g + vk] * w[vp, vg, vk, vj]
                for b, r, p, j in T.grid((M + R - 1) // R, R, P, W):
                    with T.sblock("many_results"):
                        vb, vr, vp, vj = T.axis.remap("SSSS", [b, r, p, j])
                        if vb * R + vr < M and vp * W + vj < N:
                            y[vb * R + vr, vp * W + vj] = sums[vb, vr, vp, vj]

    function = product.with_attr(FORM, NAME)
    if matrix.zero:
        return function
    used = [parameter for place, parameter in enumerate(function.params) if place != ZEROS]
    return tirx.PrimFunc(used, function.body, function.ret_type, function.attrs)


def schedule_for_cpu(function: "tvm.tirx.PrimFunc", target: "tvm.target.Target") -> "tvm.tirx.PrimFunc":
    """Return the product in loops for one thread, each innermost one a vector of neighbouring columns of y.

    Few rows: for each row and panel, group by group, one byte of all 64 rows of the panel is unpacked in registers and
    multiplied. Many rows: for each panel, which is float32 in a buffer of its own, blocks of BLOCK rows and columns
    are summed up over all of K in registers.
    """
    from tvm import s_tir

    schedule = s_tir.Schedule(function)
    _schedule_few(schedule)
    _schedule_many(schedule, COLUMNS.get(str(target.attrs.get("mcpu", "")), FEW_COLUMNS))
    return schedule.mod["main"]


def _schedule_few(schedule: Any) -> None:
    partial, total, results = (schedule.get_sblock(name) for name in ("partial", "total", "few_results"))
    _, panel, column = schedule.get_loops(results)
    schedule.vectorize(column)
    schedule.compute_at(total, panel, preserve_unit_loops=True)
    *_, column, group = schedule.get_loops(total)
    schedule.reorder(group, column)
    schedule.compute_at(partial, group, preserve_unit_loops=True)
    *_, partial_column, k = schedule.get_loops(partial)
    schedule.reorder(k, partial_column)
    byte, half = schedule.split(k, [None, 2])
    schedule.unroll(half)
    for block, first, vector in ((partial, byte, partial_column), (total, group, column)):
        schedule.vectorize(vector)
        cleared = schedule.decompose_reduction(block, first)
        schedule.vectorize(schedule.get_loops(cleared)[-1])


def _schedule_many(schedule: Any, columns: int) -> None:
    weights, sums, results = (schedule.get_sblock(name) for name in ("weights", "sums", "many_results"))
    block, row, panel, column = schedule.get_loops(results)
    outer, inner = schedule.split(column, [None, columns])
    schedule.reorder(panel, block, outer, row, inner)
    schedule.vectorize(inner)
    schedule.compute_at(sums, outer, preserve_unit_loops=True)
    *_, row, _, column, group, k = schedule.get_loops(sums)
    schedule.reorder(group, k, row, column)
    schedule.compute_at(weights, panel, preserve_unit_loops=True)
    *_, weight_k, weight_column = schedule.get_loops(weights)
    _, half = schedule.split(weight_k, [None, 2])
    schedule.unroll(half)
    schedule.vectorize(weight_column)
    schedule.unroll(row)
    schedule.vectorize(column)
    *_, row, _, column = schedule.get_loops(schedule.decompose_reduction(sums, group))
    schedule.unroll(row)
    schedule.vectorize(column)
