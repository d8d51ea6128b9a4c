"""Training and measuring on arrays in memory, for experiments of seconds: no files, no checkpoints, no metrics.

The models, the optimiser and the schedule are those of ``portlm pretrain``; only its loop is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from portlm.models import Config, Model, build
from portlm.train.config import LayerSettings, OptimizerSettings
from portlm.train.evaluation import evaluating
from portlm.train.layers import Layers
from portlm.train.schedule import WarmupCosine
from portlm.train.setup import make_optimizer

Batch = tuple[Tensor, Tensor]  # inputs and targets, (B, T) int64 each, -100 where there is nothing to predict


def seeded(seed: int, stream: int = 0) -> np.random.Generator:
    """Seed PyTorch's global generator, and return a generator for data.

    Args:
        seed: Of the run.
        stream: Another one gives other data, such as those held out.
    """
    torch.manual_seed(seed)
    return np.random.default_rng((seed, stream))


def fresh(config: Config, seed: int) -> Model:
    """Return a model whose weights follow from the seed, whatever was drawn before."""
    torch.manual_seed(seed)
    return build(config)


def windows(generator: np.random.Generator, tokens: np.ndarray, rows: int, length: int) -> Iterator[Batch]:
    """Yield batches of random windows of a text without end.

    Args:
        generator: Draws where each begins.
        tokens: (N,) whole numbers, at least length + 1 of them.
        rows: B, windows of a batch.
        length: T, tokens of a window.
    """
    ids = torch.from_numpy(np.ascontiguousarray(tokens, dtype=np.int64))
    span = torch.arange(length + 1)
    while True:
        starts = torch.from_numpy(generator.integers(0, len(ids) - length, rows))
        picked = ids[starts[:, None] + span]
        yield picked[:, :-1], picked[:, 1:]


def rows_of(tokens: np.ndarray, length: int) -> Batch:
    """Cut a held-out text into rows that follow each other, (N // T, T) inputs and targets; the rest is left out."""
    count = (len(tokens) - 1) // length
    ids = torch.from_numpy(np.ascontiguousarray(tokens[: count * length + 1], dtype=np.int64))
    return ids[:-1].view(count, length), ids[1:].view(count, length)


def fit(
    model: Any,
    batches: Iterator[Any],
    steps: int,
    *,
    lr: float = 2e-3,
    warmup: int = 20,
    floor: float = 0.1,
    weight_decay: float = 0.01,
    clip: float = 1.0,
    loss: Callable[[Any], Tensor] | None = None,
    schedule: Callable[[int], float] | None = None,
    layers: LayerSettings | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> list[float]:
    """Train a model where it stands, with AdamW and a cosine.

    Args:
        model: A model of portlm, or any module if ``loss`` is given.
        batches: What each step learns from: (inputs, targets), or whatever ``loss`` takes.
        steps: How many.
        lr: The largest learning rate.
        warmup: Steps until it is reached.
        floor: The last learning rate, as a share of the largest.
        weight_decay: Of matrices.
        clip: The largest norm of all gradients together; 0 for no limit.
        loss: Maps a batch to what is made small; without it, the model's own mean cross-entropy.
        schedule: Learning rate of each step, counted from 0, in place of the cosine.
        layers: Which layers learn, and how fast against the topmost; without it, all do alike.
        tell: Takes a line ten times in all.

    Returns:
        The loss of each step.

    Raises:
        FloatingPointError: A loss is not finite.
    """
    objective = loss if loss is not None else lambda batch: model(*batch)
    learning = Layers(model, layers or LayerSettings())
    settings = OptimizerSettings(lr=lr, weight_decay=weight_decay, clip=clip)
    optimizer = make_optimizer(model, settings, learning.scale)
    schedule = schedule or WarmupCosine(lr, lr * floor, warmup, steps)
    model.train()
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step) * group["scale"]
        learning.set_learning(step)
        value = objective(next(batches))
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(value.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss of step {step + 1} is {losses[-1]}")
        if (step + 1) % max(steps // 10, 1) == 0:
            tell(f"step {step + 1}/{steps}, loss {losses[-1]:.4f}")
    model.eval()
    return losses


@torch.no_grad()
def bits_per_token(model: Model, inputs: Tensor, targets: Tensor, rows: int = 64) -> float:
    """Return the mean cross-entropy in bits over the targets (N, T) that are not -100, read ``rows`` at a time."""
    total, count = 0.0, 0
    with evaluating(model):
        for begin in range(0, len(inputs), rows):
            expected = targets[begin : begin + rows]
            asked = int((expected != -100).sum())
            if asked:
                total += model(inputs[begin : begin + rows], expected).item() * asked
                count += asked
    return total / count / math.log(2)


@torch.no_grad()
def accuracy(model: Model, inputs: Tensor, targets: Tensor, rows: int = 64) -> float:
    """Return the share of the targets (N, T) other than -100 that the largest logit names."""
    right, count = 0, 0
    with evaluating(model):
        for begin in range(0, len(inputs), rows):
            expected = targets[begin : begin + rows]
            asked = expected != -100
            best = model(inputs[begin : begin + rows]).argmax(-1)
            right += int((best == expected)[asked].sum())
            count += int(asked.sum())
    return right / count


def named(tell: Callable[[str], None], name: str) -> Callable[[str], None]:
    """Return what takes a line and tells it with a name before it."""
    return lambda text: tell(f"{name}: {text}")


def parameters(model: nn.Module | Model) -> int:
    """Return the number of parameters, a shared one counted once."""
    return sum(p.numel() for p in model.parameters())


def mean_curve(values: Sequence[float], points: int = 100) -> list[float]:
    """Return a curve as at most ``points`` means of neighbouring values, for a picture."""
    return [float(np.mean(part)) for part in np.array_split(np.asarray(values), min(points, len(values)))]
