"""What all engines share: checking a call, and starting, reordering, cropping, joining and copying states.

An engine derives from EngineBase and says how a role is called and how its tensors are cut and put together; nothing
here knows a model. ArrayEngine is for those whose tensors are arrays that can be indexed.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from portlm.arguments import shown, whole, wholes
from portlm.engine import Array, CallSpec, InputCheck, OpenRequest, State
from portlm.engines import versions_of
from portlm.errors import PortlmError, UsageError
from portlm.roles import MAX_DIMENSION, StateSpec, symbols
from portlm.threads import survive_fork


class EngineBase:
    """The state operations of portlm.engine.Engine over a few primitives.

    A tensor of a state is never written to by any of them, so states may share tensors and copying costs nothing. An
    engine that grows a tensor in place must see to it that others who hold it keep what they have.
    """

    name: str
    device: str
    profile: str
    precision: str
    vocab_size: int
    context_length: int

    def __init__(self, roles: Mapping[str, CallSpec], vocab_size: int, context_length: int):
        self.roles = dict(roles)
        self.vocab_size, self.context_length = vocab_size, context_length
        self._checks = {
            name: InputCheck(name, spec, vocab_size, context_length) for name, spec in roles.items()
        }
        self._shared = {name: _shared(spec) for name, spec in roles.items()}
        self._closed, self._forked = False, False
        self._owner = object()
        survive_fork(self)

    # --- what an engine says ---------------------------------------------------------------------------

    def _call(
        self, role: str, inputs: Mapping[str, Array], tensors: dict[str, Any]
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        """Run a role; return its outputs, and its new states by the name of the state."""
        raise NotImplementedError

    def _ready(self, role: str) -> None:
        """Open what the role runs, if it was not; so what is wrong with it is said before a state is made."""

    def _work(self, tensor: Any) -> Any:
        """A tensor of a state in the form that the primitives below take: itself, or a view of it."""
        return tensor

    def _settle(self, tensor: Any, spec: StateSpec) -> Any:
        """What the primitives made, or a numpy array, as a tensor of a state."""
        raise NotImplementedError

    def _shape(self, tensor: Any) -> tuple[int, ...]:
        """Sizes of a tensor."""
        raise NotImplementedError

    def _rows(self, tensor: Any, rows: Sequence[int]) -> Any:
        """Rows of a tensor along its first axis."""
        raise NotImplementedError

    def _slots(self, tensor: Any, axis: int, begin: int, end: int) -> Any:
        """Part of a tensor along another axis."""
        raise NotImplementedError

    def _stack(self, tensors: Sequence[Any], shape: Sequence[int], dtype: str) -> Any:
        """Put tensors one behind the other along the first axis of a tensor of this shape, at the end of all others.

        What they leave free on the left is zero.
        """
        raise NotImplementedError

    # What the operations on states do to tensors, for an engine whose tensors are cut and put together in other ways.

    def _begin(self, role: str, batch: int, arrays: Mapping[str, Array]) -> dict[str, Any]:
        """The tensors of B rows before their first call, from numpy arrays by the name of the state."""
        return {item.name: self._settle(arrays[item.name], item) for item in self.roles[role].state}

    def _reordered(
        self, role: str, tensors: dict[str, Any], past: int, rows: Sequence[int] | None, skip: int
    ) -> dict[str, Any]:
        """Rows of tensors of P slots, None for all as they are, without the first `skip` of these."""
        for item in self.roles[role].state:
            skips = skip > 0 and "past" in item.shape
            if rows is None and not skips:
                continue
            tensor = self._work(tensors[item.name])
            if skips:
                tensor = self._slots(tensor, item.shape.index("past"), skip, past)
            tensors[item.name] = self._settle(tensor if rows is None else self._rows(tensor, rows), item)
        return tensors

    def _cropped(
        self, role: str, tensors: dict[str, Any], past: int, lengths: Sequence[int]
    ) -> dict[str, Any]:
        """The first lengths[b] of P slots of each row, at the end of the longest."""
        longest = max(lengths)
        for item in self.roles[role].state:
            if "past" not in item.shape or min(lengths) == past:
                continue
            axis, tensor = item.shape.index("past"), self._work(tensors[item.name])
            if min(lengths) == longest:
                cut = self._slots(tensor, axis, 0, longest)
            else:
                parts = [self._slots(self._rows(tensor, [b]), axis, 0, n) for b, n in enumerate(lengths)]
                shape = list(self._shape(tensor))
                shape[axis] = longest
                cut = self._stack(parts, shape, item.dtype)
            tensors[item.name] = self._settle(cut, item)
        return tensors

    def _joined(self, role: str, parts: Sequence[dict[str, Any]], rows: int) -> dict[str, Any]:
        """The tensors of two or more states one behind the other; B rows in all."""
        joined = parts[0]
        for item in self.roles[role].state:
            tensors = [self._work(part[item.name]) for part in parts]
            shape = np.max([self._shape(tensor) for tensor in tensors], axis=0).tolist()
            joined[item.name] = self._settle(self._stack(tensors, [rows, *shape[1:]], item.dtype), item)
        return joined

    def _copied(self, role: str, tensors: dict[str, Any]) -> dict[str, Any]:
        """Tensors of a second state with the same content."""
        return dict(tensors)

    def enter_child(self) -> None:
        """Prepare to go on in a forked child, which has its parent's memory and none of its other threads.

        A device is not among what it has: there every further call is an error.
        """
        self._forked = True

    # --- portlm.engine.Engine --------------------------------------------------------------------------

    @classmethod
    def graphs(cls, request: OpenRequest) -> tuple[str, ...]:
        """Return the artifact's graphs that open() relies on, none; see Engine."""
        return ()

    def start(self, role: str, batch: int, given: Mapping[str, Array] | None = None) -> State:
        """Return the state of B rows before their first call; see Engine."""
        spec = self._spec(role)
        batch = whole("batch", batch, 1, MAX_DIMENSION)
        if given is not None and not isinstance(given, Mapping):
            raise UsageError(f"given states are a dictionary of arrays by name, got {shown(given)}")
        self._ready(role)
        sizes, values = {"batch": batch}, dict(given or {})
        arrays = {}
        for state in spec.state:
            if state.initial == "given":
                if state.name not in values:
                    raise UsageError(f"{role} starts from {state.name}: give it")
                array = _given(state, values.pop(state.name), sizes)
                self._checks[role].check_given(state, array)
            else:
                array = _nothing(role, state, {**sizes, "past": 0})
            arrays[state.name] = array
        if values:
            raise UsageError(f"{role} takes no given state {shown(min(values, key=str))}")
        return self._state(role, batch, 0, self._begin(role, batch, arrays))

    def run(self, role: str, inputs: Mapping[str, Array], state: State) -> tuple[dict[str, Array], State]:
        """Call a role once; see Engine."""
        sizes = self._sizes_of(role, inputs, state)
        tensors = state.take()
        outputs, new = self._call(role, inputs, tensors)
        if len(new) != len(tensors):
            new = {**tensors, **new}
        return outputs, self._next(role, state, sizes, new)

    def _sizes_of(self, role: str, inputs: Mapping[str, Array], state: State) -> dict[str, int]:
        """Check a call before its state is taken; return what the symbols stand for."""
        self._spec(role)
        if self._check(state) != role:
            raise UsageError(f"this is a state of {state.role}, not of {role}")
        held = state.peek()
        known = {
            symbol: self._shape(self._work(held[name]))[axis] for name, axis, symbol in self._shared[role]
        }
        return self._checks[role](inputs, state.rows, state.past, known)

    def _next(self, role: str, state: State, sizes: Mapping[str, int], new: dict[str, Any]) -> State:
        """The state after a call of these sizes."""
        past = state.past + sizes["sequence"] if self._checks[role].grows else 0
        return self._state(role, state.rows, past, new)

    def reorder(self, state: State, rows: Sequence[int], skip: int = 0) -> State:
        """Return a state whose row i is row rows[i] of the old one; see Engine."""
        self._spec(self._check(state))
        rows = wholes("rows", rows, state.rows - 1)
        if not rows:
            raise UsageError(f"a state has at least one of the rows 0 to {state.rows - 1}, got none")
        skip = whole("skip", skip, 0, state.past)
        chosen = None if rows == list(range(state.rows)) else rows
        tensors = self._reordered(state.role, state.take(), state.past, chosen, skip)
        return self._state(state.role, len(rows), state.past - skip, tensors)

    def crop(self, state: State, lengths: Sequence[int]) -> State:
        """Return a state in which row b has only its first lengths[b] slots; see Engine."""
        spec = self._spec(self._check(state))
        for item in spec.state:
            if item.update == "replace":
                raise UsageError(f"{state.role}: {item.name} is replaced at every call and cannot be cropped")
        lengths = wholes("lengths", lengths, state.past)
        if len(lengths) != state.rows:
            raise UsageError(f"lengths must be {state.rows} numbers, one for each row, got {shown(lengths)}")
        tensors = self._cropped(state.role, state.take(), state.past, lengths)
        return self._state(state.role, state.rows, max(lengths), tensors)

    def join(self, states: Sequence[State]) -> State:
        """Return the rows of several states of one role as one state; see Engine."""
        if not isinstance(states, Sequence):
            raise UsageError(f"join takes states in a list, got {shown(states)}")
        roles = {self._check(state) for state in states}
        if len(roles) != 1 or len(set(map(id, states))) < len(states):
            raise UsageError("join takes one or more different states of one role")
        role = states[0].role
        for state in states:
            state.peek()
        parts = [state.take() for state in states]
        rows, past = sum(state.rows for state in states), max(state.past for state in states)
        joined = parts[0] if len(parts) == 1 else self._joined(role, parts, rows)
        return self._state(role, rows, past, joined)

    def copy(self, state: State) -> State:
        """Return a second state with the same content; see Engine."""
        role = self._check(state)
        return self._state(role, state.rows, state.past, self._copied(role, state.peek()))

    def _state(self, role: str, rows: int, past: int, tensors: dict[str, Any]) -> State:
        return State(role, rows, past, tensors, self._owner)

    def _check(self, state: State) -> str:
        """Return the role of a state, which is one that this engine made: nobody else knows what must be in it."""
        if not isinstance(state, State):
            raise UsageError(f"a state comes from this engine's start, run or copy, got {shown(state)}")
        if state.owner is not self._owner:
            raise UsageError(f"this state of {state.role} is of another engine or session: use it there")
        return str(state.role)

    def versions(self) -> dict[str, str]:
        """Return the versions of the packages that decide what is computed; see Engine."""
        return versions_of(self.name, self.device)

    def close(self) -> None:
        """Free the device; closing twice is harmless."""
        self._closed = True

    def _spec(self, role: str) -> CallSpec:
        if self._closed:
            raise UsageError("this engine is closed: load the model again")
        if self._forked and self.device != "cpu":
            raise UsageError(
                f"{self.name}:{self.device}: a forked process cannot use the device of its parent: "
                "load the model after the fork, or start the process by spawn"
            )
        if not isinstance(role, str) or role not in self.roles:
            known = ", ".join(self.roles) or "none"
            raise UsageError(f"{self.name} has no role {shown(role)} of this model: it has {known}")
        return self.roles[role]


class ArrayEngine(EngineBase):
    """State operations for tensors that can be indexed like numpy's, or seen so; here they are numpy arrays.

    Results of _rows and _slots may be views, with strides of any kind.
    """

    def _settle(self, tensor: Any, spec: StateSpec) -> Any:
        return tensor

    def _shape(self, tensor: Any) -> tuple[int, ...]:
        return tuple(tensor.shape)

    def _rows(self, tensor: Any, rows: Sequence[int]) -> Any:
        return tensor[_as_slice(rows)]

    def _slots(self, tensor: Any, axis: int, begin: int, end: int) -> Any:
        return tensor[(slice(None),) * axis + (slice(begin, end),)]

    def _stack(self, tensors: Sequence[Any], shape: Sequence[int], dtype: str) -> Any:
        return stack(tensors, shape, np.zeros(shape, dtype))


def stack(tensors: Sequence[Any], shape: Sequence[int], out: Any) -> Any:
    """Put array-like tensors one behind the other along the first axis of `out` (*shape), at the end of all others."""
    row = 0
    for tensor in tensors:
        sizes = tuple(tensor.shape)
        rest = (slice(whole - size, whole) for whole, size in zip(shape[1:], sizes[1:], strict=True))
        out[(slice(row, row + sizes[0]), *rest)] = tensor
        row += sizes[0]
    return out


def _as_slice(rows: Sequence[int]) -> slice | list[int]:
    """Evenly spaced rows as a slice, which copies nothing."""
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    if step > 0 and all(b - a == step for a, b in pairwise(rows)):
        return slice(rows[0], rows[-1] + 1, step)
    return list(rows)


def _shared(spec: CallSpec) -> list[tuple[str, int, str]]:
    """Which axes of which states an input has, too, beside "batch" and "past": name, axis and symbol of each."""
    of_inputs = set().union(*(symbols(item.shape) for item in spec.inputs)) - {"batch", "past"}
    return [
        (state.name, axis, dim)
        for state in spec.state
        for axis, dim in enumerate(state.shape)
        if isinstance(dim, str) and dim in of_inputs
    ]


def _nothing(role: str, spec: StateSpec, sizes: Mapping[str, int]) -> Array:
    """What a state begins with that nobody gives."""
    try:
        return np.zeros([_size(dim, sizes) for dim in spec.shape], spec.dtype)
    except (MemoryError, ValueError) as error:
        raise PortlmError(f"{role}: no memory for {spec.name} of {sizes['batch']} rows: {error}") from error


def _size(dim: int | str, sizes: Mapping[str, int]) -> int:
    return dim if isinstance(dim, int) else sizes[dim]


def _given(spec: StateSpec, value: Array, sizes: dict[str, int]) -> Array:
    """The value of a given state, which must fit its spec and what other values have said of its symbols."""
    shape = getattr(value, "shape", ())
    fits = isinstance(value, np.ndarray) and value.dtype == spec.dtype and len(shape) == len(spec.shape)
    for size, dim in zip(shape, spec.shape, strict=False):
        wanted = sizes.setdefault(dim, size) if isinstance(dim, str) else dim
        fits = fits and size == wanted and size > 0
    if not fits:
        wanted_shape = ", ".join(map(str, spec.shape))
        kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise UsageError(
            f"{spec.name} must be {spec.dtype} ({wanted_shape}) for {sizes['batch']} rows, got {kind} {shape}"
        )
    return np.ascontiguousarray(value).copy()
