"""Batches: which windows of the tokens a training step sees, and the windows that cover held-out text once.

B rows per batch, T tokens per row, N tokens in the data set.

The training batch of step s is a pure function of (seed, s): its randomness comes from Philox, a
counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), keyed by just
these two numbers. So a run resumes exactly from its step number alone, no generator of anybody else is
touched, and nobody else's is used.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from portlm.errors import ConfigError, UsageError

IGNORE = -100  # a target that takes no part in the loss


class Tokens(Protocol):
    """What batches are cut from: token shards, or a flat numpy array of ids."""

    def __len__(self) -> int: ...
    def __getitem__(self, position: slice, /) -> np.ndarray: ...


class BatchSampler:
    """Windows of T + 1 tokens at uniformly random positions, for training.

    `batch(step)` has no state. The sampler is also an iterator that counts its own steps, whose position can
    be saved and restored.

    Args:
        tokens: N token ids, N > T.
        batch_size: B.
        context_length: T.
        seed: 0 <= seed < 2^64.

    Raises:
        UsageError: fewer than T + 1 tokens, or a number out of range.
    """

    def __init__(self, tokens: Tokens, batch_size: int, context_length: int, seed: int = 0):
        _check_sizes(batch_size, context_length)
        if not 0 <= seed < 2**64:
            raise UsageError(f"the seed is {seed}: give an integer from 0 to 2^64 - 1")
        if len(tokens) <= context_length:
            raise UsageError(
                f"the data set has {len(tokens)} tokens and a context of {context_length} needs "
                f"{context_length + 1}: give more text or a shorter context"
            )
        self.tokens = tokens
        self.batch_size = batch_size
        self.context_length = context_length
        self.seed = seed
        self.step = 0

    def starts(self, step: int) -> np.ndarray:
        """Return where the windows of a step begin, (B,) int64, each from 0 to N - T - 1.

        Raises:
            UsageError: the step is negative or not below 2^64.
        """
        if not 0 <= step < 2**64:
            raise UsageError(f"step {step} has no batch: give an integer from 0 to 2^64 - 1")
        raw = np.random.Philox(key=np.array([self.seed, step], np.uint64)).random_raw(self.batch_size)
        # (raw * windows) >> 64 instead of Generator.integers, whose stream numpy may change between releases.
        # It favours no position by more than windows / 2^64.
        windows = len(self.tokens) - self.context_length
        return np.array([value * windows >> 64 for value in raw.tolist()], np.int64)

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the inputs and targets of one step, both (B, T) int64; targets are one token further.

        Raises:
            UsageError: the step is out of range.
        """
        T = self.context_length
        window = np.empty((self.batch_size, T + 1), np.int64)
        for row, start in zip(window, self.starts(step).tolist(), strict=True):
            row[:] = self.tokens[start : start + T + 1]
        return window[:, :-1].copy(), window[:, 1:].copy()

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return self

    def __next__(self) -> tuple[np.ndarray, np.ndarray]:
        pair = self.batch(self.step)
        self.step += 1
        return pair

    def state_dict(self) -> dict[str, int]:
        """Return all that decides the batches to come, as plain integers."""
        return {
            "step": self.step,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "context_length": self.context_length,
            "tokens": len(self.tokens),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where a saved sampler stood.

        Raises:
            ConfigError: the saved sampler would have drawn other batches than this one.
        """
        mine = self.state_dict()
        for key in mine:
            if key not in state or (key != "step" and state[key] != mine[key]):
                raise ConfigError(
                    f"the saved run had {key} {state.get(key)} and this one has {mine[key]}: "
                    "resume with the same data and batch settings"
                )
        self.step = state["step"]


def evaluation_batches(
    tokens: Tokens, batch_size: int, context_length: int, before: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut held-out tokens into windows so that each one is a target exactly once, in order.

    The windows do not overlap, so the first tokens of each are predicted from little context. The last window
    is padded: input 0 and target -100. The last batch may have fewer rows than the others.

    Args:
        tokens: N token ids.
        batch_size: B, the largest number of rows.
        context_length: T.
        before: the id to predict the first token from, such as the end-of-text token. Without it the first
            token has no context and is no target, and N - 1 tokens are predicted.

    Yields:
        Inputs and targets, both (at most B, T) int64.

    Raises:
        UsageError: a number out of range, or no token to predict.
    """
    _check_sizes(batch_size, context_length)
    N, T = len(tokens), context_length
    first = 1 if before is None else 0  # the first target
    if first >= N:
        raise UsageError(f"the data set has {N} tokens: there is nothing to predict")
    windows = -(-(N - first) // T)
    for begin in range(0, windows, batch_size):
        rows = min(batch_size, windows - begin)
        start = first + begin * T
        stop = min(start + rows * T, N)
        targets = np.full(rows * T, IGNORE, np.int64)
        targets[: stop - start] = tokens[start:stop]
        inputs = np.zeros(rows * T, np.int64)
        if start == 0 and before is not None:
            inputs[0] = before
            inputs[1:stop] = tokens[0 : stop - 1]
        else:
            inputs[: stop - start] = tokens[start - 1 : stop - 1]
        yield inputs.reshape(rows, T), targets.reshape(rows, T)


def _check_sizes(batch_size: int, context_length: int) -> None:
    """Refuse sizes that make no batch."""
    if batch_size < 1 or context_length < 1:
        raise UsageError(
            f"a batch needs at least one row and one token, got {batch_size} rows of {context_length} tokens"
        )
