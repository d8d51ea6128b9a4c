"""Choosing tokens where the logits are: of a row of logits, one number travels to the host.

The tokens are those of ``portlm.ops.token_selection``, which defines them: weights are whole numbers, so that no order
of their sums and no device changes them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from portlm.errors import UsageError
from portlm.ops import cuda
from portlm.ops.token_selection import Ids, bad_row, check_logits, streams_of

__all__ = ["select_tokens_cuda"]


def select_tokens_cuda(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Sequence[int] = 0,
    step: int = 0,
    rows: Sequence[int] | None = None,
) -> Ids:
    """Choose one token for each row of logits (B, V) on a CUDA device, and wait for it.

    Arguments, result and errors are those of ``select_tokens``; the tokens are on the host.
    """
    if logits.dim() != 2 or logits.dtype != torch.float32:
        what = f"{logits.dtype} {tuple(logits.shape)}"
        raise UsageError(f"[token_selection] logits must be a float32 tensor (rows, vocabulary), got {what}")
    B, V = logits.shape
    check_logits((B, V), temperature, top_k, top_p, min_p)
    logits = logits.contiguous()
    numbers = np.stack(streams_of(B, seed, step, rows)).view(np.int64)
    seeds, streams = torch.from_numpy(numbers).to(logits.device)
    tokens = torch.empty(B, dtype=torch.int64, device=logits.device)
    work = torch.empty(B * (V + 34 * -(-V // 4096) + 54), dtype=torch.int64, device=logits.device)
    cuda.launch(
        "select_tokens", logits.device, logits.data_ptr(), B, V, temperature, top_k, top_p, min_p,
        seeds.data_ptr(), streams.data_ptr(), step, tokens.data_ptr(), work.data_ptr(),
    )  # fmt: skip
    found: Ids = tokens.cpu().numpy()
    for index in np.flatnonzero(found < 0)[:1]:
        raise bad_row(logits.cpu().numpy(), int(index))
    return found
