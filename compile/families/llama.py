"""LLaMA as a graph: GPT-2 with RMSNorm, rotary positions, SwiGLU, grouped key/value heads and no biases.

B batch, T time, P past, C width, H query heads, K key/value heads, D head width, F hidden width, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from portlm.compile.families import CacheShape
from portlm.compile.forms import Forms
from portlm.errors import ConfigError
from portlm.files import shown
from portlm.models.config_json import MAX_HIDDEN, MAX_WIDTH, Reader, check_bounds

COS, SIN = "model.rotary.cos", "model.rotary.sin"

# Keys that concern training or how a sharded run rounded, never these logits.
HARMLESS = ("attention_dropout", "initializer_range", "bos_token_id", "eos_token_id", "pretraining_tp")


@dataclass(frozen=True)
class LlamaDecoder:
    """One LLaMA, by its sizes."""

    cache: CacheShape
    width: int
    hidden: int
    rope_theta: float
    rms_norm_eps: float
    tied: bool

    family: ClassVar[str] = "llama"

    def __post_init__(self) -> None:
        bounds = {
            "width": (1, MAX_WIDTH),
            "hidden": (1, MAX_HIDDEN),
            "rope_theta": (1.0, 1e12),
            "rms_norm_eps": (1e-12, 0.1),
        }
        check_bounds(self, bounds)
        if self.cache.head_dim % 2:
            raise ConfigError(f"rotary positions need an even head width, got {self.cache.head_dim}")

    @classmethod
    def from_config(cls, read: Reader) -> Self:
        """Read a Hugging Face config.json.

        Raises:
            ConfigError: a key is missing, unknown, out of range or asks for another model.
        """
        read.require("model_type", "llama")
        width, n_head = read.integer("hidden_size"), read.integer("num_attention_heads")
        if n_head < 1 or width % n_head:
            raise ConfigError(f"num_attention_heads {n_head} does not divide hidden_size {width}")
        read.require("head_dim", width // n_head)
        read.require("hidden_act", "silu", "swish")
        read.require("attention_bias", False)
        read.require("mlp_bias", False)
        read.require("partial_rotary_factor", 1, 1.0)
        read.require("is_encoder_decoder", False)
        read.require("pruned_heads", {})
        vocab_size, context = read.integer("vocab_size"), read.integer("max_position_embeddings")
        n_layer, n_kv_head = read.integer("num_hidden_layers"), read.integer("num_key_value_heads", n_head)
        if n_kv_head < 1:
            raise ConfigError(f"num_key_value_heads must be at least 1, got {n_kv_head}")
        decoder = cls(
            cache=CacheShape(vocab_size, context, n_layer, n_head, n_kv_head, width // n_head),
            width=width,
            hidden=read.integer("intermediate_size"),
            rope_theta=_rope_theta(read),
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            tied=read.boolean("tie_word_embeddings", False),
        )
        read.finish(*HARMLESS)
        return decoder

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face's names; linear weights are (out, in)."""
        C, F, V, D = self.width, self.hidden, self.cache.vocab_size, self.cache.head_dim
        Q, KV = self.cache.n_head * D, self.cache.n_kv_head * D
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, C)}
        for layer in range(self.cache.n_layer):
            for name, shape in (
                ("input_layernorm", (C,)),
                ("self_attn.q_proj", (Q, C)),
                ("self_attn.k_proj", (KV, C)),
                ("self_attn.v_proj", (KV, C)),
                ("self_attn.o_proj", (C, Q)),
                ("post_attention_layernorm", (C,)),
                ("mlp.gate_proj", (F, C)),
                ("mlp.up_proj", (F, C)),
                ("mlp.down_proj", (C, F)),
            ):
                shapes[f"model.layers.{layer}.{name}.weight"] = shape
        shapes["model.norm.weight"] = (C,)
        if not self.tied:
            shapes["lm_head.weight"] = (V, C)
        return shapes

    def weights(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Turn the linear weights to (in, out), and add the rotation angles of every position."""
        table = "model.embed_tokens.weight"
        weights = {name: t.T if t.ndim == 2 and name != table else t for name, t in tensors.items()}
        weights[COS], weights[SIN] = rotary_tables(
            self.cache.context_length, self.cache.head_dim, self.rope_theta
        )
        return weights

    def emit(self, forms: Forms) -> None:
        """The decoder; `h` is the residual stream, `x` what the next sublayer reads."""
        H, K, D, L = self.cache.n_head, self.cache.n_kv_head, self.cache.head_dim, self.cache.n_layer
        eps = self.rms_norm_eps
        mask = forms.mask("attention_mask", "position_ids", self.cache.context_length, group=H // K)
        rotation = forms.rotation("position_ids", COS, SIN)
        h = forms.embedding("input_ids", "model.embed_tokens")  # (B, T, C)
        x = forms.rms_norm(h, "model.layers.0.input_layernorm", eps)

        for layer in range(L):
            block = f"model.layers.{layer}"
            q, k, v = (f"{block}.self_attn.{part}_proj" for part in "qkv")
            q = forms.heads(forms.linear(x, q), H, D, q)
            k = forms.heads(forms.linear(x, k), K, D, k)
            v = forms.heads(forms.linear(x, v), K, D, v)
            q = forms.rotary(q, rotation, H, f"{block}.self_attn.q")
            k = forms.rotary(k, rotation, K, f"{block}.self_attn.k")
            x = forms.attention(q, k, v, mask, layer, H, K, D, f"{block}.self_attn")
            x = forms.linear(x, f"{block}.self_attn.o_proj")
            x, h = forms.add_rms_norm(x, h, f"{block}.post_attention_layernorm", eps)

            gate, up = forms.linear(x, f"{block}.mlp.gate_proj"), forms.linear(x, f"{block}.mlp.up_proj")
            x = forms.linear(forms.swiglu(gate, up, f"{block}.mlp"), f"{block}.mlp.down_proj")
            norm = "model.norm" if layer + 1 == L else f"model.layers.{layer + 1}.input_layernorm"
            x, h = forms.add_rms_norm(x, h, norm, eps)

        if self.tied:
            forms.tied_head(x, "model.embed_tokens")
        else:
            forms.head(x, "lm_head")


def _rope_theta(read: Reader) -> float:
    """The base of the rotation, from any of the three places where transformers has kept it."""
    theta = read.number("rope_theta", 10000.0)
    for key in ("rope_scaling", "rope_parameters"):
        inner = read.raw(key)
        if inner is None:
            continue
        if not isinstance(inner, dict) or inner.get("rope_type", inner.get("type")) != "default":
            raise ConfigError(
                f"{key} = {shown(inner)} is not supported: only unscaled rotary positions are computed"
            )
        nested = Reader(inner)
        nested.require("partial_rotary_factor", 1, 1.0)
        theta = nested.number("rope_theta", theta)
        nested.finish("rope_type", "type")
    return theta


def rotary_tables(context: int, head_dim: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """Return cos and sin (context, D/2) float32 of position * theta^(-2i/D).

    The angle is rounded to float32 where the PyTorch model rounds it, since at position 2000 one rounding more or
    less is 1e-4 in the angle.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.int64).astype(np.float32) / np.float32(head_dim)
    frequencies = (
        np.float32(1.0) / np.power(np.float64(np.float32(theta)), exponents).astype(np.float32)
    ).astype(np.float32)
    angles = np.arange(context, dtype=np.float32)[:, None] * frequencies[None, :]
    return np.cos(angles), np.sin(angles)
