"""What LLaMA and its descendants share: grouped heads, rotary positions, a gated perceptron, norms in front.

Each family is its differences from this, in a file of its own: a bias here, a norm there.

B batch, T time, C width, H query heads, K key/value heads, D head width, R the rotated part of it, F inner width of the
perceptron, P slots already in the cache.
"""

from typing import Any

import torch
from torch import Tensor, nn

from portlm.models.causal import Causal, Parts
from portlm.models.grouped_config import GroupedConfig
from portlm.models.layers import KeyValue, Linear, RMSNorm
from portlm.models.rope import tables
from portlm.models.within import attend_within
from portlm.ops.cached_attention import cached_attention
from portlm.ops.rotary import rotary
from portlm.ops.swiglu import swiglu


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R elements of every head of x (B, T, H, D) by cos and sin (T, R/2) or (B, T, R/2)."""
    R, D = 2 * cos.shape[-1], x.shape[-1]
    if R == D:
        return rotary(x, cos, sin)
    first, rest = x.split((R, D - R), dim=-1)
    return torch.cat((rotary(first, cos, sin), rest), dim=-1)


class Attention(nn.Module):
    """Masked self-attention with rotary positions and grouped heads.

    Args:
        config: The shape.
        bias: Whether queries, keys and values have one.
        out_bias: Whether the output has one.
        bounds: What portlm.ops.attention may be told beside queries, keys and values: scale, window, softcap.
    """

    def __init__(self, config: GroupedConfig, *, bias: bool = False, out_bias: bool = False, **bounds: Any):
        super().__init__()
        self.head_dim, self.bounds = config.head_dim, bounds
        self.q_proj = Linear(config.width, config.n_head * config.head_dim, bias=bias)
        self.k_proj = Linear(config.width, config.n_kv_head * config.head_dim, bias=bias)
        self.v_proj = Linear(config.width, config.n_kv_head * config.head_dim, bias=bias)
        self.o_proj = Linear(config.n_head * config.head_dim, config.width, bias=out_bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, T, H, D), keys and values (B, T, K, D) of x (B, T, C), not yet rotated."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        return q, k, v

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue | None]:
        """Attend from x (B, T, C), within x alone or, given a cache, to its P slots as well."""
        q, k, v = self.project(x)
        return attend(self.o_proj, turned(q, cos, sin), turned(k, cos, sin), v, mask, past, **self.bounds)


def attend(
    out: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    past: KeyValue | None,
    **bounds: Any,
) -> tuple[Tensor, KeyValue | None]:
    """Return the output (B, T, C) for queries (B, T, H, D), keys and values (B, T, K, D), and the next cache.

    Without a cache the mask is a bias on the scores, (B, 1, T, T), or None.
    """
    present = None
    if past is None:
        y = attend_within(q, k, v, mask, **bounds)
    else:
        y, key, value = cached_attention(q, k, v, *past, mask, **bounds)
        present = (key, value)
    return out(y.flatten(2)), present


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer, 2020): down(silu(gate(x)) * up(x)), position by position."""

    def __init__(self, width: int, hidden: int, *, bias: bool = False):
        super().__init__()
        self.gate_proj = Linear(width, hidden, bias=bias)
        self.up_proj = Linear(width, hidden, bias=bias)
        self.down_proj = Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """One layer. As in GPT-2, h is the residual stream and x what the next norm still has to add to it.

    Args:
        norms: The one in front of attention, and the one in front of the perceptron.
        attention: (x, cos, sin, mask, past) -> (y, present).
        mlp: x -> y.
    """

    def __init__(self, norms: tuple[nn.Module, nn.Module], attention: nn.Module, mlp: nn.Module):
        super().__init__()
        self.input_layernorm, self.self_attn = norms[0], attention
        self.post_attention_layernorm, self.mlp = norms[1], mlp

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
        y, h = self.post_attention_layernorm(x, h)
        return self.mlp(y), h, present


class Grouped(Causal):
    """A decoder of LLaMA's shape with randomly initialised weights; a family says what its layers are.

    Args:
        config: Its shape.
        init: False leaves the parameters uninitialised, for a caller that fills them all.
    """

    PARTS = Parts("embed_tokens", "layers", "norm", "lm_head", "model.")

    def __init__(self, config: Any, *, init: bool = True):
        super().__init__()
        blocks = [self.block(config, layer) for layer in range(config.n_layer)]
        self.assemble(config, blocks, self.layer_norm(config), *self.in_front(config))
        self.rotate_by(
            tables(config.context_length, config.rotary_dim, config.rope_theta, config.rope_scaling)
        )
        if init:
            self.init_weights()

    def in_front(self, config: Any) -> tuple[tuple[str, nn.Module], ...]:
        """Return names and modules of what there is in front of the blocks beside the token table."""
        return ()

    def layer_norm(self, config: Any) -> nn.Module:
        """Return a fresh norm of the stream."""
        return RMSNorm(config.width, config.rms_norm_eps)

    def attention(self, config: Any, layer: int) -> nn.Module:
        """Return a layer's attention."""
        return Attention(config)

    def mlp(self, config: Any) -> nn.Module:
        """Return a layer's perceptron."""
        return GatedMLP(config.width, config.hidden)

    def block(self, config: Any, layer: int) -> nn.Module:
        """Return a layer."""
        norms = self.layer_norm(config), self.layer_norm(config)
        return Block(norms, self.attention(config, layer), self.mlp(config))
