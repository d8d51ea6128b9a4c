"""Qwen3, the dense sizes: LLaMA with a norm on every query and key.

Yang et al., "Qwen3 Technical Report", 2025 (arXiv:2505.09388).

- RMSNorm (Zhang and Sennrich, 2019) on each head of queries and keys, before they are rotated, all heads with one gain
- heads of 128 elements whatever the width is, so H D differs from C
- no biases, unless ``attention_bias``

B batch, T time, H query heads, K key/value heads, D head width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor, nn

from portlm.models import config_json
from portlm.models.grouped import Attention, Grouped
from portlm.models.grouped_config import GroupedConfig, head_width, rotation
from portlm.models.layers import RMSNorm


@dataclass(frozen=True)
class Qwen3Config(GroupedConfig):
    """The shape of a Qwen3 model. The defaults are transformers'.

    Raises:
        ConfigError: A value out of range, heads that do not divide the width or each other, or an odd D.
    """

    family = "qwen3"
    ARCHITECTURE = "Qwen3ForCausalLM"
    NEEDS_KV_HEADS = True

    vocab_size: int = 151936
    context_length: int = 32768
    hidden: int = 22016
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False  # of all four matrices of attention

    @classmethod
    def tiny(cls) -> Self:
        """Return a configuration that tests compute in no time, whose heads are wider than their share of the width."""
        return replace(super().tiny(), head_width=24)

    @classmethod
    def check_windows(cls, read: config_json.Reader, context_length: int) -> None:
        """Accept only models whose sliding window is switched off; its size may stand there."""
        read.require_full_attention(context_length, switched=True)

    @classmethod
    def own(cls, read: config_json.Reader, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the biases, and a head width that is 128 where config.json has none."""
        biases = {"attention_bias": read.boolean("attention_bias", False)}
        return {"head_width": head_width(read, values, 128), **rotation(cls, read, values), **biases}

    def own_to_hf(self) -> dict[str, Any]:
        """Return the keys of config.json for what ``own`` reads."""
        return super().own_to_hf() | {"attention_bias": self.attention_bias}


def _sized(n_layer: int, n_head: int, width: int, hidden: int, *, tied: bool = False) -> Qwen3Config:
    return Qwen3Config(
        context_length=40960,
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=8,
        width=width,
        hidden=hidden,
        head_width=128,
        rope_theta=1e6,
        tie_embeddings=tied,
    )


PRESETS = {
    "qwen3-0.6b": _sized(28, 16, 1024, 3072, tied=True),
    "qwen3-1.7b": _sized(28, 16, 2048, 6144, tied=True),
    "qwen3-4b": _sized(36, 32, 2560, 9728, tied=True),
    "qwen3-8b": _sized(36, 32, 4096, 12288),
    "qwen3-14b": _sized(40, 40, 5120, 17408),
    "qwen3-32b": _sized(64, 64, 5120, 25600),
}
PARAMETERS = {  # of the published files
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}


class NormedAttention(Attention):
    """Attention with a norm on each head of queries and keys."""

    def __init__(self, config: Any):
        super().__init__(config, bias=config.attention_bias, out_bias=config.attention_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return normalised queries (B, T, H, D) and keys (B, T, K, D), and values (B, T, K, D) of x (B, T, C)."""
        q, k, v = super().project(x)
        return self.q_norm(q, None)[0], self.k_norm(k, None)[0], v


class Qwen3(Grouped):
    """A Qwen3 language model."""

    def attention(self, config: Qwen3Config, layer: int) -> nn.Module:
        """Return a layer's attention."""
        return NormedAttention(config)
