"""Races of choosing and scoring tokens where the logits are, beside what a PyTorch user writes for the same."""

from __future__ import annotations

import numpy as np
import torch
from context import Context
from timing import Case, Limits, race, without_gradients
from torch import Tensor

from portlm.ops.cuda import has_cuda_kernel
from portlm.ops.token_scores import token_scores
from portlm.ops.token_selection import select_tokens


def tokens_race(context: Context) -> str:
    """Rows of LLaMA 3's vocabulary: one token of each of 1 and 64 sequences, and 1,024 tokens that are scored."""
    V = 97 if context.dry else 128_256
    limits = Limits(context.dry)
    for B in (1, 64):
        logits = 3 * torch.randn(B, V, device=context.device)
        _check(context, logits)
        for name, k, p, temperature in (("greedy", 0, 1.0, 0.0), ("top_k 50, top_p 0.9", 50, 0.9, 1.0)):
            race(context, _selection(context, logits, name, k, p, temperature), limits)
    R = 8 if context.dry else 1024
    logits, targets = 3 * torch.randn(R, V, device=context.device), np.arange(R) % V
    race(context, _scores(context, logits, targets), limits)
    return "agrees" if context.dry else f"copy at {limits.copy / 1e9:,.0f} GB/s in this run"


def _selection(context: Context, logits: Tensor, name: str, k: int, p: float, temperature: float) -> Case:
    def ours(x: Tensor) -> None:
        select_tokens(x.numpy() if context.dry else x, temperature, k, p)

    def eager(x: Tensor) -> None:
        if temperature == 0:
            x.argmax(-1).cpu()
            return
        values, ids = x.topk(k)
        weights = torch.softmax(values / temperature, -1)
        kept = torch.where(weights.cumsum(-1) - weights < p, weights, 0.0)
        ids.gather(-1, torch.multinomial(kept, 1)).cpu()

    # Different random numbers make different tokens, so there is nothing to compare: tests do that.
    contenders = {"portlm": without_gradients(ours, logits), "eager": without_gradients(eager, logits)}
    return Case(f"{name} {tuple(logits.shape)}", contenders, moved=logits.numel() * 4)


def _scores(context: Context, logits: Tensor, targets: np.ndarray) -> Case:
    there = torch.from_numpy(targets).to(logits.device)

    def ours(x: Tensor) -> Tensor:
        return torch.from_numpy(token_scores(x.numpy() if context.dry else x, targets)[0])

    def eager(x: Tensor) -> Tensor:
        return torch.log_softmax(x, -1).gather(-1, there[:, None])[:, 0].cpu()

    contenders = {"portlm": without_gradients(ours, logits), "eager": without_gradients(eager, logits)}
    return Case(f"scores {tuple(logits.shape)}", contenders, moved=logits.numel() * 4, tolerance=1e-5)


def _check(context: Context, logits: Tensor) -> None:
    if not context.dry and not has_cuda_kernel(logits):
        raise RuntimeError("portlm's CUDA kernels do not take these tensors, so nothing was timed")
