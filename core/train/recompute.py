"""Activations computed a second time in backward instead of kept (Chen et al. 2016, arXiv:1604.06174).

Each block of a model keeps its input alone, (B, T, C), and runs again when its gradient is due: a third more work in
the blocks, for the memory of one block's activations. Random numbers are drawn again from the same state and kernels
give the same bits, so a run is the same with it and without.
"""

from typing import Any

from torch import is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["recompute_blocks"]


def recompute_blocks(model: nn.Module) -> None:
    """Make every block of a model, the elements of its ``nn.ModuleList``, run again in backward.

    It changes how these objects run while they train, and nothing that is saved.
    """
    for blocks in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for block in blocks:
            _recompute(block)


def _recompute(block: nn.Module) -> None:
    forward = block.forward

    def run(*inputs: Any) -> Any:
        if block.training and is_grad_enabled():
            return checkpoint(forward, *inputs, use_reentrant=False)
        return forward(*inputs)

    block.forward = run
