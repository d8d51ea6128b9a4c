"""Weights that make the answers of a model of random weights far enough apart to be compared."""

import torch


def randomise(model, scale, seed):
    """Draw all weights anew: matrices with this standard deviation, and vectors near what they were."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(scale * noise if p.dim() > 1 else p + 0.1 * noise)
    return model
