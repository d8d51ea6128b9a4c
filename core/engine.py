"""What every engine offers: the functions of a model ("roles"), each with its state handed in and handed back.

An engine knows nothing of text, sampling or batches of different lengths; `Session` does all that once for all. What
a role takes, returns and remembers is said by its specs (portlm.roles), and nothing here knows a model.

**Ownership, one rule.** `run`, `reorder`, `crop` and `join` consume the states that they are given: a state is used
once. Who wants to keep one calls `copy` first. So an engine may grow or overwrite a state's memory in place.

B rows, T new tokens, P slots already in the state, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from portlm.arguments import shown
from portlm.artifact import Manifest
from portlm.errors import ContextLengthError, UsageError
from portlm.roles import StateSpec, TensorSpec

Array = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]

PROFILES = ("auto", "portable", "fused", "native")
UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}


class Placement(Struct, frozen=True):
    """Where the nodes of a model really are, as the engine reports it after loading.

    Attributes:
        nodes: device to number of nodes on it.
        fallback: nodes that are elsewhere than asked, each as "name (operator)". Empty unless allow_fallback was given.
        note: what a reader of a measurement must know, such as that the device is emulated in software.
    """

    nodes: Mapping[str, int]
    fallback: tuple[str, ...] = ()
    note: str = ""


class OpenRequest(Struct, frozen=True):
    """What an engine is asked to open.

    Attributes:
        folder: the artifact, or a plain checkpoint folder if manifest is None.
        manifest: already checked; the engine verifies the hash of each file it opens.
        device: one that the table of engines lists.
        profile: one of PROFILES; "auto" takes the best one that the artifact has for this engine and device.
        allow_fallback: let nodes that the device cannot run go to the CPU.
        threads: of the CPU; None leaves the choice to the engine.
        compiled: the folder that the compiled files of the manifest lie in, None for the artifact itself. It is a
            private cache of this user's, whose files were compared with its record when it was found.
    """

    folder: Path
    manifest: Manifest | None
    device: str
    profile: str = "auto"
    allow_fallback: bool = False
    threads: int | None = None
    compiled: Path | None = None


class CallSpec(Struct, frozen=True):
    """What one role takes, returns and remembers; a manifest's role has the same three."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    state: tuple[StateSpec, ...] = ()


class State:
    """What an engine carries for B rows of one role, from one call to the next. Used once: see above.

    Attributes:
        role: whose state it is.
        rows: B.
        past: P, slots along the axis that grows; 0 for a role without one.
        owner: of the engine that made it, which takes no other's; None if it does not say.
    """

    __slots__ = ("_owner", "_past", "_role", "_rows", "_tensors")

    def __init__(self, role: str, rows: int, past: int, tensors: dict[str, Any], owner: object = None):
        """Take over an engine's own tensors by name; for engines."""
        self._role, self._rows, self._past, self._owner = role, rows, past, owner
        self._tensors: dict[str, Any] | None = tensors

    # Read only: what is behind them are tensors of these sizes.
    role = property(lambda self: self._role)
    rows = property(lambda self: self._rows)
    past = property(lambda self: self._past)
    owner = property(lambda self: self._owner)

    def take(self) -> dict[str, Any]:
        """Return the tensors and leave the state used up; for engines.

        Raises:
            UsageError: it was used before.
        """
        tensors = self.peek()
        self._tensors = None
        return tensors

    def peek(self) -> dict[str, Any]:
        """Return the tensors of a state that has not been used; for engines.

        Raises:
            UsageError: it was used before.
        """
        if self._tensors is None:
            raise UsageError(f"this state of {self.role} was used before: copy it first to keep it")
        return self._tensors


class Engine(Protocol):
    """A loaded model on one device. One engine serves any number of states.

    Attributes:
        name: "torch", "ort", "tvm", "packed" or "null".
        device: "cpu", "cuda", "vulkan" or "opencl".
        profile: "portable", "fused" or "native" (no exported graph).
        precision: of the arithmetic, "fp32", or one of portlm.quantization.
        vocab_size: V, the number of token ids.
        context_length: the largest number of tokens that one row may have.
        roles: what it can run.
    """

    name: str
    device: str
    profile: str
    precision: str
    vocab_size: int
    context_length: int

    @property
    def roles(self) -> Mapping[str, CallSpec]: ...  # noqa: D102

    @classmethod
    def open(cls, request: OpenRequest) -> Self:
        """Load a model.

        Raises:
            EngineUnavailableError: a package, driver or device is missing. The message says how to get it.
            PlacementError: a node would run elsewhere, and allow_fallback is False.
            FormatError: a file is missing, altered or not what it should be.
            UsageError: the artifact has no such profile for this engine and device.
        """
        ...

    @classmethod
    def graphs(cls, request: OpenRequest) -> tuple[str, ...]:
        """Return the artifact's graphs that open() would hand to a library, or to what was made of them, by name.

        Who opens an artifact has them checked first; open() itself does not.

        Raises:
            FormatError, UsageError: as open().
        """
        ...

    def start(self, role: str, batch: int, given: Mapping[str, Array] | None = None) -> State:
        """Return the state of B rows before their first call.

        Args:
            role: one of roles.
            batch: B, at least 1.
            given: value of each state whose spec says that it is given.

        Raises:
            UsageError: no such role, a value is missing, or it does not fit.
        """
        ...

    def run(self, role: str, inputs: Mapping[str, Array], state: State) -> tuple[dict[str, Array], State]:
        """Call a role once.

        Args:
            role: one of roles.
            inputs: exactly those of the role's spec. In attention_mask, 0 stands for a slot that nothing may look
                at, and a masked token leaves every state as if it had not been there.
            state: consumed, unless the inputs are refused.

        Returns:
            The outputs by name, which the caller owns, and the next state. What is said of masked tokens means
            nothing.

        Raises:
            UsageError: inputs or state do not belong together, or lie outside the model's tables.
            ContextLengthError: more slots than the context holds.
            PortlmError: the device failed, for lack of memory above all.
        """
        ...

    def reorder(self, state: State, rows: Sequence[int], skip: int = 0) -> State:
        """Return a state whose row i is row rows[i] of the old one; fewer, more and repeated rows are fine.

        Args:
            state: consumed.
            rows: at least one.
            skip: leading slots to drop, which no row may need any more.
        """
        ...

    def crop(self, state: State, lengths: Sequence[int]) -> State:
        """Return a state in which row b has only its first lengths[b] slots.

        Rows end together again: there are max(lengths) slots, and a shorter row gets slots of zeros on the left, which
        the caller must mask.

        Args:
            state: consumed.
            lengths: one for each row, each at most P.

        Raises:
            UsageError: a state is replaced at every call, so its past cannot be had back.
        """
        ...

    def join(self, states: Sequence[State]) -> State:
        """Return the rows of several states of one role as one state, all consumed.

        Shorter ones get slots of zeros on the left, which the caller must mask.
        """
        ...

    def copy(self, state: State) -> State:
        """Return a second state with the same content; the first one stays usable."""
        ...

    def versions(self) -> dict[str, str]:
        """Return the versions of the packages that decide what is computed, by distribution."""
        ...

    def placement(self) -> Placement:
        """Return where each node runs."""
        ...

    def close(self) -> None:
        """Free the device. A closed engine is not used again; closing twice is harmless."""
        ...


class RowChoice(NamedTuple):
    """How the tokens of one row are chosen, see portlm.ops.token_selection; step counts its tokens."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    stream: int
    step: int


class Advance(Struct, frozen=True):
    """What an engine is asked that can write several tokens by itself.

    Attributes:
        lengths: (B,) tokens that each row has read.
        tokens: (B,) the one that each reads next.
        choices: of each row.
        vocabulary: ids from here on stand for no token and are never drawn.
        ends: after a token that is one of these, no further one is drawn for any row.
        count: tokens of each row, at most.
        seconds: after which no further token is begun.
    """

    lengths: Ids
    tokens: Ids
    choices: Sequence[RowChoice]
    vocabulary: int
    ends: frozenset[int]
    count: int
    seconds: float


class Advances(Protocol):
    """What an Engine may have beside the rest: between two tokens there is nothing to do but to choose."""

    def advance(self, state: State, asked: Advance) -> tuple[Ids, State] | None:
        """Draw tokens for all rows of a state, which is consumed; the last of them are not read yet.

        Returns:
            (n, B) ids, n at least 1, and the next state; None if this cannot be done here, and the state is as it was.

        Raises:
            PortlmError: the logits are not numbers.
        """
        ...


class Scores(Protocol):
    """What an Engine may have beside the rest: saying how probable tokens are without the logits of all others."""

    def can_score(self, role: str) -> bool:
        """Say whether it can for this role."""
        ...

    def score(
        self, role: str, inputs: Mapping[str, Array], state: State, targets: Ids
    ) -> tuple[Array, Ids, State]:
        """Call a role once, as `run` does, for what its logits say of one token each.

        Args:
            role: one that can_score.
            inputs: as of run.
            state: consumed, unless the inputs are refused.
            targets: (B, n) ids, as many for each row as `run` would give logits.

        Returns:
            (B, n) float64 log-probabilities of the targets, (B, n) most probable ids, -1 where the logits are no
            numbers (portlm.ops.token_scores), and the next state.

        Raises:
            UsageError, ContextLengthError, PortlmError: as of run; UsageError if the targets do not fit.
        """
        ...


def call_specs(manifest: Manifest) -> dict[str, CallSpec]:
    """Return the roles of a manifest."""
    return {name: CallSpec(role.inputs, role.outputs, role.state) for name, role in manifest.roles.items()}


def graph_names(manifest: Manifest, profile: str) -> tuple[str, ...]:
    """Return the graph of each role in a profile, of those roles that have it."""
    return tuple(role.profiles[profile] for role in manifest.roles.values() if profile in role.profiles)


def grows(spec: CallSpec) -> bool:
    """Say whether a role's state has an axis "past"."""
    return any("past" in state.shape for state in spec.state)


def goes_back(spec: CallSpec) -> bool:
    """Say whether a role's state can be cropped: a state that is replaced at every call has no past."""
    return all(state.update != "replace" for state in spec.state)


class InputCheck:
    """Raises UsageError unless the inputs of a call belong together and lie inside the model's tables.

    What runs below is generated or compiled code, some of which reads memory at any index it is given.
    """

    def __init__(self, role: str, spec: CallSpec, vocab_size: int, context_length: int):
        """Prepare what is looked up at every call."""
        self.role, self.spec = role, spec
        self.vocab_size, self.context_length = vocab_size, context_length
        self.grows = grows(spec)
        self._plan: list[tuple[str, Any, tuple[Any, ...], int | str]] = []
        for tensor in sorted(self.spec.inputs, key=lambda t: any("+" in str(d) for d in t.shape)):
            dims = tuple(tuple(d.split(" + ")) if isinstance(d, str) else d for d in tensor.shape)
            self._plan.append((tensor.name, np.dtype(tensor.dtype), dims, self._limit(tensor)))

    def __call__(
        self, inputs: Mapping[str, Array], rows: int, past: int, known: Mapping[str, int] = {}
    ) -> dict[str, int]:
        """Check one call on a state of `rows` rows and `past` slots, in which other symbols have the sizes `known`.

        Returns:
            The sizes that the symbols of the call stand for.
        """
        sizes = {"batch": rows, "past": past, **known}
        if not isinstance(inputs, Mapping):
            raise UsageError(f"{self.role} takes a dictionary of arrays by name, got {shown(inputs)}")
        if len(inputs) != len(self._plan):
            extra = inputs.keys() - {name for name, *_ in self._plan}
            if extra:
                raise UsageError(f"{self.role} has no input {shown(min(extra, key=str))}")
        for name, dtype, dims, limit in self._plan:
            array = inputs.get(name)
            if array is None:
                raise UsageError(f"{self.role} needs the input {name}")
            if not isinstance(array, np.ndarray):
                raise UsageError(f"{name} must be an array of numpy, got {shown(array)}")
            if array.dtype != dtype:
                raise UsageError(f"{name} must be {dtype}, got {array.dtype}")
            if array.ndim != len(dims):
                raise self._wrong(name, array, sizes)
            for size, dim in zip(array.shape, dims, strict=True):
                if dim.__class__ is not tuple:
                    fits = size == dim
                elif len(dim) == 1:
                    fits = size > 0 and sizes.setdefault(dim[0], size) == size
                else:
                    fits = size == sum(sizes.get(part, 0) for part in dim)
                if not fits:
                    raise self._wrong(name, array, sizes)
            if limit:
                _check_range(name, array, limit if isinstance(limit, int) else sizes.get(limit, 1))
        total = past + sizes.get("sequence", 0)
        if total > self.context_length:
            raise ContextLengthError(total, self.context_length, "the longest row with its padding")
        return sizes

    def _limit(self, spec: TensorSpec | StateSpec) -> int | str:
        """What the values of an input are below: a number or a symbol; 0 if they may be anything."""
        if np.dtype(spec.dtype).kind not in "iu":
            return 0
        known = limit_of(spec, self.vocab_size, self.context_length)
        return known or ("sequence" if spec.name.endswith("logits_to_keep") else 0)

    def check_given(self, spec: StateSpec, array: Array) -> None:
        """Check the values of a state that a caller gives, which is of the right shape and type and not empty.

        Raises:
            UsageError: it looks something up, and has a value outside of that table.
        """
        limit = self._limit(spec)
        if isinstance(limit, int) and limit:
            _check_range(spec.name, array, limit)

    def _wrong(self, name: str, array: Array, sizes: Mapping[str, int]) -> UsageError:
        wanted = next(spec.shape for spec in self.spec.inputs if spec.name == name)
        of = f"a state of {sizes['batch']} rows" + (f" and {sizes['past']} slots" if self.grows else "")
        known = ", ".join(f"{k} = {v}" for k, v in sizes.items() if k not in ("batch", "past"))
        return UsageError(
            f"{name} must be ({', '.join(map(str, wanted))}) with {of}{', ' * bool(known)}{known}, "
            f"got {array.shape}"
        )


def _check_range(name: str, array: Array, limit: int) -> None:
    array = np.asarray(
        array
    )  # a mask over an array would hide numbers from the check, and not from the engine
    if array.view(UNSIGNED[array.itemsize]).max() >= limit:  # a negative number is a huge one there
        raise UsageError(f"{name} must be from 0 to {limit - 1}, got {array.min()} to {array.max()}")


def limit_of(spec: TensorSpec | StateSpec, vocab_size: int, context_length: int) -> int | None:
    """Return what the values of an input or state are below, None if nothing is known.

    That is what export found in the graphs, and what the names of transformers stand for.
    """
    named = {"input_ids": vocab_size, "position_ids": context_length, "attention_mask": 2}
    known = [size for ending, size in named.items() if spec.name.endswith(ending)]
    return min(known if spec.below is None else [*known, spec.below], default=None)
