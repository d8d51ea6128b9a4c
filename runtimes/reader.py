"""Texts through an encoder, and what it says of them through a head.

Rows of like length are read together, padded on their right, so little is computed of padding, and neither it nor the
neighbours change what a row says. A head whose inputs are called like outputs of the encoder reads those; one that
takes tokens reads these. An encoder whose graph has no loop takes one token per call (portlm.memory); what it says of a
token in each direction is put side by side: `backward_x` behind `x`, under the name x. A head of a decoder continues
texts as the decoder does (portlm.rows) and is asked at the last token of each, which alone has seen all others.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from portlm.engine import Array, CallSpec, Engine, Ids
from portlm.errors import PortlmError, UsageError
from portlm.memory import BACKWARD, ENCODER, read_singly, reads_singly
from portlm.roles import TensorSpec
from portlm.rows import KNOWN, LOGITS_PER_CALL, Rows

MADE_OF_TOKENS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
CHARACTERS = "character_ids"  # of words, (B, T, W), which are made of the text

Outputs = dict[str, Array]


class Row(NamedTuple):
    """The tokens of one text, or of two.

    Attributes:
        ids: at least one.
        types: as many, 0 for the first text and 1 for the second.
        characters: (T, W) int64, of a model that reads those of each token; None for any other.
    """

    ids: Sequence[int]
    types: Sequence[int]
    characters: Array | None = None


class Reader:
    """A role of an engine that reads whole texts, and the encoder before it if it needs one.

    Args:
        engine: what computes.
        role: "encoder" or a head.
        to_do: what it is wanted for, for the error.

    Raises:
        UsageError: the model has no such role, or it takes what is not made of tokens.
    """

    def __init__(self, engine: Engine, role: str, to_do: str):
        if role not in engine.roles:
            known = ", ".join(engine.roles) or "nothing"
            raise UsageError(
                f"this model cannot {to_do}: that takes a model with {role}, and this one has {known}"
            )
        self._engine, self._role = engine, role
        self.outputs = engine.roles[role].outputs
        self._causal = _continues_texts(engine.roles[role])
        if self._causal:
            self._steps, (logits,) = [role], self.outputs
            self.outputs = (TensorSpec(logits.name, logits.dtype, (logits.shape[0], logits.shape[2])),)
            return
        steps = [role] if _reads_tokens(engine.roles[role]) else [ENCODER, role]
        if len(steps) == 2 and not _follows(engine, role):
            raise UsageError(f"this model cannot {to_do}: its {role} takes what no encoder of it gives")
        self._steps = steps
        self.outputs = _joined_specs(engine.roles[role].outputs)

    def read(self, rows: Sequence[Row], batch_size: int) -> Iterator[tuple[int, Outputs]]:
        """Read texts, the longest first.

        Args:
            rows: of at most as many tokens as the context holds.
            batch_size: rows that are read together.

        Yields:
            The number of a row, and the role's outputs for it without padding.

        Raises:
            PortlmError: an output holds NaN or infinity.
        """
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
        for begin in range(0, len(order), batch_size):
            numbers = order[begin : begin + batch_size]
            if self._causal:
                yield from zip(numbers, self._continue([rows[i] for i in numbers]), strict=True)
                continue
            found = self._call([rows[i] for i in numbers])
            for place, i in enumerate(numbers):
                yield i, self._without_padding(found, place, len(rows[i].ids))

    def read_places(
        self, rows: Sequence[Row], places: Sequence[Sequence[int]], batch_size: int
    ) -> Iterator[tuple[int, Array]]:
        """Read texts, the longest first, and ask the head about some of the tokens alone.

        Args:
            rows: as of read.
            places: of the tokens in each row, at least one.
            batch_size: as of read.

        Yields:
            The number of a row, and the head's logits (places, N).

        Raises:
            PortlmError: an output holds NaN or infinity.
        """
        if len(self._steps) == 1:
            for i, outputs in self.read(rows, batch_size):
                yield i, outputs["logits"][list(places[i])]
            return
        name = self._engine.roles[self._role].inputs[0].name
        width = self.outputs[0].shape[-1]
        most = max(1, LOGITS_PER_CALL // (width if isinstance(width, int) else 1))
        for i, outputs in Reader(self._engine, ENCODER, "read").read(rows, batch_size):
            asked = outputs[name][list(places[i])][:, None]  # (places, 1, C)
            parts = [
                call(self._engine, self._role, {name: np.ascontiguousarray(asked[begin : begin + most])})[
                    "logits"
                ]
                for begin in range(0, len(asked), most)
            ]
            yield i, np.concatenate(parts)[:, 0]

    def _continue(self, rows: Sequence[Row]) -> Iterator[Outputs]:
        """What a role that continues texts says at the last token of each row."""
        logits = Rows(self._engine, len(rows), self._role).read_texts([row.ids for row in rows])
        check_finite(self._engine, self._role, {"logits": logits})
        return ({"logits": row} for row in logits)

    def _call(self, rows: Sequence[Row]) -> Outputs:
        known = tensors_of(rows)
        for role in self._steps:
            known |= _joined(call(self._engine, role, known))
        return {item.name: known[item.name] for item in self.outputs}

    def _without_padding(self, found: Outputs, place: int, length: int) -> Outputs:
        taken = [item for role in self._steps for item in self._engine.roles[role].inputs]
        given = {item.name for item in self._engine.roles[self._steps[0]].outputs if len(item.shape) > 2}
        tokens = {
            item.shape[1]
            for item in taken
            if item.name in {"input_ids", CHARACTERS, *given} and len(item.shape) > 1
        }
        return {
            item.name: found[item.name][place, :length]
            if {*item.shape[1:2]} & tokens
            else found[item.name][place]
            for item in self.outputs
        }


def call(engine: Engine, role: str, known: Outputs) -> Outputs:
    """Call a role on those of the tensors that it takes; one with a state goes through them token by token.

    Raises:
        PortlmError: an output holds NaN or infinity.
    """
    wanted = {item.name: known[item.name] for item in engine.roles[role].inputs}
    if engine.roles[role].state:
        found = read_singly(engine, role, wanted)
    else:
        rows = len(next(iter(wanted.values())))
        found, _ = engine.run(role, wanted, engine.start(role, rows))
    check_finite(engine, role, found)
    return found


def check_finite(engine: Engine, role: str, found: Outputs) -> None:
    """Raise PortlmError if an output of a role holds NaN or infinity."""
    for name, value in found.items():
        if not np.isfinite(value).all():
            raise PortlmError(
                f"{engine.name}:{engine.device}: the {name} of {role} are not numbers: check the weights for NaN or "
                "infinity"
            )


def tensors_of(rows: Sequence[Row]) -> dict[str, Ids]:
    """Return what a role may take for some rows, (B, T of the longest) each, padded on the right; and all backwards."""
    B, T = len(rows), max(len(row.ids) for row in rows)
    ids, types, mask = (np.zeros((B, T), np.int64) for _ in range(3))
    for b, row in enumerate(rows):
        ids[b, : len(row.ids)] = row.ids
        types[b, : len(row.types)] = row.types
        mask[b, : len(row.ids)] = 1
    positions = np.tile(np.arange(T), (B, 1))
    known = dict(zip(MADE_OF_TOKENS, (ids, mask, types, positions), strict=True))
    spelled = [row.characters for row in rows if row.characters is not None]
    if len(spelled) == B:
        known[CHARACTERS] = np.zeros((B, T, spelled[0].shape[1]), np.int64)
        for b, characters in enumerate(spelled):
            known[CHARACTERS][b, : len(characters)] = characters
    return known | {BACKWARD + name: np.ascontiguousarray(value[:, ::-1]) for name, value in known.items()}


def characters_of(engine: Engine) -> int:
    """Return how many characters of a word the model's encoder reads, 0 for one that reads tokens."""
    spec = engine.roles.get(ENCODER)
    found = next((item for item in spec.inputs if item.name == CHARACTERS), None) if spec else None
    length = 0 if found is None else found.shape[-1]
    return length if isinstance(length, int) else 0


def _reads_tokens(spec: CallSpec) -> bool:
    """Whether a role takes what is made of tokens alone: all of them, or one per call from an empty state on."""
    names = {item.name.removeprefix(BACKWARD) for item in spec.inputs}
    singly = reads_singly(spec) and all(item.initial == "zeros" for item in spec.state)
    return names <= {*MADE_OF_TOKENS, CHARACTERS} and (singly or not spec.state)


def _continues_texts(spec: CallSpec) -> bool:
    """Whether a role takes tokens and a state that they grow, and gives logits for each."""
    return (
        bool(spec.state)
        and all(state.initial != "given" for state in spec.state)
        and {item.name for item in spec.inputs} <= {*KNOWN}
        and [(item.name, len(item.shape)) for item in spec.outputs] == [("logits", 3)]
    )


def _follows(engine: Engine, role: str) -> bool:
    """Whether the encoder reads tokens, and gives all that the role takes."""
    encoder, spec = engine.roles.get(ENCODER), engine.roles[role]
    reads = encoder is not None and _reads_tokens(encoder)
    given = {item.name for item in _joined_specs(encoder.outputs)} if encoder and reads else set()
    return not spec.state and {item.name for item in spec.inputs} <= given


def _joined(found: Outputs) -> Outputs:
    """Put what was read backwards behind what has its name without the prefix."""
    return {
        name: np.concatenate((value, found[BACKWARD + name]), axis=-1) if BACKWARD + name in found else value
        for name, value in found.items()
        if name.removeprefix(BACKWARD) == name or name.removeprefix(BACKWARD) not in found
    }


def _joined_specs(outputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The same of their descriptions."""
    widths = {item.name: item.shape[-1] for item in outputs}
    joined = []
    for item in outputs:
        other, width = widths.get(BACKWARD + item.name), item.shape[-1]
        if item.name.startswith(BACKWARD) and item.name.removeprefix(BACKWARD) in widths:
            continue
        if isinstance(other, int) and isinstance(width, int):
            item = TensorSpec(item.name, item.dtype, (*item.shape[:-1], width + other))
        joined.append(item)
    return tuple(joined)
