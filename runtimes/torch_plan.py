"""Runs a plan (portlm.plan) in PyTorch. No code of the artifact is run: nodes are looked up in a closed table.

Before anything is computed, shapes and types are followed through the whole plan, so that a value larger than any
model has is refused and not made. Then one call on zeros of small sizes shows whether everything fits. What depends on
weights alone is computed once, the rest at every call; a value is let go after its last use.

The weights are mapped from the artifact's file, not read: pages that are used come in by themselves, and the mapping is
private, so that nothing can be written back.
"""

import functools
import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from portlm.errors import FormatError, PortlmError
from portlm.files import open_regular, shown
from portlm.models.roles import Role
from portlm.plan import ITEM_BYTES, MAX_RANK, Plan
from portlm.roles import StateSpec, TensorSpec, symbols
from portlm.runtimes.torch_operators import Function, RefusedError, Shape, operators

DTYPES = {
    "float32": torch.float32, "int64": torch.int64, "uint8": torch.uint8, "int8": torch.int8,
    "float16": torch.float16, "bfloat16": torch.bfloat16,
}  # fmt: skip
SIZES = (2, 3, 5, 7, 11, 13, 17, 19)  # stand for the role's symbols; different, so that mistakes show
MAX_TRIAL = 2**24  # elements of a value at these sizes, or four times those of the largest weight


@dataclass(frozen=True)
class Step:
    """One call of a function.

    Attributes:
        function: of tensors; an absent one is None.
        shapes: shapes of the inputs -> shapes of the outputs.
        inputs: where they are; 0 is always None.
        outputs: where they go.
        dtypes: of the inputs, "" for any, several as "uint8|int8".
        kinds: of the outputs, "" for that of its first input.
        name: for messages.
    """

    function: Function
    shapes: Callable[[Sequence[Any]], Sequence[Shape]]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dtypes: tuple[str, ...]
    kinds: tuple[str, ...]
    name: str


def make_role(plan: Plan, path: Path, weights: Path, device: str) -> Role:
    """Make a plan callable.

    Args:
        plan: from read_plan.
        path: where it came from, for messages.
        weights: the weight file that it was made for.
        device: of PyTorch.

    Returns:
        The plan's role: a function of tensors on the device.

    Raises:
        FormatError: the plan is not one that could run.
    """
    return Role(open_program(plan, path, weights, device), plan.inputs, plan.outputs, plan.state)


def open_program(plan: Plan, path: Path, weights: Path, device: str) -> "Program":
    """Make a plan callable, and its inner values visible; arguments and errors as for make_role."""
    try:
        return Program(plan, map_weights(plan, weights), device)
    except RefusedError as error:
        raise FormatError(f"{path}: {error}; compile again") from error
    except FormatError as error:  # of the first call
        raise FormatError(f"{path}: {error}") from error


class Program:
    """The nodes of a plan as functions of tensors. Calling it takes the inputs and then the states, in order.

    Args:
        plan: as read.
        tensors: its weights.
        device: where it runs.

    Raises:
        RefusedError: an operator is not in the table, or a node does not fit what it is given.
    """

    def __init__(self, plan: Plan, tensors: Mapping[str, Tensor], device: str):
        self._plan = plan
        self._slots: dict[str, int] = {"": 0}
        self._steps: list[Step] = []
        self._shared: dict[tuple[Any, ...], int] = {}
        self._count = 1
        self._given = [self._slot(spec.name) for spec in plan.taken()]
        constants = {self._slot(name): tensor for name, tensor in tensors.items()}
        for name, constant in plan.constants.items():
            tensor = torch.tensor(constant.values, dtype=DTYPES[constant.dtype]).reshape(constant.shape)
            constants[self._slot(name)] = tensor
        for i, node in enumerate(plan.nodes):
            try:
                self._add(i)
            except RefusedError as error:
                raise RefusedError(f"node {i} ({shown(node.operator)}) {error}") from None
        wanted = [*(spec.name for spec in plan.outputs), *(s.output for s in plan.state if s.output)]
        self._results = [self._slots[name] for name in wanted]
        self._copied = [False] * len(wanted)
        sizes = _trial_sizes(plan)
        self._measure(constants, sizes)
        self._fold(constants, device)
        self._release = self._last_uses()
        self._try(sizes, device)

    def _slot(self, name: str) -> int:
        if name not in self._slots:
            self._slots[name] = self._count
            self._count += 1
        return self._slots[name]

    def _add(self, place: int) -> None:
        """Turn a node into steps."""
        plan, node = self._plan, self._plan.nodes[place]
        operator = operators().get(node.operator)
        if operator is None:
            raise RefusedError("is no operator of a plan")
        static = {}
        for i in operator.static:
            if i < len(node.inputs):
                constant = plan.constants.get(node.inputs[i])
                if constant is None or constant.dtype != "int64" or len(constant.shape) > 1:
                    raise RefusedError(f"needs its input {i} to be a constant list of int64")
                static[i] = tuple(int(value) for value in constant.values)
        if "" in node.inputs[: operator.least]:
            raise RefusedError("lacks an input")
        call = operator.call(node.attributes, static, len(node.inputs), len(node.outputs))
        inputs = [self._slots[name] for name in node.inputs]
        taken = operator.taken(call)
        kinds = [taken[min(i, len(taken) - 1)] for i in range(len(inputs))]
        replaced = {}
        for i, (function, shapes, positions) in operator.derive(call).items():
            sources = [inputs[p] if p < len(inputs) else 0 for p in positions]
            types = [kinds[p] if p < len(kinds) else "" for p in positions]
            rule = functools.partial(shapes, call)
            replaced[i] = self._derived(function, rule, sources, types, f"node {place} ({node.operator})")
        if operator.most in replaced:  # an input more, behind those that the node may have
            missing = operator.most - len(inputs)
            inputs, kinds = [*inputs, *[0] * missing, 0], [*kinds, *[""] * missing, ""]
        inputs = [replaced.get(i, slot) for i, slot in enumerate(inputs)]
        moving = [i for i in range(len(inputs)) if i not in operator.static]
        self._steps.append(
            Step(
                operator.bind(call),
                functools.partial(operator.shapes, call),
                tuple(inputs[i] for i in moving),
                tuple(self._slot(name) for name in node.outputs),
                tuple(kinds[i] for i in moving),
                operator.given(call),
                f"node {place} ({node.operator}, {shown(node.outputs[0])})",
            )
        )

    def _derived(
        self, function: Function, shapes: Any, sources: Sequence[int], types: Sequence[str], name: str
    ) -> int:
        """Where a value is that several nodes may need; it is computed before the first of them."""
        key = (function, *sources)
        if key not in self._shared:
            self._shared[key] = self._count
            self._count += 1
            self._steps.append(
                Step(function, shapes, tuple(sources), (self._shared[key],), tuple(types), ("float32",), name)
            )
        return self._shared[key]

    def _measure(self, constants: Mapping[int, Tensor], sizes: Mapping[str, int]) -> None:
        """Follow shapes and types through the steps, so that nothing is computed that is larger than a model's."""
        shapes: dict[int, Any] = {slot: tuple(tensor.shape) for slot, tensor in constants.items()}
        kinds = {slot: _kind(tensor) for slot, tensor in constants.items()}
        for slot, spec in zip(self._given, self._plan.taken(), strict=True):
            shapes[slot], kinds[slot] = _shape(spec, sizes), spec.dtype
        shapes[0] = None
        limit = max([MAX_TRIAL, *(4 * tensor.numel() for tensor in constants.values())])
        for step in self._steps:
            for slot, kind in zip(step.inputs, step.dtypes, strict=True):
                if slot and kind and kinds[slot] not in kind.split("|"):
                    raise RefusedError(f"{step.name} is given {kinds[slot]} and takes {kind}")
            try:
                results = step.shapes([shapes[slot] for slot in step.inputs])
            except (ValueError, IndexError, TypeError, ZeroDivisionError) as error:
                given = [shapes[slot] for slot in step.inputs]
                raise RefusedError(f"{step.name} does not fit what it is given, {given}: {error}") from error
            for slot, shape, kind in zip(step.outputs, results, step.kinds, strict=True):
                if len(shape) > MAX_RANK or math.prod(shape) > limit or min(shape, default=0) < 0:
                    raise RefusedError(f"{step.name} gives a value of the shape {str(shape)[:80]}")
                shapes[slot] = shape
                kinds[slot] = kind or kinds[step.inputs[0]]

    def _try(self, sizes: Mapping[str, int], device: str) -> None:
        """Run once on zeros of small sizes; compare what comes out with what the role declares.

        Raises:
            FormatError: a node does not take what it is given.
        """
        plan = self._plan
        specs = plan.taken()
        given = [torch.zeros(_shape(spec, sizes), dtype=DTYPES[spec.dtype], device=device) for spec in specs]
        with torch.inference_mode():
            results = self(*given)
        sources = {_place(tensor) for tensor in (*given, *self._start) if tensor is not None}
        for i, result in enumerate(results):  # the caller owns what it gets
            self._copied[i] = _place(result) in sources
            sources.add(_place(result))
        expected = [(spec.name, spec.dtype, _shape(spec, sizes)) for spec in plan.outputs]
        for state in plan.state:
            if state.output:
                grown = (
                    {**sizes, "past": sizes["past"] + sizes.get("sequence", 0)} if "past" in sizes else sizes
                )
                shape = _shape(state, grown if state.update == "append" else sizes)
                expected.append((state.output, state.dtype, shape))
        for result, (name, dtype, shape) in zip(results, expected, strict=True):
            if result.shape != shape or _kind(result) != dtype:
                raise RefusedError(
                    f"it computes {shown(name)} as {_kind(result)} {tuple(result.shape)} where the role has "
                    f"{dtype} {shape}"
                )

    def _fold(self, constants: Mapping[int, Tensor], device: str) -> None:
        """Compute what depends on weights alone, and keep what the rest needs."""
        known: dict[int, Any] = {slot: tensor.to(device) for slot, tensor in constants.items()}
        rest = []
        with torch.inference_mode():
            for step in self._steps:
                if all(slot in known or slot == 0 for slot in step.inputs):
                    results = _run(step, [known.get(slot) for slot in step.inputs])
                    known.update(zip(step.outputs, results, strict=True))
                else:
                    rest.append(step)
        self._steps = rest
        needed = {slot for step in rest for slot in step.inputs} | set(self._results)
        self._start = [known.get(slot) if slot in needed else None for slot in range(self._count)]

    def _last_uses(self) -> list[tuple[int, ...]]:
        """For each step, the values that nothing needs after it."""
        kept = {slot for slot, value in enumerate(self._start) if value is not None} | {0, *self._results}
        release: list[tuple[int, ...]] = []
        for step in reversed(self._steps):
            last = tuple(slot for slot in {*step.inputs, *step.outputs} if slot not in kept)
            kept.update(last)
            release.append(last)
        return release[::-1]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs, and then the new states.

        Raises:
            PortlmError: out of memory.
            FormatError: a node failed for another reason.
        """
        values = self._compute(tensors, self._release)
        return tuple(
            values[slot].clone() if copied else values[slot]
            for slot, copied in zip(self._results, self._copied, strict=True)
        )

    def values(self, *tensors: Tensor) -> dict[str, Tensor]:
        """Return every value that a call computes, by name; arguments and errors as for the call itself."""
        values = self._compute(tensors, [()] * len(self._steps))
        return {name: values[slot] for name, slot in self._slots.items() if values[slot] is not None}

    def _compute(self, tensors: Sequence[Tensor], release: Sequence[tuple[int, ...]]) -> list[Any]:
        """Run the steps, and let go of the values of `release` after each; return the rest by slot."""
        values: list[Any] = list(self._start)
        for slot, tensor in zip(self._given, tensors, strict=True):
            values[slot] = tensor
        for step, unused in zip(self._steps, release, strict=True):
            results = _run(step, [values[slot] for slot in step.inputs])
            for slot, result in zip(step.outputs, results, strict=True):
                values[slot] = result
            for slot in unused:
                values[slot] = None
        return values


def _trial_sizes(plan: Plan) -> dict[str, int]:
    """A size for every symbol of the role."""
    sizes: dict[str, int] = {}
    for spec in plan.taken():
        if spec.dtype not in ("float32", "int64", "int8"):
            raise RefusedError(f"the role has a tensor of {spec.dtype}, a plan computes in float32")
        for symbol in sorted(symbols(spec.shape) - sizes.keys()):
            if len(sizes) == len(SIZES):
                raise RefusedError(f"the role has more than {len(SIZES)} different sizes")
            sizes[symbol] = SIZES[len(sizes)]
        if math.prod(_shape(spec, sizes)) > MAX_TRIAL:
            raise RefusedError(f"the role's {shown(spec.name)} is larger than that of any model")
    return sizes


def _shape(spec: TensorSpec | StateSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    try:
        return tuple(
            d if isinstance(d, int) else sum(sizes[part] for part in d.split(" + ")) for d in spec.shape
        )
    except KeyError as error:
        raise RefusedError(f"nothing says how large {shown(error.args[0])} is") from None


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _run(step: Step, given: list[Any]) -> tuple[Tensor, ...]:
    try:
        return _tuple(step.function(*given))
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        if "allocate memory" in str(error):
            raise PortlmError(f"{step.name}: out of memory: use a smaller batch") from error
        raise FormatError(f"{step.name} failed: {_line(error)}; compile the artifact again") from error


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def map_weights(plan: Plan, path: Path) -> dict[str, Tensor]:
    """Return the weights of a plan, in the memory of a private mapping of their file.

    Raises:
        RefusedError: one lies outside of it.
    """
    if not plan.weights:
        return {}
    with open_regular(path) as file:
        if path.stat().st_size == 0:
            raise RefusedError("the weight file is empty")
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {}
    for name, weight in plan.weights.items():
        dtype, count = DTYPES[weight.dtype], math.prod(weight.shape)
        if weight.offset + count * ITEM_BYTES[weight.dtype] > len(memory):
            raise RefusedError(f"the weight file ends before {shown(name)}")
        flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=weight.offset) if count else None
        tensors[name] = (torch.empty(0, dtype=dtype) if flat is None else flat).reshape(weight.shape)
    return tensors


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
