"""LLaMA: GPT-2 with four changes.

Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023 (arXiv:2302.13971), and
"Llama 2" (arXiv:2307.09288), which brought grouped heads.

- RMSNorm (Zhang and Sennrich, 2019) before each sublayer, and no biases anywhere
- rotary positions (Su et al., 2021) on queries and keys instead of a learned table
- SwiGLU (Shazeer, 2020) instead of GELU, so three matrices in the MLP
- n_kv_head <= n_head: several query heads may share one key/value head (Ainslie et al., 2023)

and the output layer has its own matrix, unless ``tie_embeddings``.

Two orders exist for the rows of the query and key matrices. Meta's checkpoints rotate neighbouring pairs
(2i, 2i+1) of a head, Hugging Face's rotate (i, i + D/2). This file uses the latter, so weights in Meta's
order need their rows permuted first; the files Hugging Face hosts have had that done.

B batch, T time, C width, H query heads, K key/value heads, D head width, P slots already in the
cache, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from portlm.models import config_json
from portlm.models.grouped import Attention, GatedMLP, Grouped
from portlm.models.grouped_config import GroupedConfig
from portlm.models.rope import Llama3


@dataclass(frozen=True)
class LlamaConfig(GroupedConfig):
    """The shape of a LLaMA model. The defaults are LLaMA-7B.

    Meta did not publish its own choice of ``init_std``; Hugging Face uses this one.

    Raises:
        ConfigError: A value out of range, heads that do not divide the width or each other, or an odd D.
    """

    family = "llama"
    ARCHITECTURE = "LlamaForCausalLM"
    # pretraining_tp only reorders sums, to reproduce how a sharded training run rounded.
    HARMLESS = ("pretraining_tp", "max_sequence_length", "is_llama_config")

    rms_norm_eps: float = 1e-6
    attention_bias: bool = False  # of all four matrices of attention; no published LLaMA has one
    mlp_bias: bool = False

    @classmethod
    def own(cls, read: config_json.Reader, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the biases, and what all descendants have."""
        read.require("rope_interleaved", False)
        biases = {key: read.boolean(key, False) for key in ("attention_bias", "mlp_bias")}
        return super().own(read, values) | biases

    def own_to_hf(self) -> dict[str, Any]:
        """Return the keys of config.json for what ``own`` reads."""
        return super().own_to_hf() | {"attention_bias": self.attention_bias, "mlp_bias": self.mlp_bias}


def _llama2(n_layer: int, n_head: int, n_kv_head: int, width: int, hidden: int) -> LlamaConfig:
    return LlamaConfig(
        context_length=4096,
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=n_kv_head,
        width=width,
        hidden=hidden,
        rms_norm_eps=1e-5,
    )


def _llama3(
    n_layer: int, n_head: int, width: int, hidden: int, *, stretched: float = 1.0, tied: bool = False
) -> LlamaConfig:
    """Return a Llama 3, or one of those whose context was stretched from 8192 tokens to 131072 afterwards."""
    return LlamaConfig(
        vocab_size=128256,
        context_length=8192 if stretched == 1 else 131072,
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=8,
        width=width,
        hidden=hidden,
        rope_theta=500000.0,
        rope_scaling=None if stretched == 1 else Llama3(stretched, 1.0, 4.0, 8192),
        rms_norm_eps=1e-5,
        tie_embeddings=tied,
    )


PRESETS = {
    "llama-7b": LlamaConfig(),
    "llama-13b": LlamaConfig(n_layer=40, n_head=40, n_kv_head=40, width=5120, hidden=13824),
    "llama-33b": LlamaConfig(n_layer=60, n_head=52, n_kv_head=52, width=6656, hidden=17920),
    "llama-65b": LlamaConfig(n_layer=80, n_head=64, n_kv_head=64, width=8192, hidden=22016),
    "llama2-7b": _llama2(32, 32, 32, 4096, 11008),
    "llama2-13b": _llama2(40, 40, 40, 5120, 13824),
    "llama2-70b": _llama2(80, 64, 8, 8192, 28672),
    "llama3-8b": _llama3(32, 32, 4096, 14336),
    "llama3-70b": _llama3(80, 64, 8192, 28672),
    "llama3.1-8b": _llama3(32, 32, 4096, 14336, stretched=8.0),
    "llama3.1-70b": _llama3(80, 64, 8192, 28672, stretched=8.0),
    "llama3.1-405b": _llama3(126, 128, 16384, 53248, stretched=8.0),
    "llama3.2-1b": _llama3(16, 32, 2048, 8192, stretched=32.0, tied=True),
    "llama3.2-3b": _llama3(28, 24, 3072, 8192, stretched=32.0, tied=True),
}
PARAMETERS = {  # as published
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
}


class Llama(Grouped):
    """A LLaMA language model."""

    def attention(self, config: LlamaConfig, layer: int) -> nn.Module:
        """Return a layer's attention."""
        return Attention(config, bias=config.attention_bias, out_bias=config.attention_bias)

    def mlp(self, config: LlamaConfig) -> nn.Module:
        """Return a layer's perceptron."""
        return GatedMLP(config.width, config.hidden, bias=config.mlp_bias)
