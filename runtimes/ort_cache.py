"""States that grow in place: memory with room for more slots than are in use, into which ONNX Runtime writes new ones.

A view is the first P slots of such memory. Only the view that reaches the last slot in use is extended in place, so
slots once written never change and views may be shared: extending an older one finds others behind it, and copies.

A step is short, so what can be prepared once is: inputs are copied into memory that is bound already, and outputs are
computed into arrays that their caller gets.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from portlm.engine import Array, CallSpec
from portlm.ort_support import IN_PLACE, UNREAD, row_by_row
from portlm.roles import StateSpec, TensorSpec

LEAST_ROOM = 64  # slots
AXIS = 2  # of the slots, in (B, K, P, D)
LINE, LARGE_PAGE = 64, 2 << 20  # bytes


class Cache:
    """All states of B rows that grow, with room.

    Attributes:
        arrays: (B, K, capacity, D) by name of the state.
        bound: for the next call on the same memory, by the session that it is for.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], used: int, most: int):
        """Reserve memory.

        Args:
            shapes: (B, K, any, D) by name.
            used: slots that are about to be written.
            most: slots that there can ever be.
        """
        capacity = max(used, min(most, used + max(LEAST_ROOM, used // 2)))
        self.arrays = _reserve(
            {name: (*shape[:AXIS], capacity, *shape[AXIS + 1 :]) for name, shape in shapes.items()}
        )
        self.bound: tuple[Any, Bound] | None = None
        self._capacity, self._used = capacity, used
        self._lock = threading.Lock()

    def claim(self, past: int, new: int) -> bool:
        """Take T slots behind the first P for a caller who writes them, if they are free."""
        with self._lock:
            free = past == self._used and past + new <= self._capacity
            if free:
                self._used += new
            return free

    def views(self, length: int) -> dict[str, Any]:
        """The first slots of every state by name, which are all that are in use."""
        return {name: View(self, name, length) for name in self.arrays}


def _reserve(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Arrays of float32, uninitialised, in one piece of memory.

    Each begins with a cache line: attention behind 1000 slots takes a tenth longer where loads straddle two. One piece
    is large enough for numpy to ask the system for large pages.
    """
    sizes = [-(-4 * int(np.prod(shape)) // LINE) * LINE for shape in shapes.values()]
    unit = LARGE_PAGE if sum(sizes) >= LARGE_PAGE else LINE
    memory = np.empty(sum(sizes) + unit, np.uint8)
    begin, found = -memory.ctypes.data % unit, {}
    for (name, shape), size in zip(shapes.items(), sizes, strict=True):
        found[name] = memory[begin : begin + 4 * int(np.prod(shape))].view(np.float32).reshape(shape)
        begin += size
    return found


class View(NamedTuple):
    """The first slots of one state of a cache."""

    cache: Cache
    name: str
    length: int

    def array(self) -> Array:
        """(B, K, length, D), with strides."""
        found: Array = self.cache.arrays[self.name][:, :, : self.length]
        return found


def extend(states: Sequence[StateSpec], tensors: Mapping[str, Any], new: int, most: int) -> tuple[Cache, int]:
    """Find or make memory in which T slots behind a state's own are free.

    Args:
        states: that grow.
        tensors: of them, views or arrays (B, K, P, D).
        new: T.
        most: slots that there can ever be.

    Returns:
        The memory, which holds the P slots already, and P.
    """
    first = tensors[states[0].name]
    if isinstance(first, View):
        own = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, View)}
        alike = all(own.get(state.name) == View(first.cache, state.name, first.length) for state in states)
        whole = len(states) == len(first.cache.arrays)
        if alike and whole and first.cache.claim(first.length, new):
            return first.cache, first.length
    arrays = {state.name: as_array(tensors[state.name]) for state in states}
    past = arrays[states[0].name].shape[AXIS]
    cache = Cache({name: array.shape for name, array in arrays.items()}, past + new, most)
    for name, array in arrays.items():
        cache.arrays[name][:, :, :past] = array
    return cache, past


def is_even(inputs: Mapping[str, Array]) -> bool:
    """Whether nothing is masked in a call, and every token of a row is at its slot."""
    mask, positions = inputs["attention_mask"], inputs["position_ids"]
    total = mask.shape[1]
    slots = np.arange(total - positions.shape[1], total)
    return bool(mask.all() and (positions == slots).all())


def as_array(tensor: Any) -> Any:
    """What a view holds, or anything else as it is."""
    return tensor.array() if isinstance(tensor, View) else tensor


def in_place(spec: CallSpec, session: Any, most: int) -> "InPlace | None":
    """How to call a role on states that grow in place; None if its graph does not say that they can.

    Args:
        spec: of the role.
        session: its graph.
        most: slots that there can ever be.
    """
    grown = [state for state in spec.state if state.update == "append"]
    fits = all(state.shape.index("past") == AXIS and state.dtype == "float32" for state in grown)
    if not grown or not fits or not IN_PLACE.items() <= session.get_modelmeta().custom_metadata_map.items():
        return None
    return InPlace(spec, grown, most)


def address(array: Array) -> int:
    """Where an array begins. ndarray.ctypes.data takes ten times as long to say it."""
    found: int = array.__array_interface__["data"][0]
    return found


class Bound:
    """A binding of a session to rows of a cache, whose growing states are the same memory before and after."""

    def __init__(
        self, session: Any, cache: Cache, part: slice, grown: Sequence[StateSpec], outputs: Sequence[str]
    ):
        """Bind what grows, and the other outputs to wherever they come to lie."""
        self.binding = session.io_binding()
        self._held: dict[str, Array] = {}
        self._lent: dict[str, tuple[Array, int]] = {}  # and where they are
        self._unread = session.get_modelmeta().custom_metadata_map.get(UNREAD)
        for name in outputs:  # first, so that they are the first of what it returns
            self.binding.bind_output(name, "cpu")
        for state in grown:
            rows = cache.arrays[state.name][part]
            place = ("cpu", 0, np.float32, rows.shape, address(rows))
            self.binding.bind_input(state.name, *place)
            self.binding.bind_output(state.output, *place)

    def put(self, name: str, array: Array) -> Array:
        """Give an input; return the memory that it is read from, which is bound for the following calls, too.

        Of what the graph does not read, the first value stays.
        """
        held = self._held.get(name)
        if held is not None and name == self._unread:
            return held
        if held is not None and held.shape == array.shape:
            held[...] = array
            return held
        held = self._held[name] = np.array(array, order="C")
        self.binding.bind_input(name, "cpu", 0, held.dtype.type, held.shape, address(held))
        return held

    def lend(self, name: str, array: Array, shape: tuple[int, ...]) -> None:
        """Give the beginning of an array as an input of some shape, and no copy of it."""
        if name == self._unread:
            self.put(name, array)
            return
        lent, where = self._lent.get(name, (None, 0))
        if lent is not array:
            where = address(array)
            self._lent[name] = array, where
        self._held.pop(name, None)  # put() binds its own again
        self.binding.bind_input(name, "cpu", 0, array.dtype.type, shape, where)

    def receive(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return a new array into which the next calls compute an output."""
        array = np.empty(shape, dtype)
        self.binding.bind_output(name, "cpu", 0, dtype, shape, address(array))
        return array


class InPlace:
    """Calls of one role, whose growing states are the same memory before and after.

    Attributes:
        grown: the states that grow. Views and arrays of any strides are both what such a state may be.
        most: slots that there can ever be.
    """

    def __init__(self, spec: CallSpec, grown: Sequence[StateSpec], most: int):
        """Prepare what is looked up at every call; use in_place()."""
        self.grown, self.most = grown, most
        self._kept = [state for state in spec.state if state not in grown]
        self._replaced = [state for state in self._kept if state.output]
        self._outputs = [*(item.name for item in spec.outputs), *(state.output for state in self._replaced)]
        taken: list[TensorSpec | StateSpec] = [*spec.inputs, *spec.state]
        self._batched = {item.name for item in taken if item.shape[:1] == ("batch",)}
        where: dict[str, tuple[str, int]] = {
            dim: (item.name, axis)
            for item in spec.inputs
            for axis, dim in enumerate(item.shape)
            if isinstance(dim, str)
        }
        self._new = where["sequence"]
        # Where the extents of each output are found: a number, or an input and its axis.
        self._extents: list[tuple[str, Any, list[int | tuple[str, int]]]] = []
        known = all(isinstance(dim, int) or dim in where for item in spec.outputs for dim in item.shape)
        if known:
            for item in spec.outputs:
                extents = [dim if isinstance(dim, int) else where[dim] for dim in item.shape]
                self._extents.append((item.name, np.dtype(item.dtype).type, extents))
        self._shaped = known and not self._replaced

    def __call__(
        self,
        session: Any,
        run: Callable[[Any, Any], None],
        inputs: Mapping[str, Array],
        tensors: Mapping[str, Any],
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        """Call the role once.

        Args:
            session: its graph.
            run: runs it on a binding.
            inputs: by name.
            tensors: of its states.

        Returns:
            Its outputs and its new states by name.
        """
        name, axis = self._new
        new, rows = inputs[name].shape[axis], len(as_array(tensors[self.grown[0].name]))
        cache, past = extend(self.grown, tensors, new, self.most)
        kept = {}
        for state in self._kept:
            tensor = tensors[state.name]
            kept[state.name] = tensor if isinstance(tensor, np.ndarray) else tensor.numpy()
        if row_by_row({"batch": rows, "sequence": new, "past": past}):
            results = []
            for row in range(rows):
                part = slice(row, row + 1)
                one = ({n: self._cut(n, a, part) for n, a in values.items()} for values in (inputs, kept))
                results.append(
                    self._run(session, run, Bound(session, cache, part, self.grown, self._outputs), *one)
                )
            found = {output: np.concatenate([result[output] for result in results]) for output in results[0]}
        else:
            found = self._run(session, run, self.bound(session, cache), inputs, kept)
        states: dict[str, Any] = cache.views(past + new)
        states |= {state.name: found.pop(state.output) for state in self._replaced}
        return found, states

    def bound(self, session: Any, cache: Cache) -> Bound:
        """The binding of a session to all rows of a cache, which is made once."""
        if cache.bound is None or cache.bound[0] is not session:
            cache.bound = (session, Bound(session, cache, slice(None), self.grown, self._outputs))
        return cache.bound[1]

    def _cut(self, name: str, array: Array, part: slice) -> Array:
        return array[part] if name in self._batched else array

    def _run(
        self,
        session: Any,
        run: Callable[[Any, Any], None],
        bound: Bound,
        inputs: Mapping[str, Array],
        kept: Mapping[str, Array],
    ) -> dict[str, Array]:
        """Run once; return outputs and replaced states by the names of the graph."""
        binding = bound.binding
        for name, array in inputs.items():
            bound.put(name, array)
        for name, array in kept.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        if self._shaped:
            found = {
                name: bound.receive(
                    name, tuple(e if isinstance(e, int) else inputs[e[0]].shape[e[1]] for e in extents), kind
                )
                for name, kind, extents in self._extents
            }
            run(session, binding)
            return found
        for name in self._outputs:  # again: otherwise it would write into what the last call returned
            binding.bind_output(name, "cpu")
        run(session, binding)
        values = binding.get_outputs()[: len(self._outputs)]
        return {name: value.numpy() for name, value in zip(self._outputs, values, strict=True)}
