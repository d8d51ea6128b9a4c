"""Phi-3 and Phi-4: LLaMA with fewer, larger matrices.

Abdin et al., "Phi-3 Technical Report", 2024 (arXiv:2404.14219), and "Phi-4 Technical Report" (arXiv:2412.08905).

- queries, keys and values come of one matrix: all rows of q, then those of k, then those of v
- gate and up of the perceptron come of one matrix, too
- rotary positions may cover a part of each head only (Phi-4-mini)

The frequencies of the long versions (rope_type "longrope") depend on how long the whole text is: a cache would hold
keys that were rotated for a shorter one. They are refused, and so are windows smaller than the context.

B batch, T time, C width, H query heads, K key/value heads, D head width, R the rotated part of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from portlm.models import config_json, config_rope
from portlm.models.grouped import Grouped, attend, turned
from portlm.models.grouped_config import GroupedConfig, head_width
from portlm.models.layers import KeyValue, Linear
from portlm.ops.swiglu import swiglu


@dataclass(frozen=True)
class Phi3Config(GroupedConfig):
    """The shape of a Phi-3 model. The defaults are transformers', which are Phi-3-mini without its window.

    Raises:
        ConfigError: A value out of range, heads that do not divide the width or each other, or an odd R.
    """

    family = "phi3"
    ARCHITECTURE = "Phi3ForCausalLM"
    SCALINGS = ()
    HARMLESS = ("original_max_position_embeddings",)  # only longrope reads it

    vocab_size: int = 32064
    context_length: int = 4096
    width: int = 3072
    hidden: int = 8192
    rms_norm_eps: float = 1e-5
    rotary_pct: float = 1.0  # R / D, rounded down to whole elements

    @property
    def rotary_dim(self) -> int:
        """R, how many elements of each head are rotated."""
        return int(self.head_dim * self.rotary_pct)

    @classmethod
    def own(cls, read: config_json.Reader, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the head width and the rotation."""
        read.require("attention_bias", False)
        read.require("mlp_bias", False)
        for key in ("resid_pdrop", "embd_pdrop"):
            read.training(key, 0.0)
        found = config_rope.rotary(read, values["context_length"], kinds=cls.SCALINGS)
        return {"head_width": head_width(read, values), "rope_theta": found.theta, "rotary_pct": found.share}

    def own_to_hf(self) -> dict[str, Any]:
        """Return the keys of config.json for what ``own`` reads."""
        share = self.rotary_pct
        return {
            "head_dim": self.head_dim,
            "partial_rotary_factor": share,
            **config_rope.to_hf(self.rope_theta, None, partial_rotary_factor=share),
            "original_max_position_embeddings": self.context_length,
        }


PRESETS = {
    "phi4": Phi3Config(
        vocab_size=100352,
        context_length=16384,
        n_layer=40,
        n_head=40,
        n_kv_head=10,
        width=5120,
        hidden=17920,
        rope_theta=250000.0,
    )
}
PARAMETERS = {"phi4": 14_659_507_200}  # of the published files


class Attention(nn.Module):
    """Masked self-attention whose queries, keys and values come of one matrix."""

    def __init__(self, config: Phi3Config):
        super().__init__()
        self.head_dim = config.head_dim
        self.heads = config.n_head, config.n_kv_head, config.n_kv_head
        equal = 3 if config.n_head == config.n_kv_head else 1
        self.qkv_proj = Linear(config.width, sum(self.heads) * config.head_dim, bias=False, maps=equal)
        self.o_proj = Linear(config.n_head * config.head_dim, config.width, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue | None]:
        """Attend from x (B, T, C), within x alone or, given a cache, to its P slots as well."""
        B, T, _ = x.shape
        qkv = self.qkv_proj(x).view(B, T, -1, self.head_dim)
        q, k, v = qkv.split(self.heads, dim=2)  # (B, T, H, D), and twice (B, T, K, D)
        return attend(self.o_proj, turned(q, cos, sin), turned(k, cos, sin), v, mask, past)


class MLP(nn.Module):
    """SwiGLU whose gate and up come of one matrix: down(silu(gate(x)) * up(x)), position by position."""

    def __init__(self, config: Phi3Config):
        super().__init__()
        self.gate_up_proj = Linear(config.width, 2 * config.hidden, bias=False, maps=2)
        self.down_proj = Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(swiglu(gate, up))


class Phi3(Grouped):
    """A Phi-3 language model."""

    def attention(self, config: Phi3Config, layer: int) -> nn.Module:
        """Return a layer's attention."""
        return Attention(config)

    def mlp(self, config: Phi3Config) -> nn.Module:
        """Return a layer's perceptron."""
        return MLP(config)
