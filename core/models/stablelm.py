"""StableLM: LLaMA with LayerNorm and rotary positions on a part of each head.

Bellagamba et al., "StableLM 3B 4E1T", 2023, and "Stable LM 2 1.6B Technical Report", 2024 (arXiv:2402.17834).

- LayerNorm, with its biases, in place of RMSNorm
- rotary positions on the first quarter of each head, the rest of it without a position
- ``qkv_bias``: biases on queries, keys and values (the second generation)
- ``parallel_residual``: attention and perceptron read the same normalised input, and both are added to the stream

The norms on heads of StableLM 2 12B (qk_layernorm) are refused.

B batch, T time, C width, D head width, R the rotated part of it, P slots already in the cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor, nn

from portlm.errors import ConfigError
from portlm.models import config_json, config_rope
from portlm.models.grouped import Attention, Grouped
from portlm.models.grouped_config import GroupedConfig
from portlm.models.layers import KeyValue, LayerNorm


@dataclass(frozen=True)
class StableLMConfig(GroupedConfig):
    """The shape of a StableLM model. The defaults are transformers', which are StableLM 3B 4E1T.

    Raises:
        ConfigError: A value out of range, heads that do not divide the width or each other, a head width of its own, or
            an odd R.
    """

    family = "stablelm"
    ARCHITECTURE = "StableLmForCausalLM"
    NEEDS_KV_HEADS = True
    EPS = "layer_norm_eps"

    vocab_size: int = 50304
    context_length: int = 4096
    width: int = 2560
    hidden: int = 6912
    layer_norm_eps: float = 1e-5
    rotary_pct: float = 0.25  # R / D, rounded down to whole elements
    qkv_bias: bool = False
    parallel_residual: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_width:
            raise ConfigError(
                f"head_width {self.head_width} must be 0: heads divide the width in this family"
            )

    @property
    def rotary_dim(self) -> int:
        """R, how many elements of each head are rotated."""
        return int(self.head_dim * self.rotary_pct)

    @classmethod
    def tiny(cls) -> Self:
        """Return a configuration that tests compute in no time, with half of each head rotated."""
        return replace(super().tiny(), rotary_pct=0.5)

    @classmethod
    def own(cls, read: config_json.Reader, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the rotation, the biases and how sublayers stand."""
        read.require("qk_layernorm", False)
        read.training("hidden_dropout", 0.0)
        found = config_rope.rotary(read, values["context_length"], default_share=0.25, kinds=cls.SCALINGS)
        return {
            "rope_theta": found.theta,
            "rotary_pct": found.share,
            "rope_scaling": found.scaling,
            "qkv_bias": read.boolean("use_qkv_bias", False),
            "parallel_residual": read.boolean("use_parallel_residual", False),
        }

    def own_to_hf(self) -> dict[str, Any]:
        """Return the keys of config.json for what ``own`` reads."""
        share = self.rotary_pct
        return {
            "partial_rotary_factor": share,
            **config_rope.to_hf(self.rope_theta, self.rope_scaling, partial_rotary_factor=share),
            "use_qkv_bias": self.qkv_bias,
            "use_parallel_residual": self.parallel_residual,
            "qk_layernorm": False,
        }


PRESETS = {
    "stablelm-3b-4e1t": StableLMConfig(),
}
PARAMETERS = {  # of the published files
    "stablelm-3b-4e1t": 2_795_443_200,
}


class ParallelBlock(nn.Module):
    """One layer whose two sublayers read the same input. h is the residual stream, x what is to be added to it."""

    def __init__(self, norm: nn.Module, attention: nn.Module, mlp: nn.Module):
        super().__init__()
        self.input_layernorm, self.self_attn, self.mlp = norm, attention, mlp

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
        y, h = self.input_layernorm(x, h)
        x, present = self.self_attn(y, cos, sin, mask, past)
        return x + self.mlp(y), h, present


class StableLM(Grouped):
    """A StableLM language model."""

    def layer_norm(self, config: StableLMConfig) -> nn.Module:
        """Return a fresh norm of the stream."""
        return LayerNorm(config.width, config.layer_norm_eps)

    def attention(self, config: StableLMConfig, layer: int) -> nn.Module:
        """Return a layer's attention."""
        return Attention(config, bias=config.qkv_bias)

    def block(self, config: StableLMConfig, layer: int) -> nn.Module:
        """Return a layer."""
        if not config.parallel_residual:
            return super().block(config, layer)
        return ParallelBlock(self.layer_norm(config), self.attention(config, layer), self.mlp(config))
