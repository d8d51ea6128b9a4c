"""Quantizing a model for a text: what the text puts into each matrix decides which integers the matrix gets.

The text is read as the model reads it, in windows of its context. Its last tenth is left out: what quantizing costs is
measured there (portlm.flows.quality), on text that no integer was chosen for.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from portlm.compile.gptq import Order, ordered, solve
from portlm.compile.quantize import Floats, Quantized, RoundToNearest, Scheme, dequantize, quantize
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
OPERATIONS = 1e13  # multiply-adds that reading the text again and again may take: minutes on a laptop's cores
MOMENTS = 2**28  # numbers of float32 that are summed in one reading, 1 GB


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
    if not hasattr(tokenizer, "encode_pieces"):
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


def windows(ids: Ids, context: int, most: int = MOST_TOKENS) -> list[Ids]:
    """Cut a text into windows of the context, spread evenly over it if there are more than `most` tokens.

    Returns:
        Batches (B, T) of windows. What is left at the end of the text is dropped, unless it is all there is.
    """
    if len(ids) < context:
        return [ids[None]]
    rows = ids[: len(ids) // context * context].reshape(-1, context)
    count = min(len(rows), max(1, most // context))
    rows = rows[np.arange(count) * len(rows) // count]
    step = max(1, TOKENS_PER_CALL // context)
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
        """Return what was chosen for a matrix; a table that is only looked up in is rounded to nearest.

        An id's row is then all of the input, so that no other rounding has a smaller error.
        """
        return self.numbers.get(name) or self._others(name, weight)


@dataclass(frozen=True)
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

    A matrix should be quantized for what it will get, and that comes from matrices which are quantized themselves. So
    the text is read once for each input of matrices, up to there, with everything before it quantized already. Where
    that takes too long (OPERATIONS), neighbouring inputs share a reading: what they are then quantized for is a little
    cleaner than what they will get.

    Memory is K x K float32 for each input of a reading, 1 GB at most (MOMENTS), a few times K x K float64 for one of
    them, and a copy of the matrices that later readings go through. A model of 254 million parameters in 20 layers of
    width 1024 keeps 290 MB of moments in each of three readings.

    Args:
        module: has its values, and is put back as it was.
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
    import torch

    from portlm.compile.moments import Reader, own_memory

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
    size = sum(module.get_parameter(name).numel() for site in reader.sites for name in site.names)
    parts = readings(reader.sites, tokens * size)
    with own_memory(module, {name for sites in parts[:-1] for site in sites for name in site.names}):
        for sites in parts:
            moments = reader.moments(batches, sites)
            for site in sites:
                quantizer = _Gptq(scheme, ordered(moments.pop(site).astype(np.float64), site.width))
                for name in site.names:
                    parameter = module.get_parameter(name).detach()
                    numbers[name] = quantize(name, parameter.cpu().numpy(), quantizer)
                    if sites is not parts[-1]:
                        parameter.copy_(torch.from_numpy(dequantize(numbers[name], scheme)))
    return Calibrated(scheme, numbers)


def readings(sites: "Sequence[Site]", operations: float) -> "list[Sequence[Site]]":
    """Cut the inputs into those that share a reading of the text: few by OPERATIONS, not too few by MOMENTS.

    Args:
        sites: in order.
        operations: multiply-adds of a reading to the end; the others together take half as many each.
    """
    count = int(min(len(sites), max(1, 2 * OPERATIONS / max(operations, 1) - 1)))
    while True:
        edges = [len(sites) * i // count for i in range(count + 1)]
        parts = [sites[begin:end] for begin, end in pairwise(edges)]
        if count == len(sites) or all(sum(s.width**2 for s in part) <= MOMENTS for part in parts):
            return parts
        count += 1


def _ids(tokenizer: Encoder, text: str) -> Ids:
    return np.fromiter((token for piece in tokenizer.encode_pieces(text) for token in piece), np.int64)
