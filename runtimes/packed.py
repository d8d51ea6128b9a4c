"""The packed engine: runs the steps of a packed file (docs/packed.md) in C++, with its weights mapped.

The file is data: it is compared with the manifest, and read by a reader that checks every number (csrc/run). Where a
text needs nothing between two tokens but the choice of the next one, the whole loop runs in one call.
"""

import ctypes
import struct
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from portlm.arguments import shown
from portlm.artifact import CompiledEntry, Manifest
from portlm.engine import Advance, Array, Ids, OpenRequest, Placement, State, call_specs
from portlm.errors import EngineUnavailableError, FormatError, PortlmError, UsageError
from portlm.files import open_regular, safe_join
from portlm.ops.token_scores import check_targets, from_parts
from portlm.ops.token_selection import bad_row, check_filters
from portlm.quantization import EIGHT_BITS
from portlm.roles import TensorSpec, difference
from portlm.runtimes.base import EngineBase
from portlm.seen_files import check_data_files
from portlm.threads import StepThreads

FILE, PROFILE, VERSION = "packed.portlm", "fused", 2


class PackedEngine(EngineBase):
    """The roles of a packed file. A state is one block of memory that a call extends in place."""

    name = "packed"
    device = "cpu"
    profile = PROFILE
    precision = "fp32"

    def __init__(self, request: OpenRequest, manifest: Manifest, path: Path, file: Any):
        """Take over an opened file; use open()."""
        super().__init__(call_specs(manifest), manifest.model.vocab_size, manifest.model.context_length)
        self.precision = EIGHT_BITS if file.rounds_to_bytes else manifest.precision(rounds=True)
        found = {role[0]: place for place, role in enumerate(_checked(path, file, manifest))}
        try:
            self._programs = {name: file.open(found[name]) for name in self.roles}
        except RuntimeError as error:
            raise FormatError(f"{path}: {error}; compile again") from error
        self._sizes = {
            name: _sizes([spec.shape for spec in role.inputs]) for name, role in self.roles.items()
        }
        self._threads = StepThreads(_use_threads, request.threads)
        # A program has memory for one call at a time, and calls release Python's own lock.
        self._lock = threading.Lock()

    @classmethod
    def open(cls, request: OpenRequest) -> Self:
        """Map the packed file of an artifact.

        Args:
            request: profile "auto" or "fused". allow_fallback is ignored, there is nowhere else to run.

        Raises:
            EngineUnavailableError: portlm's kernels are not built (ExtensionError), or the device is another one.
            UsageError: nothing was compiled, or the folder is a plain checkpoint.
            FormatError: the file is missing, altered, damaged, or of another model.
        """
        from portlm import _C

        folder, manifest = request.folder, request.manifest
        if manifest is None:
            raise UsageError(f"packed runs exported models: run portlm export {folder} first")
        if request.device != cls.device:
            raise EngineUnavailableError(f"packed: no device {request.device} here, choose cpu")
        if request.profile not in ("auto", PROFILE):
            raise UsageError(f"packed has no profile {request.profile}: choose {PROFILE}")
        entries = _entries(manifest)
        if not entries or {entry.role for entry in entries} != manifest.roles.keys():
            raise UsageError(
                f"{folder} holds nothing compiled for packed: run portlm compile {folder} --engine packed"
            )
        if any(entry.files != (FILE,) for entry in entries):
            raise FormatError(f"{folder}: the entry compiled for packed must be of {FILE} alone")
        if request.compiled is None:
            check_data_files(folder, [FILE], manifest)
        path = safe_join(request.compiled or folder, FILE)
        with open_regular(path) as opened:
            try:
                file = _C.run.PackedFile(opened.fileno())
            except RuntimeError as error:
                raise FormatError(f"{path}: {error}; compile again") from error
        return cls(request, manifest, path, file)

    def _begin(self, role: str, batch: int, arrays: Mapping[str, Array]) -> dict[str, Any]:
        return {"cache": self._programs[role].start(batch)}

    def _call(
        self, role: str, inputs: Mapping[str, Array], tensors: dict[str, Any]
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        spec, cache = self.roles[role], tensors["cache"]
        arrays, sizes = self._arrays(role, inputs, cache)
        try:
            outputs = {
                item.name: np.empty([d if isinstance(d, int) else sizes[d] for d in item.shape], item.dtype)
                for item in spec.outputs
            }
        except (MemoryError, ValueError) as error:
            raise PortlmError(f"packed: no memory for the outputs of {role}: {error}") from error
        addresses = [[_address(a) for a in group] for group in (arrays, outputs.values())]
        with self._lock, self._threads.step():
            _run(self._programs[role].run, cache, sizes["sequence"], sizes["kept"], *addresses)
        return outputs, tensors

    def _arrays(
        self, role: str, inputs: Mapping[str, Array], cache: Any
    ) -> tuple[list[Array], dict[str, int]]:
        """The inputs of a call in the order of its role, and what the symbols stand for."""
        arrays = [np.ascontiguousarray(inputs[item.name]) for item in self.roles[role].inputs]
        sizes = {"batch": cache.rows, "sequence": 1, "past": cache.past, "kept": 1}
        return arrays, sizes | {symbol: arrays[i].shape[axis] for symbol, i, axis in self._sizes[role]}

    def can_score(self, role: str) -> bool:
        """Say whether the role ends with a head; see portlm.engine.Scores."""
        self._spec(role)
        return bool(self._programs[role].can_score)

    def score(
        self, role: str, inputs: Mapping[str, Array], state: State, targets: Ids
    ) -> tuple[Array, Ids, State]:
        """Call a role for what its logits say of one token each; see portlm.engine.Scores.

        The logits are made and read a part of the vocabulary at a time, and never in memory together.
        """
        if not self.can_score(role):
            raise UsageError(f"packed: {role} does not end with logits: run it")
        wanted = self._sizes_of(role, inputs, state)
        spec = self.roles[role].outputs[0]
        shape = tuple(dim if isinstance(dim, int) else wanted[dim] for dim in spec.shape[:-1])
        if not isinstance(targets, np.ndarray) or targets.dtype != np.int64 or targets.shape != shape:
            raise UsageError(
                f"targets must be int64 {shape}, one for each row of logits, got {shown(targets)}"
            )
        check_targets(targets, int(spec.shape[-1]))
        targets, parts = np.ascontiguousarray(targets), np.empty((targets.size, 4), np.float64)
        cache = state.take()["cache"]
        arrays, sizes = self._arrays(role, inputs, cache)
        addresses = [_address(array) for array in arrays], _address(targets), _address(parts)
        with self._lock, self._threads.step():
            _run(self._programs[role].score, cache, sizes["sequence"], sizes["kept"], *addresses)
        logprobs, best = from_parts(parts)
        return logprobs.reshape(shape), best.reshape(shape), self._next(role, state, wanted, {"cache": cache})

    def advance(self, state: State, asked: Advance) -> tuple[Ids, State] | None:
        """Draw several tokens for each row; see portlm.engine.Advances."""
        role = self._check(state)
        self._spec(role)
        program, rows = self._programs[role], state.rows
        count = min(asked.count, self.context_length - state.past)
        if not program.can_advance or count < 1:
            return None
        for choice in dict.fromkeys(choice[:4] for choice in asked.choices):
            check_filters(self.vocab_size, *choice)
        lengths, tokens = (np.array(array, np.int64) for array in (asked.lengths, asked.tokens))
        drawn = np.empty((count, rows), np.int64)
        cache = state.take()["cache"]
        addresses = [_address(array) for array in (lengths, tokens)]
        limits = asked.vocabulary, sorted(asked.ends), count, asked.seconds
        with self._lock, self._threads.step():
            made, bad = _run(program.advance, cache, *addresses, asked.choices, *limits, _address(drawn))
            if made == 0 and bad >= 0:
                where = f"packed:cpu: new token {asked.choices[bad].step}"
                raise PortlmError(f"{where}: {bad_row(self._logits(program, rows), bad)}")
        return drawn[:made], self._state(role, rows, cache.past, {"cache": cache})

    def _logits(self, program: Any, rows: int) -> Array:
        """The logits (B, V) that the last token was to be chosen from."""
        data = (ctypes.c_float * (rows * self.vocab_size)).from_address(program.logits())
        return np.array(data, np.float32).reshape(rows, self.vocab_size)

    def _reordered(
        self, role: str, tensors: dict[str, Any], past: int, rows: Sequence[int] | None, skip: int
    ) -> dict[str, Any]:
        cache = tensors["cache"]
        _run(cache.reorder, range(cache.rows) if rows is None else rows, skip)
        return tensors

    def _cropped(
        self, role: str, tensors: dict[str, Any], past: int, lengths: Sequence[int]
    ) -> dict[str, Any]:
        tensors["cache"].crop(lengths)
        return tensors

    def _joined(self, role: str, parts: Sequence[dict[str, Any]], rows: int) -> dict[str, Any]:
        first, *others = (part["cache"] for part in parts)
        _run(first.join, others)
        return {"cache": first}

    def _copied(self, role: str, tensors: dict[str, Any]) -> dict[str, Any]:
        cache = tensors["cache"]
        twin = self._programs[role].start(cache.rows)
        _run(cache.copy_to, twin)
        return {"cache": twin}

    def placement(self) -> Placement:
        """Everything runs on the CPU."""
        return Placement({"cpu": sum(program.steps for program in self._programs.values())})

    def enter_child(self) -> None:
        """Prepare to go on in a forked child, where nobody would give back a lock that another thread held."""
        super().enter_child()
        self._lock = threading.Lock()

    def close(self) -> None:
        """Let go of the file; closing twice is harmless."""
        super().close()
        self._programs = {}


def holds_packed(folder: Path, manifest: Manifest) -> bool:
    """Say whether an artifact has a packed file for all its roles that is of the version read here."""
    if not manifest.roles or {entry.role for entry in _entries(manifest)} != manifest.roles.keys():
        return False
    try:
        with open_regular(safe_join(folder, FILE)) as file:
            head = file.read(16)
    except (OSError, PortlmError):
        return False
    return len(head) == 16 and struct.unpack("<I", head[12:])[0] == VERSION


def _entries(manifest: Manifest) -> list[CompiledEntry]:
    wanted = ("packed", "cpu", PROFILE)
    return [entry for entry in manifest.compiled if (entry.engine, entry.device, entry.profile) == wanted]


def _use_threads(count: int) -> int:
    from portlm import _C

    before: int = _C.set_threads(count)
    return before


def _run(function: Any, *arguments: Any) -> Any:
    """Call the runner, whose errors are of memory or of numbers that nobody else has compared."""
    try:
        return function(*arguments)
    except RuntimeError as error:
        raise PortlmError(f"packed: {error}") from error


def _address(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _sizes(shapes: Sequence[tuple[int | str, ...]]) -> list[tuple[str, int, int]]:
    """Which axis of which input is as large as a symbol: symbol, input and axis of each."""
    found = {}
    for i, shape in enumerate(shapes):
        for axis, dim in enumerate(shape):
            if dim in ("sequence", "kept"):
                found[str(dim)] = (i, axis)
    return [(symbol, *place) for symbol, place in found.items()]


def _checked(path: Path, file: Any, manifest: Manifest) -> list[Any]:
    """The roles of a file, if they are those of a manifest.

    Raises:
        FormatError: they are of another model.
    """
    model, roles = manifest.model, file.roles()
    problem = ""
    if (file.vocabulary, file.context) != (model.vocab_size, model.context_length):
        problem = f"it is for {file.vocabulary} tokens and a context of {file.context}"
    elif sorted(role[0] for role in roles) != sorted(manifest.roles):
        problem = "it has other roles"
    for name, inputs, outputs, states in roles if not problem else ():
        spec = manifest.roles[name]
        taken = [TensorSpec(item[0], item[2], item[3]) for item in (*inputs, *states)]
        returned = [TensorSpec(item[0], item[2], item[3]) for item in outputs]
        returned += [
            TensorSpec(item[1], item[2], tuple("past + sequence" if d == "past" else d for d in item[3]))
            for item in states
        ]
        problem = problem or difference(spec.inputs, spec.outputs, spec.state, taken, returned)
    if problem:
        raise FormatError(
            f"{path}: of another model, {problem}: run portlm compile {path.parent} --engine packed"
        )
    return list(roles)
