"""A module for a while in the mode in which it answers."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def answering(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode, and afterwards each of its parts back in the mode that it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
