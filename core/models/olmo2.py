"""OLMo 2: LLaMA with its norms behind the sublayers.

OLMo team, "2 OLMo 2 Furious", 2024 (arXiv:2501.00656).

- RMSNorm on what attention and perceptron give, before it is added to the stream, and none in front of them
- RMSNorm on all queries and on all keys of a token together, before they are cut into heads and rotated

B batch, T time, C width, H query heads, K key/value heads, D head width, P slots already in the cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from portlm.models import config_json
from portlm.models.grouped import Attention, Grouped
from portlm.models.grouped_config import GroupedConfig
from portlm.models.layers import KeyValue, RMSNorm


@dataclass(frozen=True)
class Olmo2Config(GroupedConfig):
    """The shape of an OLMo 2 model. The defaults are transformers'.

    Raises:
        ConfigError: A value out of range, heads that do not divide the width or each other, or an odd D.
    """

    family = "olmo2"
    ARCHITECTURE = "Olmo2ForCausalLM"

    vocab_size: int = 50304
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False  # of all four matrices of attention

    @classmethod
    def own(cls, read: config_json.Reader, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the biases, and what all descendants have."""
        return super().own(read, values) | {"attention_bias": read.boolean("attention_bias", False)}

    def own_to_hf(self) -> dict[str, Any]:
        """Return the keys of config.json for what ``own`` reads."""
        return super().own_to_hf() | {"attention_bias": self.attention_bias}


def _sized(n_layer: int, n_head: int, n_kv_head: int, width: int, hidden: int) -> Olmo2Config:
    return Olmo2Config(
        vocab_size=100352,
        context_length=4096,
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=n_kv_head,
        width=width,
        hidden=hidden,
        rope_theta=500000.0,
        rms_norm_eps=1e-6,
    )


PRESETS = {
    "olmo2-1b": _sized(16, 16, 16, 2048, 8192),
    "olmo2-7b": _sized(32, 32, 32, 4096, 11008),
    "olmo2-13b": _sized(40, 40, 40, 5120, 13824),
    "olmo2-32b": _sized(64, 40, 8, 5120, 27648),
}
PARAMETERS = {  # of the published files
    "olmo2-1b": 1_484_916_736,
    "olmo2-7b": 7_298_617_344,
    "olmo2-13b": 13_716_198_400,
    "olmo2-32b": 32_234_279_936,
}


class NormedAttention(Attention):
    """Attention with one norm on all queries of a token and one on all its keys."""

    def __init__(self, config: Olmo2Config):
        super().__init__(config, bias=config.attention_bias, out_bias=config.attention_bias)
        self.q_norm = RMSNorm(config.n_head * config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.n_kv_head * config.head_dim, config.rms_norm_eps)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return normalised queries (B, T, H, D) and keys (B, T, K, D), and values (B, T, K, D) of x (B, T, C)."""
        B, T, _ = x.shape
        q, _ = self.q_norm(self.q_proj(x), None)
        k, _ = self.k_norm(self.k_proj(x), None)
        q, k, v = (y.view(B, T, -1, self.head_dim) for y in (q, k, self.v_proj(x)))
        return q, k, v


class Block(nn.Module):
    """One layer. h is the residual stream and x what is still to be added to it, already normalised."""

    def __init__(self, attention: nn.Module, mlp: nn.Module, norms: tuple[nn.Module, nn.Module]):
        super().__init__()
        self.self_attn, self.mlp = attention, mlp
        self.post_attention_layernorm, self.post_feedforward_layernorm = norms

    def forward(
        self,
        x: Tensor,
        h: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        past: KeyValue | None = None,
    ) -> tuple[Tensor, Tensor, KeyValue | None]:
        """Map (x, h), both (B, T, C), to the same for the next layer. h is None before the first."""
        h = x if h is None else x + h
        y, present = self.self_attn(h, cos, sin, mask, past)
        y, _ = self.post_attention_layernorm(y, None)
        h = y + h
        x, _ = self.post_feedforward_layernorm(self.mlp(h), None)
        return x, h, present


class Olmo2(Grouped):
    """An OLMo 2 language model."""

    def block(self, config: Olmo2Config, layer: int) -> nn.Module:
        """Return a layer."""
        norms = self.layer_norm(config), self.layer_norm(config)
        return Block(NormedAttention(config), self.mlp(config), norms)
