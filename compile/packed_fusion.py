"""Steps of a packed program that belong together become fewer, with the same numbers bit for bit.

- Products of one input that only attention or SwiGLU reads become one product: their matrices lie one below the other,
  and who read one of them reads its columns.
- Rotations of queries and keys, and the views, slices and concatenations around them, become one step, `heads`, that
  reads each head where it lies.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from portlm.compile.packed_file import COMPUTED, NONE, WEIGHT, Program, Step, Tensor, Value

ATTENTION = ("attention", "quantized_attention")
LINEAR = ("linear", "linear_a8")
TILE = 16  # rows of a quantized matrix that lie together
NO_ACTIVATION = (0,)


class Joins:
    """Weights that lie one below the other, beside those that there are: each once, however many programs read it."""

    def __init__(self, tensors: list[Tensor]):
        """Take the list, to which joined weights are appended."""
        self.tensors = tensors
        self._places: dict[tuple[int, ...], int] = {}

    def fit(self, places: Sequence[int]) -> bool:
        """Say whether weights can lie so: of one kind, and none but the last with a part of a tile."""
        first, *others = (self.tensors[place] for place in places)
        alike = all(
            (other.panels, other.shape[1:], other.layout and other.layout[1:], other.numbers()[0])
            == (first.panels, first.shape[1:], first.layout and first.layout[1:], first.numbers()[0])
            for other in others
        )
        return alike and (
            first.layout is None or not any(self.tensors[place].shape[0] % TILE for place in places[:-1])
        )

    def place(self, places: Sequence[int]) -> int:
        """Return the place of weights that fit, joined."""
        key = tuple(places)
        if key not in self._places:
            parts = [self.tensors[place] for place in places]
            rows = sum(part.shape[0] for part in parts)
            layout = parts[0].layout
            self._places[key] = len(self.tensors)
            self.tensors.append(
                replace(
                    parts[0],
                    name=f"{parts[0].name} and {len(parts) - 1} more",
                    shape=(rows, *parts[0].shape[1:]),
                    read=lambda: np.concatenate([part.read() for part in parts]),
                    layout=layout and layout._replace(N=rows),
                )
            )
        return self._places[key]


def fuse(program: Program, joins: Joins) -> Program:
    """Return a program that computes the same in fewer steps.

    Args:
        program: as it was lowered.
        joins: takes the weights that it reads joined.
    """
    return _Fusion(program, joins).fused()


def without_unread(
    programs: Sequence[Program], tensors: Sequence[Tensor]
) -> tuple[list[Program], list[Tensor]]:
    """Return programs and weights without the weights that no program reads."""
    read = sorted({v.tensor for program in programs for v in program.values if v.kind == WEIGHT})
    place = {old: new for new, old in enumerate(read)}

    def moved(value: Value) -> Value:
        return replace(value, tensor=place[value.tensor]) if value.kind == WEIGHT else value

    return [replace(p, values=tuple(map(moved, p.values))) for p in programs], [tensors[old] for old in read]


@dataclass(frozen=True)
class _Heads:
    """Where heads of a width lie in a value (batch, sequence, W), and what is done to them.

    Attributes:
        source: the value.
        first: its first column.
        stride: columns from head to head.
        width: of a head.
        rotation: places of positions and tables, or None.
        turned: columns of each head that are rotated, the first ones.
        path: the steps in between.
    """

    source: int
    first: int
    stride: int
    width: int
    rotation: tuple[int, ...] | None = None
    turned: int = 0
    path: frozenset[int] = frozenset()


class _Fusion:
    def __init__(self, program: Program, joins: Joins):
        self.program, self.joins = program, joins
        self.values = list(program.values)
        # for each step of the program, those that are now in its place
        self.steps: list[list[Step]] = [[step] for step in program.steps]
        self.maker = {value: i for i, step in enumerate(program.steps) for value in step.outputs}
        self.readers: dict[int, set[int]] = {}
        for i, step in enumerate(program.steps):
            for value in step.inputs:
                self.readers.setdefault(value, set()).add(i)

    def fused(self) -> Program:
        for i, step in enumerate(self.program.steps):
            if step.operation in ATTENTION:
                self._attention(i, step)
            elif step.operation == "swiglu" and len(step.inputs) == 2:
                self._swiglu(i, step)
        return _without_unused(
            replace(self.program, values=tuple(self.values), steps=tuple(chain.from_iterable(self.steps)))
        )

    # --- what is recognised ---------------------------------------------------------------------------

    def _attention(self, at: int, step: Step) -> None:
        """Let attention read queries, keys and values where one product, or one gathering of heads, has them."""
        H, K = step.ints[:2]
        width = self._width(step.outputs[0]) // H
        parts = [
            self._columns(place, first, heads, width)
            for place, first, heads in zip(step.inputs[:3], step.ints[2:5], (H, K, K), strict=True)
        ]
        sources = list(dict.fromkeys(part.source for part in parts))
        path = frozenset[int]().union(*(part.path for part in parts))
        rotations = {part.rotation for part in parts if part.rotation}
        if len(rotations) != bool(path) or parts[2].rotation or not self._read_only_by(path, {at}):
            return
        offsets = {sources[0]: (sources[0], 0)}
        if len(sources) > 1:
            if not self._can_join(sources, {*path, at}):
                return
            offsets = self._join(sources)
        places = [(offsets[p.source][0], offsets[p.source][1] + p.first) for p in parts]
        new: list[Step] = []
        if path:
            moved = [i for i in range(3) if i < 2 or parts[i].stride != width]
            ints, column, source = [width], 0, places[0][0]
            gathered = self._value(f"{step.name}.heads", step, sum((H, K, K)[i] * width for i in moved))
            for i in moved:
                ints += [(H, K, K)[i], places[i][1], parts[i].stride, int(parts[i].turned > 0)]
                places[i] = (gathered, column)
                column += (H, K, K)[i] * width
            new.append(
                Step(f"{step.name}.heads", "heads", (source, *rotations.pop()), (gathered,), tuple(ints))
            )
        inputs = (*(place for place, _ in places), *step.inputs[3:])
        new.append(replace(step, inputs=inputs, ints=(H, K, *(first for _, first in places), *step.ints[5:])))
        for i in path:
            self.steps[i] = []
        self.steps[at] = new

    def _swiglu(self, at: int, step: Step) -> None:
        """Let SwiGLU read both halves of one product."""
        if step.inputs[0] != step.inputs[1] and self._can_join(step.inputs, {at}):
            joined, _ = self._join(step.inputs)[step.inputs[0]]
            self.steps[at] = [replace(step, inputs=(joined,))]

    # --- where heads lie ------------------------------------------------------------------------------

    def _columns(self, place: int, first: int, heads: int, width: int) -> _Heads:
        """Where the heads in columns [first, first + heads * width) of a value (batch, sequence, W) come from."""
        plain = _Heads(place, first, width, width)
        at = self.maker.get(place)
        if at is None or first != 0 or self._width(place) != heads * width:
            return plain
        step = self.program.steps[at]
        if step.operation == "rotary" and step.ints[0] == heads:
            found = self._columns(step.inputs[0], step.ints[1], heads, width)
            if found.rotation is None:
                return replace(found, rotation=step.inputs[1:], turned=width, path=found.path | {at})
        if step.operation == "view" and self._shape(step.inputs[0])[2:] == (heads, width):
            inner = self._heads(step.inputs[0], heads, width)
            if inner is not None:
                return replace(inner, path=inner.path | {at})
        return plain

    def _heads(self, place: int, heads: int, width: int) -> _Heads | None:
        """The same for a value (batch, sequence, heads, width); None if it comes from elsewhere."""
        at = self.maker.get(place)
        if at is None:
            return None
        step = self.program.steps[at]
        shape = self._shape(step.inputs[0])
        found = None
        if step.operation == "view" and shape[2:] == (heads * width,):
            found = self._columns(step.inputs[0], 0, heads, width)
        elif step.operation == "slice":
            whole = self._heads(step.inputs[0], heads, int(shape[3]))
            if whole is not None and whole.rotation is None:
                found = replace(whole, first=whole.first + step.ints[0], width=width)
        elif step.operation == "concat" and len(step.inputs) == 2:
            a, b = (self._heads(part, heads, int(self._shape(part)[3])) for part in step.inputs)
            if a is not None and b is not None and _follows(a, b):
                found = replace(a, width=width, path=a.path | b.path)
        return found and replace(found, path=found.path | {at})

    def _shape(self, place: int) -> tuple[int | str, ...]:
        return self.values[place].shape

    def _width(self, place: int) -> int:
        width = self._shape(place)[-1]
        assert isinstance(width, int)
        return width

    # --- products -------------------------------------------------------------------------------------

    def _read_only_by(self, steps: Iterable[int], others: set[int]) -> bool:
        """Whether what steps compute is read by themselves and by others alone, and is no result."""
        steps = set(steps)
        outputs = {value for i in steps for value in self.program.steps[i].outputs}
        readers = set[int]().union(*(self.readers.get(value, set()) for value in outputs))
        return readers <= steps | others and not outputs & set(self.program.results)

    def _can_join(self, places: Sequence[int], readers: set[int]) -> bool:
        """Whether values are those of products that can be one, and that nobody else reads."""
        makers = [self.maker.get(place) for place in places]
        if None in makers:
            return False
        steps = [self.program.steps[i] for i in makers if i is not None]
        if any(
            s.operation not in LINEAR
            or s.ints != NO_ACTIVATION
            or (s.operation, s.inputs[0]) != (steps[0].operation, steps[0].inputs[0])
            for s in steps
        ):
            return False
        if not self._read_only_by([i for i in makers if i is not None], readers):
            return False
        for column in zip(*(step.inputs[1:] for step in steps), strict=True):  # matrices, and biases
            given = [place for place in column if place != NONE]
            if not given:
                continue
            single = all(len(self.readers[place]) == 1 for place in given)
            weights = [self.values[place].tensor for place in given]
            if len(given) != len(column) or not single or not self.joins.fit(weights):
                return False
        return True

    def _join(self, places: Sequence[int]) -> dict[int, tuple[int, int]]:
        """Make one product of several; return the place and first column of what each computed."""
        makers = [self.maker[place] for place in places]
        steps = [self.program.steps[i] for i in makers]
        inputs = [steps[0].inputs[0]]
        for column in zip(*(step.inputs[1:] for step in steps), strict=True):
            if column[0] == NONE:
                inputs.append(NONE)
                continue
            tensor = self.joins.place([self.values[place].tensor for place in column])
            inputs.append(len(self.values))
            self.values.append(Value(self.joins.tensors[tensor].name, WEIGHT, tensor=tensor))
        widths = [self._width(place) for place in places]
        name = f"{steps[0].name} and {len(steps) - 1} more"
        joined = self._value(name, steps[0], sum(widths))
        for i in makers:
            self.steps[i] = []
        self.steps[min(makers)] = [Step(name, steps[0].operation, tuple(inputs), (joined,), NO_ACTIVATION)]
        return {place: (joined, sum(widths[:i])) for i, place in enumerate(places)}

    def _value(self, name: str, like: Step, width: int) -> int:
        """A new computed value, as wide as this and otherwise as a step's output."""
        shape = (*self._shape(like.outputs[0])[:-1], width)
        self.values.append(Value(name, COMPUTED, "float32", shape))
        return len(self.values) - 1


def _follows(a: _Heads, b: _Heads) -> bool:
    """Whether rotated columns and those behind them, unchanged, are together the heads of one value."""
    together = (a.source, a.stride) == (b.source, b.stride) and b.first == a.first + a.width
    return together and a.turned == a.width and b.rotation is None


def _without_unused(program: Program) -> Program:
    """Leave out values that no step reads or writes, and number the others."""
    given = len(program.inputs) + len(program.states)
    used = Counter(v for step in program.steps for v in (*step.inputs, *step.outputs))
    kept = [v for v in range(len(program.values)) if v < given or used[v]]
    place = {old: new for new, old in enumerate(kept)} | {NONE: NONE}

    def moved(values: Iterable[int]) -> tuple[int, ...]:
        return tuple(place[v] for v in values)

    steps = tuple(replace(s, inputs=moved(s.inputs), outputs=moved(s.outputs)) for s in program.steps)
    values = tuple(program.values[v] for v in kept)
    return replace(program, values=values, steps=steps, results=moved(program.results))
