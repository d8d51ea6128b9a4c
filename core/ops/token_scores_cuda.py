"""How probable given tokens are, by logits that lie on a CUDA device: see ``portlm.ops.token_scores``."""

from __future__ import annotations

import torch
from torch import Tensor

from portlm.ops import cuda
from portlm.ops.token_scores import Ids, Scores, check_rows, from_parts, wrong

__all__ = ["token_scores_cuda"]


def token_scores_cuda(logits: Tensor, targets: Ids) -> Scores:
    """Score rows of logits (R, V) on a CUDA device, and wait for it.

    Arguments, result and errors are those of ``token_scores``; targets and scores are on the host.
    """
    if logits.dim() != 2 or logits.dtype != torch.float32:
        raise wrong("logits", "a tensor of float32 of 2 axes", logits)
    targets = check_rows(logits.shape, targets)
    R, V = logits.shape
    logits, there = logits.contiguous(), torch.from_numpy(targets).to(logits.device)
    parts = torch.empty((R, 4), dtype=torch.float64, device=logits.device)
    cuda.launch("score_logits", logits.device, logits.data_ptr(), R, V, 0, there.data_ptr(), parts.data_ptr())
    return from_parts(parts.cpu().numpy())
