"""Products with a cache of 8 bits in TVM's own code: numbers become floats where they are multiplied.

The portable form of attention over such a cache casts all of its numbers and multiplies by what that gives
(core/ops/quantized_attention.py): at every step the cache would be written out in float32, and read again.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tvm


def read_bytes(module: "tvm.IRModule") -> "tvm.IRModule":
    """Let every product with int8 numbers that were cast to float32, transposed or not, read the numbers.

    The functions are named as those that tvm_schedule.py has schedules for.
    """
    from tvm import ir, relax, te
    from tvm.relax.expr_functor import PyExprMutator, mutator

    cast, transpose, matmul = (ir.Op.get(f"relax.{name}") for name in ("astype", "permute_dims", "matmul"))

    def product(name: str, a: Any, b: Any) -> Any:
        turned = name == "NT_matmul"
        k = te.reduce_axis((0, a.shape[-1]), "k")

        def element(*i: Any) -> Any:
            *lead, m, n = i
            number = b[(*lead, n, k) if turned else (*lead, k, n)]
            return te.sum(a[(*lead, m, k)] * number.astype("float32"), k)

        return te.compute((*a.shape[:-1], b.shape[-2 if turned else -1]), element, name=name)

    @mutator
    class ReadBytes(PyExprMutator):
        def visit_call_(self, call: relax.Call) -> relax.Expr:
            call = self.visit_expr_post_order(call)
            if call.op != matmul:
                return call
            right, name = self._call(call.args[1]), "matmul"
            if right is not None and right.op == transpose and _swaps_last(right):
                right, name = self._call(right.args[0]), "NT_matmul"
            if right is None or right.op != cast or str(right.args[0].ty.dtype) != "int8":
                return call
            a, b = call.args[0], right.args[0]
            if len(a.ty.shape) != len(b.ty.shape):
                return call
            return self.builder_.call_te(product, name, a, b, primfunc_name_hint=f"{name}_of_bytes")

        def _call(self, variable: Any) -> "relax.Call | None":
            """The call whose result a variable is."""
            found = self.lookup_binding(variable) if isinstance(variable, relax.Var) else None
            return found if isinstance(found, relax.Call) else None

    change = ReadBytes(module)
    main = relax.analysis.remove_all_unused(change.visit_expr(module["main"]))
    change.builder_.update_func(module.get_global_var("main"), main)
    return change.builder_.get()


def _swaps_last(call: Any) -> bool:
    """Whether a transposition exchanges the last two axes and no others."""
    rank = len(call.ty.shape)
    axes = [int(axis) for axis in call.attrs.axes] if call.attrs.axes is not None else []
    return rank > 1 and axes == [*range(rank - 2), rank - 1, rank - 2]
