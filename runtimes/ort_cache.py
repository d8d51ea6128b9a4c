"""States that grow in place: memory with room for more slots than are in use, into which ONNX Runtime writes new ones.

A view is the first P slots of such memory. Only the view that reaches the last slot in use is extended in place, so
slots once written never change and views may be shared: extending an older one finds others behind it, and copies.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from portlm.engine import Array, CallSpec
from portlm.ort_support import IN_PLACE, row_by_row
from portlm.roles import StateSpec, TensorSpec

LEAST_ROOM = 64  # slots
AXIS = 2  # of the slots, in (B, K, P, D)


class Cache:
    """All states of B rows that grow, with room.

    Attributes:
        arrays: (B, K, capacity, D) by name of the state.
        binding: whatever the engine keeps for its next call on the same memory.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], used: int, most: int):
        """Reserve memory.

        Args:
            shapes: (B, K, any, D) by name.
            used: slots that are about to be written.
            most: slots that there can ever be.
        """
        capacity = max(used, min(most, used + max(LEAST_ROOM, used // 2)))
        self.arrays = {
            name: np.empty((*shape[:AXIS], capacity, *shape[AXIS + 1 :]), np.float32)
            for name, shape in shapes.items()
        }
        self.binding: Any = None
        self._capacity, self._used = capacity, used
        self._lock = threading.Lock()

    def claim(self, past: int, new: int) -> bool:
        """Take T slots behind the first P for a caller who writes them, if they are free."""
        with self._lock:
            free = past == self._used and past + new <= self._capacity
            if free:
                self._used += new
            return free


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
    together = isinstance(first, View) and all(
        tensors[state.name] == View(first.cache, state.name, first.length) for state in states
    )
    if together and first.cache.claim(first.length, new):
        return first.cache, first.length
    arrays = {state.name: as_array(tensors[state.name]) for state in states}
    past = arrays[states[0].name].shape[AXIS]
    cache = Cache({name: array.shape for name, array in arrays.items()}, past + new, most)
    for name, array in arrays.items():
        cache.arrays[name][:, :, :past] = array
    return cache, past


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


class InPlace:
    """Calls of one role, whose growing states are the same memory before and after.

    Attributes:
        grown: the states that grow. Views and arrays of any strides are both what such a state may be.
    """

    def __init__(self, spec: CallSpec, grown: Sequence[StateSpec], most: int):
        """Prepare what is looked up at every call; use in_place()."""
        self.grown, self._most = grown, most
        self._kept = [state for state in spec.state if state not in grown]
        self._replaced = [state for state in self._kept if state.output]
        self._outputs = [*(item.name for item in spec.outputs), *(state.output for state in self._replaced)]
        taken: list[TensorSpec | StateSpec] = [*spec.inputs, *spec.state]
        self._batched = {item.name for item in taken if item.shape[:1] == ("batch",)}
        self._new = next(
            (item.name, axis)
            for item in spec.inputs
            for axis, dim in enumerate(item.shape)
            if dim == "sequence"
        )

    def __call__(
        self,
        session: Any,
        run: Callable[[Any, Any], list[Any]],
        inputs: Mapping[str, Array],
        tensors: Mapping[str, Any],
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        """Call the role once.

        Args:
            session: its graph.
            run: runs it on a binding, and returns what it computed.
            inputs: by name.
            tensors: of its states.

        Returns:
            Its outputs and its new states by name.
        """
        name, axis = self._new
        new, rows = inputs[name].shape[axis], len(as_array(tensors[self.grown[0].name]))
        cache, past = extend(self.grown, tensors, new, self._most)
        taken = dict(inputs)
        for state in self._kept:
            tensor = tensors[state.name]
            taken[state.name] = tensor if isinstance(tensor, np.ndarray) else tensor.numpy()
        parts = [slice(0, rows)]
        if row_by_row({"batch": rows, "sequence": new, "past": past}):
            parts = [slice(row, row + 1) for row in range(rows)]
        results = []
        for part in parts:
            binding = self._bind(session, cache, part, whole=len(parts) == 1)
            for name, array in taken.items():
                cut = array[part] if len(parts) > 1 and name in self._batched else array
                binding.bind_cpu_input(name, np.ascontiguousarray(cut))
            for name in self._outputs:  # again: otherwise it would write into what the last call returned
                binding.bind_output(name, "cpu")
            results.append([value.numpy() for value in run(session, binding)[: len(self._outputs)]])
        found = {
            name: arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
            for name, *arrays in zip(self._outputs, *results, strict=True)
        }
        states: dict[str, Any] = {state.name: View(cache, state.name, past + new) for state in self.grown}
        states |= {state.name: found.pop(state.output) for state in self._replaced}
        return found, states

    def _bind(self, session: Any, cache: Cache, part: slice, whole: bool) -> Any:
        """A binding to rows of a cache; that to all rows is made once."""
        if whole and cache.binding is not None and cache.binding[0] is session:
            return cache.binding[1]
        binding = session.io_binding()
        for name in self._outputs:  # first, so that they are the first of what it returns
            binding.bind_output(name, "cpu")
        for state in self.grown:
            rows = cache.arrays[state.name][part]
            place = ("cpu", 0, np.float32, rows.shape, rows.ctypes.data)
            binding.bind_input(state.name, *place)
            binding.bind_output(state.output, *place)
        if whole:
            cache.binding = (session, binding)
        return binding
