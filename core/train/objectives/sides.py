"""What a decoder is to say of a source, as tensors: the rows that all objectives over two sides give a model.

B rows, S source tokens, T target tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from portlm.data.batches import IGNORE
from portlm.data.pairs import padded


class Part(NamedTuple):
    """Some rows of a step's batch.

    Attributes:
        source: (B, S) int64.
        mask: (B, S) int64, 0 on padding.
        read: (B, T) int64, what the decoder reads.
        targets: (B, T) int64, what it is to say at each of these, -100 where nothing counts.
        share: Of the batch's targets that are in these rows.
    """

    source: Tensor
    mask: Tensor
    read: Tensor
    targets: Tensor
    share: float


def part(
    sources: Sequence[Sequence[int]],
    read: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    *,
    pad: int,
    total: int,
    device: torch.device,
) -> Part:
    """Return rows as tensors.

    Args:
        sources: Of each row.
        read: Of each row.
        targets: Of each row, as many as it reads.
        pad: The id behind the end of a short row.
        total: How many targets of the batch count.
        device: Where the tensors are.
    """
    source, wanted = padded(sources, pad), padded(targets, IGNORE)
    mask = (np.arange(source.shape[1]) < np.array([len(row) for row in sources])[:, None]).astype(np.int64)
    arrays = source, mask, padded(read, pad), wanted
    text, there, begun, said = (torch.from_numpy(array).to(device) for array in arrays)
    return Part(text, there, begun, said, int((wanted != IGNORE).sum()) / total)
