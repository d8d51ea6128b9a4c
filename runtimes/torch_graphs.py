"""Steps of one token on CUDA, recorded once and launched as one graph.

To start a step's hundreds of small kernels one by one takes longer than they run. A graph has fixed shapes and
addresses, and a cache grows. So a step is recorded for a cache of C slots, a power of two, of which the last P are
those of the state: the slots in front of them are padding, which every role with a mask of all slots knows how to leave
out. Behind the step, still in the graph, the cache moves up by one slot, so that the next step begins where this one
ended. When P outgrows C the step is recorded anew for twice as many.

Between steps the state stays in the graph's memory. Who wants it elsewhere, another order of its rows or another state
in its place, gets a copy first.
"""

import os
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from portlm.engine import Array, CallSpec
from portlm.errors import PortlmError

FEWEST_SLOTS = 64
# Of a cache that a step may move: at a device's bandwidth, about what launching a step takes otherwise.
MOST_BYTES = 1 << 28
MOST_STEPS = 4  # that are kept; each holds its cache twice
# Calls of one token in a row before one is recorded or takes a state over, which both take a while.
PATIENCE = 4

Function = Callable[..., tuple[Tensor, ...]]
Tensors = dict[str, Any]


class Graph(Protocol):
    """What records work on a device and repeats it on the same memory."""

    def capture(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Record what a function does, and return its results, which every replay writes again."""
        ...

    def replay(self) -> None:
        """Do it again."""
        ...


class CudaGraph:
    """A graph of CUDA. Whoever records one must be ready for RuntimeError: work that waits for the device cannot be."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Run the work on the side, twice, in which libraries prepare themselves, and record it then."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), _no_waiting():
            work()
            work()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self._graph):
            return work()

    def replay(self) -> None:
        """Launch it on the current stream."""
        self._graph.replay()


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Have work that waits for the device raise RuntimeError, in which a recording would be lost less gently."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


class Held:
    """A state that lies in a step's memory, until something else needs that."""

    def __init__(self, step: "Step", past: int):
        self.past = past
        self._step: Step | None = step
        self._tensors: Tensors = {}

    def lies_in(self, step: "Step") -> bool:
        """Say whether it does, still and there."""
        return self._step is step

    def leave(self) -> None:
        """Go on outside."""
        if self._step is not None:
            self._tensors = {name: self._step.kept(name, self.past).clone() for name in self._step.past}
            self._step = None

    def tensor(self, name: str) -> Tensor:
        """Return a tensor that nobody writes to any more."""
        self.leave()
        found: Tensor = self._tensors[name]
        return found


class Slot:
    """One tensor of a held state, in the place of the tensor itself."""

    __slots__ = ("held", "name")

    def __init__(self, held: Held, name: str):
        self.held, self.name = held, name

    def tensor(self) -> Tensor:
        """Return it."""
        return self.held.tensor(self.name)


class Step:
    """One token of B rows behind up to C slots.

    Attributes:
        past: by name of the state, its tensor of C slots, which the next replay reads.
        holder: whose state lies there.
    """

    def __init__(self, function: Function, spec: CallSpec, rows: int, slots: int, device: str, graph: Graph):
        self.slots = slots
        self._axes = {item.name: item.shape.index("past") for item in spec.state}
        sizes = {"batch": rows, "past": slots, "sequence": 1, "kept": 1, "past + sequence": slots + 1}
        shapes = {item.name: [_size(d, sizes) for d in item.shape] for item in spec.inputs}
        shapes |= {item.name: [_size(d, sizes) for d in item.shape] for item in spec.state}
        counts = [int(np.prod(shapes[item.name])) for item in spec.inputs]
        # All inputs lie side by side, so that one copy brings them to the device.
        self._sent = torch.zeros(sum(counts), dtype=torch.int64, device=device)
        self._host = torch.zeros(sum(counts), dtype=torch.int64, pin_memory=device == "cuda")
        rooms, given = (
            [part.view(shapes[item.name]) for item, part in zip(spec.inputs, all_.split(counts), strict=True)]
            for all_ in (self._host, self._sent)
        )
        self._inputs = {item.name: room.numpy() for item, room in zip(spec.inputs, rooms, strict=True)}
        for tensor, item in zip(given, spec.inputs, strict=True):
            tensor.fill_(
                "past + sequence" in item.shape
            )  # ids and places that every model has, and nothing hidden
        self.past = {
            item.name: torch.zeros(shapes[item.name], dtype=getattr(torch, item.dtype), device=device)
            for item in spec.state
        }
        self.holder: Callable[[], Held | None] = lambda: None
        answers = len(spec.outputs)

        def work() -> tuple[Tensor, ...]:
            results = function(*given, *self.past.values())
            for (name, past), grown in zip(self.past.items(), results[answers:], strict=True):
                past.copy_(grown.narrow(self._axes[name], 1, slots))
            return tuple(results[:answers])

        self._graph = graph
        self._outputs = graph.capture(work)

    def kept(self, name: str, past: int) -> Tensor:
        """Return the part of a tensor that holds the state's P slots."""
        return self.past[name].narrow(self._axes[name], self.slots - past, past)

    def load(self, tensors: Mapping[str, Tensor], past: int) -> None:
        """Take over a state of P slots, in the place of that which lies here."""
        self.give_back()
        for name, tensor in tensors.items():
            self.past[name].zero_()  # weights of 0 times what was here last must be 0
            self.kept(name, past).copy_(tensor)

    def give_back(self) -> None:
        """Let the state that lies here go on outside."""
        holder = self.holder()
        if holder is not None and holder.lies_in(self):
            holder.leave()

    def run(self, inputs: Mapping[str, Array], past: int) -> tuple[list[Array], Held]:
        """Read one token of each row; return the outputs, and the state of P + 1 slots."""
        for name, room in self._inputs.items():
            given = inputs[name]
            free = room.shape[-1] - given.shape[-1]
            room[..., :free] = 0
            room[..., free:] = given
        self._sent.copy_(self._host, non_blocking=True)
        self._graph.replay()
        held = Held(self, past + 1)
        self.holder = weakref.ref(held)
        return [output.to("cpu", copy=True).numpy() for output in self._outputs], held


def _size(size: int | str, sizes: Mapping[str, int]) -> int:
    return size if isinstance(size, int) else sizes[size]


class Graphs:
    """The recorded steps of an engine.

    Args:
        make: what records one.
        functions: by role.
        context_length: the largest number of tokens that one row may have.
        device: of PyTorch.

    Attributes:
        problems: why a role's steps are not recorded, by role.
    """

    def __init__(
        self, make: Callable[[], Graph], functions: Mapping[str, Function], context_length: int, device: str
    ):
        self._make, self._functions, self._device = make, functions, device
        self._most = context_length - 1
        self._steps: dict[tuple[str, int, int], Step] = {}
        self._calls: Counter[tuple[str, int]] = Counter()
        self.problems: dict[str, str] = {}

    def call(
        self, role: str, spec: CallSpec, inputs: Mapping[str, Array], tensors: Tensors
    ) -> tuple[list[Array], Tensors] | None:
        """Run a role on one token of each row; None if this call has to be made in another way.

        Args:
            role: its name.
            spec: what it takes.
            inputs: of the call, checked.
            tensors: of the state, by name: tensors or Slots. Of None they are as they were.

        Returns:
            The outputs in order, and the new state.
        """
        if role in self.problems or not takes(spec):
            return None
        ids = inputs[spec.inputs[0].name]
        rows, past = len(ids), _past(spec, inputs)
        slots = self._slots(past + 1)
        first = next(iter(tensors.values()))
        if any(inputs[i.name].shape[-1] != 1 for i in spec.inputs if "past + sequence" not in i.shape):
            self._calls[role, rows] = 0
            return None
        self._calls[role, rows] += 1
        waits = self._calls[role, rows] <= PATIENCE and not isinstance(first, Slot)
        if waits or past < 1 or slots <= past or _bytes(spec, rows, slots) > MOST_BYTES:
            return None
        step = self._step(role, spec, rows, slots)
        if step is None:
            return None
        if not (isinstance(first, Slot) and first.held.lies_in(step)):
            step.load({name: t.tensor() if isinstance(t, Slot) else t for name, t in tensors.items()}, past)
        outputs, held = step.run(inputs, past)
        return outputs, {name: Slot(held, name) for name in tensors}

    def _slots(self, past: int) -> int:
        """For a state of P slots, a power of two, but so few that the next token still fits into the context."""
        return min(max(FEWEST_SLOTS, 1 << (past - 1).bit_length()), self._most)

    def _step(self, role: str, spec: CallSpec, rows: int, slots: int) -> Step | None:
        """The recorded step, the last one used at the end; None, and a problem, if it cannot be recorded."""
        key = role, rows, slots
        step = self._steps.pop(key, None)
        if step is None:
            while len(self._steps) >= MOST_STEPS:
                self._steps.pop(next(iter(self._steps))).give_back()
            try:
                step = Step(self._functions[role], spec, rows, slots, self._device, self._make())
            except (
                RuntimeError,
                PortlmError,
            ) as error:  # it waits for the device, or there is too little memory for two caches
                self.problems[role] = (str(error).splitlines() or [type(error).__name__])[0]
                return None
        self._steps[key] = step
        return step


def are_wanted() -> bool:
    """Say whether engines on CUDA are to record their steps: PORTLM_NO_CUDA_GRAPHS is not set."""
    return os.environ.get("PORTLM_NO_CUDA_GRAPHS", "0") in ("", "0")


def takes(spec: CallSpec) -> bool:
    """Say whether a role's steps can be recorded: it reads ids and a mask of all slots, and all of its state grows."""
    places = {("batch", "sequence"), ("batch", "past + sequence"), ("kept",)}
    return (
        all(item.dtype == "int64" and tuple(item.shape) in places for item in spec.inputs)
        and any("past + sequence" in item.shape for item in spec.inputs)
        and tuple(spec.inputs[0].shape) == ("batch", "sequence")
        and bool(spec.state)
        and all(_grows(item.update, item.shape) for item in spec.state)
    )


def _grows(update: str, shape: Sequence[int | str]) -> bool:
    return (
        update == "append"
        and shape.count("past") == 1
        and {d for d in shape if isinstance(d, str)} == {"batch", "past"}
    )


def _past(spec: CallSpec, inputs: Mapping[str, Array]) -> int:
    mask = next(item.name for item in spec.inputs if "past + sequence" in item.shape)
    return int(inputs[mask].shape[1] - inputs[spec.inputs[0].name].shape[1])


def _bytes(spec: CallSpec, rows: int, slots: int) -> int:
    sizes = {"batch": rows, "past": slots}
    count = 0
    for item in spec.state:
        width = torch.empty(0, dtype=getattr(torch, item.dtype)).element_size()
        count += width * int(np.prod([_size(d, sizes) for d in item.shape], dtype=np.int64))
    return count
