"""What the importer's code becomes before TVM schedules it for a GPU, where each step of it would be a kernel.

What it does for negative indices, which no graph of portlm has, is left out: it would be four kernels for each lookup.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tvm


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
            finite, value = self.made_by(where, wide.args[0]), wide.args[0]
            if finite is not None and self.made_by(negation, finite.args[0]) is not None:
                value = finite.args[2]
            return relax.op.astype(value, "int32")

    return _mutated(module, Plain(module))


def _mutated(module: "tvm.IRModule", mutator: Any) -> "tvm.IRModule":
    """What a mutator makes of a module's functions, without what nobody uses any more."""
    from tvm import relax

    for name, function in module.functions_items():
        if isinstance(function, relax.Function):
            mutator.builder_.update_func(name, mutator.visit_expr(function))
    return relax.transform.DeadCodeElimination()(mutator.builder_.get())
