"""Weights that make the answers of a model of random weights far enough apart to be compared."""

from dataclasses import replace

import torch

from portlm.models import DECODERS, build, save_model
from portlm.tokenizer import byte_tokenizer


def randomise(model, scale, seed):
    """Draw all weights anew: matrices with this standard deviation, and vectors near what they were."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(scale * noise if p.dim() > 1 else p + 0.1 * noise)
    return model


def save_random(folder, family, scale, **sizes):
    """Save a tiny decoder of such weights, for 256 bytes and an end of text, over a context of 48."""
    sizes |= {"vocab_size": 257, "context_length": 48, "eos_token_ids": (256,)}
    model = build(replace(DECODERS[family].config_class().tiny(), **sizes))
    save_model(folder, randomise(model, scale, seed=1), byte_tokenizer("<|endoftext|>"))
