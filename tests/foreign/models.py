"""Small models that nobody here shaped: the tutorial's, and transformers', with large random weights.

Weights are large, so that logits differ by several units and an attention that looks at the wrong token shows.
"""

import importlib.util
import sys
from pathlib import Path

import torch


def tutorial_gpt(**settings) -> torch.nn.Module:
    spec = importlib.util.spec_from_file_location("tutorial_gpt", Path(__file__).with_name("tutorial_gpt.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["tutorial_gpt"] = module  # dataclasses look a class's module up by name
    spec.loader.exec_module(module)
    return randomised(module.TutorialGPT(module.Settings(**settings)))


def transformers_gpt2(attention: str = "sdpa") -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=61, n_positions=40, n_embd=32, n_layer=2, n_head=4, use_cache=False,
        bos_token_id=0, eos_token_id=0, attn_implementation=attention,
    )  # fmt: skip
    return randomised(GPT2LMHeadModel(config))


def transformers_llama(attention: str = "sdpa") -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=61, max_position_embeddings=40, hidden_size=32, intermediate_size=52, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False, attn_implementation=attention,
    )  # fmt: skip
    return randomised(LlamaForCausalLM(config))


def randomised(model: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Fill matrices with N(0, 0.3²), gains with N(1, 0.1²) and biases with N(0, 0.1²), the same in every run."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(0.3 * noise if p.dim() > 1 else p.mean().round() + 0.1 * noise)
    return model.eval()
