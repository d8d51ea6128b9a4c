"""LLaMA as a graph: GPT-2 with RMSNorm, rotary positions, SwiGLU, grouped key/value heads and no biases.

B batch, T time, P past, C width, H query heads, K key/value heads, D head width, F hidden width, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from portlm.compile.families import MAX_LAYERS, MAX_VOCABULARY, CacheShape, choice, positive, refuse, whole
from portlm.compile.forms import FAR, Forms
from portlm.errors import FormatError

COS, SIN = "model.rotary.cos", "model.rotary.sin"


@dataclass(frozen=True)
class LlamaDecoder:
    """One LLaMA, by its sizes."""

    vocab_size: int
    context_length: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    width: int
    hidden: int
    rope_theta: float
    rms_norm_eps: float
    tied: bool

    family = "llama"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "LlamaDecoder":
        """Read the fields of a Hugging Face config.json; FormatError names the one that does not fit."""
        refuse(config, "hidden_act", "silu")
        refuse(config, "attention_bias", False)
        refuse(config, "mlp_bias", False)
        refuse(config, "rope_scaling", None)
        width, n_head = whole(config, "hidden_size"), whole(config, "num_attention_heads")
        n_kv_head = whole(config, "num_key_value_heads", default=n_head)
        if width % n_head and config.get("head_dim") is None:
            raise FormatError(f"config.json: num_attention_heads = {n_head} does not divide hidden_size = {width}")
        if n_head % n_kv_head:
            raise FormatError(f"config.json: num_key_value_heads = {n_kv_head} does not divide {n_head} heads")
        head_dim = whole(config, "head_dim", default=width // n_head)
        if head_dim % 2:
            raise FormatError(f"config.json: heads of width {head_dim} cannot be rotated in pairs")
        return cls(
            vocab_size=whole(config, "vocab_size", MAX_VOCABULARY),
            context_length=whole(config, "max_position_embeddings", int(FAR) - 1),
            n_layer=whole(config, "num_hidden_layers", MAX_LAYERS),
            n_head=n_head,
            n_kv_head=n_kv_head,
            head_dim=head_dim,
            width=width,
            hidden=whole(config, "intermediate_size"),
            rope_theta=_rope_theta(config),
            rms_norm_eps=positive(config, "rms_norm_eps", 1e-6),
            tied=choice(config, "tie_word_embeddings", {True: True, False: False}, False),
        )

    @property
    def cache(self) -> CacheShape:
        """A group of query heads shares one key/value head."""
        sizes = self.n_layer, self.n_head, self.n_kv_head, self.head_dim
        return CacheShape(self.vocab_size, self.context_length, *sizes)

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face's names; linear weights are (out, in)."""
        C, F, Q, KV = self.width, self.hidden, self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, C)}
        for layer in range(self.n_layer):
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
            shapes["lm_head.weight"] = (self.vocab_size, C)
        return shapes

    def weights(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Turn the linear weights to (in, out), and add the rotation angles of every position."""
        table = "model.embed_tokens.weight"
        weights = {name: t.T if t.ndim == 2 and name != table else t for name, t in tensors.items()}
        weights[COS], weights[SIN] = rotary_tables(self.context_length, self.head_dim, self.rope_theta)
        return weights

    def emit(self, forms: Forms) -> None:
        """The decoder; `h` is the residual stream, `x` what the next sublayer reads."""
        H, K, D, eps = self.n_head, self.n_kv_head, self.head_dim, self.rms_norm_eps
        mask = forms.mask("attention_mask", "position_ids", self.context_length, group=H // K)
        rotation = forms.rotation("position_ids", COS, SIN)
        h = forms.embedding("input_ids", "model.embed_tokens")  # (B, T, C)
        x = forms.rms_norm(h, "model.layers.0.input_layernorm", eps)

        for layer in range(self.n_layer):
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
            last = layer + 1 == self.n_layer
            norm = "model.norm" if last else f"model.layers.{layer + 1}.input_layernorm"
            x, h = forms.add_rms_norm(x, h, norm, eps)

        if self.tied:
            forms.tied_head(x, "model.embed_tokens")
        else:
            forms.head(x, "lm_head")


def _rope_theta(config: Mapping[str, Any]) -> float:
    """The base of the rotation: a field of its own, or inside rope_parameters, where transformers 5 writes it."""
    parameters = config.get("rope_parameters")
    if parameters is None:
        return positive(config, "rope_theta", 10000.0)
    if not isinstance(parameters, dict):
        raise FormatError(f"config.json: rope_parameters must be an object, got {parameters!r}")
    refuse(parameters, "rope_type", "default")
    return positive(parameters, "rope_theta", 10000.0)


def rotary_tables(context: int, head_dim: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin (context, D/2) float32 of position * theta^(-2i/D).

    The angle is rounded to float32 at the same places as in PyTorch models, since at position 2000 one rounding
    more is 1e-4 in the angle: the same function in another precision would be another model.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.int64).astype(np.float32) / np.float32(head_dim)
    frequencies = (np.float32(1.0) / np.power(np.float64(theta), exponents).astype(np.float32)).astype(np.float32)
    angles = np.arange(context, dtype=np.float32)[:, None] * frequencies[None, :]
    return np.cos(angles), np.sin(angles)
