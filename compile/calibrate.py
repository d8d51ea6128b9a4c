"""Quantizing a model for a text: what the text puts into each matrix decides which integers the matrix gets.

The text is read as the model reads it, in windows of its context. Its last tenth is left out: what quantizing costs is
measured there (portlm.flows.quality), on text that no integer was chosen for.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from portlm.compile.gptq import Order, ordered, solve
from portlm.compile.quantize import Floats, Quantized, RoundToNearest, Scheme, quantize
from portlm.data.text import read_text, split_text
from portlm.errors import UsageError
from portlm.rows import TOKENS_PER_CALL

if TYPE_CHECKING:
    from torch import nn

    from portlm.compile.moments import Site
    from portlm.models.roles import Role

Ids = npt.NDArray[np.int64]

HELD_OUT = 0.1  # of the text's bytes
MOST_TOKENS = 2**15
MOMENTS = 2**28  # numbers of float32 that are summed in one reading, 1 GB
SHORT, SHORT_TOKENS = 256, 2**13  # of windows and of all, for gradients, which take the memory of training


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    @property
    def begin_ids(self) -> Sequence[int]:
        """What every text begins with."""

    def encode_pieces(self, text: str) -> Iterable[list[int]]:
        """Yield ids piece by piece."""


@dataclass(frozen=True)
class Text:
    """A text as token ids.

    Attributes:
        name: for messages.
        seen: to calibrate with.
        held_out: the rest, to judge by.
        before: the id in front of what is held out.
    """

    name: str
    seen: Ids
    held_out: Ids
    before: int


def read(path: str | Path, tokenizer: Encoder | None, vocab_size: int) -> Text:
    """Read a UTF-8 file and cut it in two.

    Args:
        path: the file.
        tokenizer: the model's own.
        vocab_size: ids of the model.

    Raises:
        FormatError: the file is missing, empty or not UTF-8.
        UsageError: there is no tokenizer, or one of another model, or the text is too short to be cut.
    """
    if tokenizer is None or not hasattr(tokenizer, "encode_pieces"):
        raise UsageError(f"{path} cannot be read for the model: it has no tokenizer of portlm's")
    seen, held_out = split_text(read_text(path), HELD_OUT)
    ids = np.concatenate([np.array(tokenizer.begin_ids, np.int64), _ids(tokenizer, seen)])
    rest = _ids(tokenizer, held_out)
    if not ids.size or not rest.size:
        raise UsageError(f"{path} is too short to calibrate with and to judge by: give a longer text")
    if (largest := int(max(ids.max(), rest.max()))) >= vocab_size:
        raise UsageError(
            f"{path} holds token {largest}, and the model {vocab_size}: give the model's own tokenizer"
        )
    return Text(str(path), ids, rest, int(ids[-1]))


def windows(ids: Ids, width: int, most: int = MOST_TOKENS, call: int = TOKENS_PER_CALL) -> list[Ids]:
    """Cut a text into windows, spread evenly over it if there are more than enough.

    Args:
        ids: the text.
        width: tokens of a window.
        most: tokens that are enough.
        call: tokens of a batch.

    Returns:
        Batches (B, T) of windows. What is left at the end of the text is dropped, unless it is all there is.
    """
    if len(ids) < width:
        return [ids[None]]
    rows = ids[: len(ids) // width * width].reshape(-1, width)
    count = min(len(rows), max(1, most // width))
    rows = rows[np.arange(count) * len(rows) // count]
    step = max(1, call // width)
    return [rows[begin : begin + step] for begin in range(0, count, step)]


class Calibrated:
    """The Quantizer that has chosen already, for a module and a text.

    Attributes:
        scheme: which numbers there are.
        method: for the manifest.
        numbers: of each matrix that the text went through, by the name of its parameter.
    """

    method = "GPTQ"

    def __init__(self, scheme: Scheme, numbers: Mapping[str, Quantized]):
        """Take over what was chosen."""
        self.scheme, self.numbers = scheme, dict(numbers)
        self._others = RoundToNearest(scheme)

    def __call__(self, name: str, weight: Floats) -> Quantized:
        """Return what was chosen for a matrix, or its nearest numbers if no token ids lead to it."""
        return self.numbers.get(name) or self._others(name, weight)


@dataclass
class _Gptq:
    """The Quantizer of the matrices that have one input in common."""

    scheme: Scheme
    order: Order
    method: str = Calibrated.method

    def __call__(self, name: str, weight: Floats) -> Quantized:
        return solve(weight, self.order, self.scheme)


def calibrated(
    module: "nn.Module", roles: "Mapping[str, Role]", text: Text, context_length: int, scheme: Scheme
) -> Calibrated:
    """Choose the numbers of every matrix of a module for a text.

    All matrices are quantized for what the float32 model gives them. To quantize each for what it gets from those
    before it, quantized already, takes a reading of the text for each, and is worth nothing with 4 bits: a divergence
    of 0.00047 nats became 0.00048 (docs/performance-log.md).

    Memory is K x K float32 for each input of matrices that is looked at in one reading of the text, MOMENTS numbers at
    most, and a few times K x K float64 for one of them: 0.8 GB in one reading for a model of 254 million parameters, 20
    layers of width 1024.

    Args:
        module: has its values, and is not changed.
        roles: its functions by name.
        text: what to read.
        context_length: tokens of a window.
        scheme: which numbers there are.

    Raises:
        UsageError: the text has fewer tokens than the widest matrix has inputs, the scheme's group does not divide
            those of a matrix, or no matrix is reached from tokens.
        FormatError: a weight is not finite, or too large.
        PortlmError: the text puts into a matrix what is not finite.
    """
    from portlm.compile.moments import Reader
    from portlm.compile.sensitivity import sensitivities

    reader = Reader(module, roles)
    if not reader.sites:
        raise UsageError(
            f"{type(module).__name__} has no matrix that token ids lead to: quantize it without a text"
        )
    batches = windows(text.seen, context_length)
    tokens, widest = sum(ids.size for ids in batches), max(site.width for site in reader.sites)
    if tokens < widest:
        raise UsageError(
            f"{text.name} leaves {tokens} tokens to calibrate with, and a matrix has {widest} inputs: give a text with "
            "at least as many tokens"
        )
    numbers: dict[str, Quantized] = {}

    def choose(names: Iterable[str], moments: Floats) -> None:
        quantizer = _Gptq(scheme, ordered(moments.astype(np.float64), len(moments)))
        for name in names:
            numbers[name] = quantize(name, module.get_parameter(name).detach().cpu().numpy(), quantizer)

    short = windows(text.seen, min(context_length, SHORT), most=SHORT_TOKENS, call=SHORT)
    tables = sensitivities(module, roles, short)
    for sites in readings(reader.sites):
        for site, moments in reader.moments(batches, sites).items():
            choose([name for name in site.names if name not in tables], moments)
            for name in tables.keys() & set(site.names):
                choose([name], moments + tables.pop(name))
    for name, moments in tables.items():  # that are no matrices
        choose([name], moments)
    return Calibrated(scheme, numbers)


def readings(sites: "Sequence[Site]") -> "list[list[Site]]":
    """Cut the inputs of matrices into those whose moments are kept at the same time."""
    parts: list[list[Site]] = []
    kept = 0
    for site in sites:
        if not parts or kept + site.width**2 > MOMENTS:
            parts.append([])
            kept = 0
        parts[-1].append(site)
        kept += site.width**2
    return parts


def _ids(tokenizer: Encoder, text: str) -> Ids:
    return np.fromiter((token for piece in tokenizer.encode_pieces(text) for token in piece), np.int64)
