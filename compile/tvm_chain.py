"""Kernels that follow each other as one call of TVM's virtual machine, csrc/tvm/chain.cpp.

A call of the virtual machine costs more than a small kernel: a shape and a tensor for the result, and registers that
are filled and emptied. Kernels are gathered until something else wants a value; what only they read has no register.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvm import relax

MOST_STEPS = 64  # of a chain


@dataclass(eq=False)
class Pending:
    """What a kernel will have written, or returned, once its chain is called.

    Attributes:
        ty: its type.
        returned: whether the kernel returns it, instead of writing into memory that it is given.
        expr: the value, after the call.
    """

    ty: Any
    returned: bool = False
    expr: Any = None


Part = Any
"""An input of a kernel: a number, a Relax value or one that is pending."""


class _Places:
    """Memory for the inner values of a chain: those that are not needed at the same time share it.

    Attributes:
        inner: width and place of each value, "768:0".
    """

    def __init__(self, steps: Sequence[tuple[str, list[Part], list[Pending]]]):
        self.inner: list[str] = []
        self._last: dict[int, int] = {}  # the step that reads a value last, or writes it if none does
        for step, (_, inputs, outputs) in enumerate(steps):
            self._last.update(
                (id(value), step) for value in (*outputs, *inputs) if isinstance(value, Pending)
            )
        self._widths: list[int] = []  # of each place, so far
        self._taken: dict[int, int] = {}  # value -> place

    def take(self, value: Pending) -> int:
        """Return the number of a new inner value, in the free place that has to grow least."""
        width = int(value.ty.shape[2])
        free = set(range(len(self._widths))) - set(self._taken.values())
        place = min(free, key=lambda i: (max(width - self._widths[i], 0), self._widths[i]), default=-1)
        if place < 0:
            place = len(self._widths)
            self._widths.append(0)
        self._widths[place] = max(width, self._widths[place])
        self._taken[id(value)] = place
        self.inner.append(f"{width}:{place}")
        return len(self.inner) - 1

    def give_back(self, step: int) -> None:
        """Free what no step after this one reads."""
        self._taken = {value: place for value, place in self._taken.items() if self._last[value] > step}


@dataclass
class Chain:
    """Kernels that have not been called yet."""

    bb: "relax.BlockBuilder"
    lead: Any = None  # whose first two axes all inner values have
    steps: list[tuple[str, list[Part], list[Pending]]] = field(default_factory=list)

    def takes(self, inputs: Sequence[Part], shapes: Sequence[Sequence[Any]]) -> bool:
        """Say whether a kernel with outputs of these shapes can be next; the first one decides on the lead."""
        from tvm import sym, tirx

        equal = sym.Analyzer().can_prove_equal

        def leads(shape: Sequence[Any], other: Sequence[Any]) -> bool:
            return all(equal(shape[i], other[i]) for i in range(2))

        if len(self.steps) >= MOST_STEPS:
            return False
        for shape in shapes:
            if len(shape) != 3 or not isinstance(shape[2], int | tirx.IntImm) or not leads(shape, shapes[0]):
                return False
        if self.lead is not None:
            return leads(self.lead.ty.shape, shapes[0])
        for value in inputs:
            extents = getattr(getattr(value, "ty", None), "shape", None)
            if extents is not None and len(extents) >= 2 and leads(extents, shapes[0]):
                self.lead = value.expr if isinstance(value, Pending) else value
                return True
        return False

    def add(self, function: str, inputs: Sequence[Part], outputs: list[Pending]) -> None:
        """Put a kernel at the end."""
        self.steps.append((function, list(inputs), outputs))

    def call(self, wanted: Callable[[Pending], bool]) -> None:
        """Emit the call; afterwards what is wanted and what was returned has an expr."""
        from tvm import ir, relax

        arguments: list[Any] = []
        parts: dict[int, str] = {}
        places = _Places(self.steps)

        def argument(value: Any) -> str:
            place = next((i for i, known in enumerate(arguments) if known.same_as(value)), len(arguments))
            if place == len(arguments):
                arguments.append(value)
            return f"${place}"

        def part(value: Part) -> str:
            if isinstance(value, float):
                return f"r{value!r}"
            if isinstance(value, int):
                return f"i{value}"
            if isinstance(value, Pending) and value.expr is None:
                return parts[id(value)]
            return argument(value.expr if isinstance(value, Pending) else value)

        lead = argument(self.lead).removeprefix("$")
        lines: list[str] = []
        written: list[tuple[Pending, Any]] = []
        returned: list[Pending] = []
        for step, (function, inputs, outputs) in enumerate(self.steps):
            words = [function, *map(part, inputs)]
            for value in outputs:
                if value.returned:
                    parts[id(value)] = f"@{len(returned)}"
                    words.append(f">{len(returned)}")
                    returned.append(value)
                    continue
                if wanted(value):
                    place = self.bb.emit(
                        relax.op.builtin.alloc_tensor(value.ty.shape, str(value.ty.dtype), 0)
                    )
                    parts[id(value)] = argument(place)
                    written.append((value, place))
                else:
                    parts[id(value)] = f"%{places.take(value)}"
                words.append(parts[id(value)])
            places.give_back(step)
            lines.append(" ".join(words))
        recipe = "|".join([" ".join([lead, *places.inner]), *lines])
        types = [value.ty for value in returned]
        kind = relax.TupleType(types) if len(types) > 1 else (*types, relax.ObjectType())[0]
        call = relax.op.call_pure_packed("portlm.chain", ir.StringImm(recipe), *arguments, ty_args=[kind])
        result = self.bb.emit(call)
        for value, place in written:
            value.expr = place
        for i, value in enumerate(returned):
            value.expr = self.bb.emit(relax.TupleGetItem(result, i)) if len(types) > 1 else result
        self.lead, self.steps = None, []
