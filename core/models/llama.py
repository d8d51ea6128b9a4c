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

B batch, T time, C width, H query heads, K key/value heads, D = C / H head width, P slots already in the
cache, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from portlm.errors import ConfigError
from portlm.models import config_json
from portlm.models.causal import Causal, Parts
from portlm.models.config_rope import rotary as rotary_keys
from portlm.models.layers import KeyValue, Linear, RMSNorm
from portlm.ops.attention import attention
from portlm.ops.cached_attention import cached_attention
from portlm.ops.rotary import rotary
from portlm.ops.swiglu import swiglu

_BOUNDS = {
    "vocab_size": (1, config_json.MAX_VOCAB),
    "context_length": (1, config_json.MAX_CONTEXT),
    "n_layer": (1, config_json.MAX_LAYERS),
    "n_head": (1, config_json.MAX_HEADS),
    "n_kv_head": (1, config_json.MAX_HEADS),
    "width": (1, config_json.MAX_WIDTH),
    "hidden": (1, config_json.MAX_HIDDEN),
    "rope_theta": (1.0, 1e12),
    "rms_norm_eps": (1e-12, 0.1),
    "init_std": (0.0, 1.0),
}


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a LLaMA model. The defaults are LLaMA-7B.

    Raises:
        ConfigError: A value out of range, heads that do not divide the width or each other, or an odd D.
    """

    family: ClassVar[str] = "llama"
    # What [model] of a training run may set, and what it is for a small model on a CPU.
    SETTINGS: ClassVar[dict[str, Any]] = {
        "n_layer": 4,
        "n_head": 4,
        "n_kv_head": 0,  # 0 means n_head, fewer means grouped-query attention
        "width": 128,
        "hidden": 0,  # width of the feed-forward layer; 0 means 8/3 of the width
        "context_length": 64,  # tokens the model sees at once
        "rope_theta": 10000.0,
        "tie_embeddings": True,
    }

    vocab_size: int = 32000
    context_length: int = 2048
    n_layer: int = 32
    n_head: int = 32
    n_kv_head: int = 32  # fewer than n_head for grouped heads
    width: int = 4096
    hidden: int = 11008  # inner width of the MLP
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False
    init_std: float = 0.02  # of every matrix; Meta did not publish its own choice, Hugging Face uses this one
    bos_token_id: int | None = None  # this and the next two are not computed with, only kept with the model
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        config_json.check_bounds(self, _BOUNDS)
        if self.width % self.n_head:
            raise ConfigError(f"width {self.width} must be a multiple of n_head {self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ConfigError(f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")
        if self.head_dim % 2:
            raise ConfigError(f"rotary positions need an even head width, got {self.width} / {self.n_head}")
        if not isinstance(self.tie_embeddings, bool):
            raise ConfigError(f"tie_embeddings must be true or false, got {self.tie_embeddings!r}")
        config_json.check_token_ids(self)

    @property
    def head_dim(self) -> int:
        """D, the width of one head."""
        return self.width // self.n_head

    @classmethod
    def from_settings(cls, **values: Any) -> Self:
        """Return the configuration for values of SETTINGS and of the vocabulary; 0 stands for what follows from others.

        Raises:
            ConfigError: A value out of range, by name.
        """
        # LLaMA's own rule: three matrices of 8/3 C hold as much as two of 4 C; a multiple of 32 suits kernels.
        derived = {"n_kv_head": values["n_head"], "hidden": -(-8 * values["width"] // 3 // 32) * 32}
        return cls(**values | {name: values[name] or value for name, value in derived.items()})

    @classmethod
    def tiny(cls) -> Self:
        """Return a configuration that tests compute in no time: a vocabulary of bytes, grouped heads, odd widths."""
        return cls(
            vocab_size=259,
            context_length=32,
            n_layer=2,
            n_head=4,
            n_kv_head=2,
            width=32,
            hidden=44,
            bos_token_id=1,
        )

    @classmethod
    def from_hf(cls, data: Mapping[str, Any] | config_json.Reader) -> Self:
        """Read the contents of a Hugging Face config.json, strictly.

        Raises:
            ConfigError: A key that is missing, unknown, out of range or asks for another model. It is named.
        """
        read = config_json.Reader.of(data)
        read.require("model_type", "llama")
        vocab_size, width = read.integer("vocab_size", 32000), read.integer("hidden_size", 4096)
        context = read.integer("max_position_embeddings", 2048)
        n_head = read.integer("num_attention_heads", 32)
        read.require("head_dim", width // max(n_head, 1), says="hidden_size / num_attention_heads")
        read.require("hidden_act", "silu", "swish")
        read.require("attention_bias", False)
        read.require("mlp_bias", False)
        read.require("rope_interleaved", False)
        read.require_full_attention(context)
        read.training("attention_dropout", 0.0)
        rope_theta, share = rotary_keys(
            read, base="rope_theta", share="partial_rotary_factor", default_share=1.0
        )
        read.require("partial_rotary_factor", 1, 1.0, says="1")
        if share != 1:
            raise ConfigError(
                f"partial_rotary_factor = {share:g} is not supported: only 1 gives the model portlm computes"
            )
        config = cls(
            vocab_size=vocab_size,
            context_length=context,
            n_layer=read.integer("num_hidden_layers", 32),
            n_head=n_head,
            n_kv_head=read.integer("num_key_value_heads", n_head, says="num_attention_heads"),
            width=width,
            hidden=read.integer("intermediate_size", 11008),
            rope_theta=rope_theta,
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            tie_embeddings=read.boolean("tie_word_embeddings", False),
            init_std=read.number("initializer_range", 0.02),
            bos_token_id=read.token_id("bos_token_id", vocab_size),
            eos_token_ids=read.token_ids("eos_token_id", vocab_size),
            pad_token_id=read.token_id("pad_token_id", vocab_size),
        )
        # pretraining_tp only reorders sums, to reproduce how a sharded training run rounded.
        read.finish("pretraining_tp", "max_sequence_length", "is_llama_config")
        return config

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json that transformers opens as LlamaForCausalLM."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.context_length,
            "num_hidden_layers": self.n_layer,
            "num_attention_heads": self.n_head,
            "num_key_value_heads": self.n_kv_head,
            "head_dim": self.head_dim,
            "hidden_size": self.width,
            "intermediate_size": self.hidden,
            "hidden_act": "silu",
            # Transformers 4 and most other engines read the first of these, transformers 5 the second.
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rms_norm_eps": self.rms_norm_eps,
            "attention_bias": False,
            "mlp_bias": False,
            "initializer_range": self.init_std,
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": config_json.one_or_list(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
        }


PRESETS = {
    "llama-7b": LlamaConfig(),
    "llama-13b": LlamaConfig(n_layer=40, n_head=40, n_kv_head=40, width=5120, hidden=13824),
    "llama-33b": LlamaConfig(n_layer=60, n_head=52, n_kv_head=52, width=6656, hidden=17920),
    "llama-65b": LlamaConfig(n_layer=80, n_head=64, n_kv_head=64, width=8192, hidden=22016),
    "llama2-70b": LlamaConfig(
        context_length=4096, n_layer=80, n_head=64, n_kv_head=8, width=8192, hidden=28672, rms_norm_eps=1e-5
    ),
    "llama3-8b": LlamaConfig(
        vocab_size=128256,
        context_length=8192,
        n_kv_head=8,
        hidden=14336,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
    ),
}
PARAMETERS = {  # as published
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
}


def rotary_frequencies(config: LlamaConfig) -> Tensor:
    """Return theta^(-2i/D) for i = 0 .. D/2 - 1, float32: radians per position of each pair."""
    D = config.head_dim
    return 1.0 / config.rope_theta ** (torch.arange(0, D, 2, dtype=torch.float32) / D)


def rotary_angles(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and sine (..., D/2) of the rotation at each position (...).

    Angles are float32 whatever ``dtype`` is. At position 8000 that rounds them by up to 5e-4 radians, and the
    published checkpoints were trained so: computing them better would be computing another model.
    """
    angles = positions[..., None].float() * frequencies.float()
    return angles.cos().to(dtype), angles.sin().to(dtype)


class Attention(nn.Module):
    """Masked self-attention with rotary positions and grouped heads."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.width, config.n_head * config.head_dim, bias=False)
        self.k_proj = Linear(config.width, config.n_kv_head * config.head_dim, bias=False)
        self.v_proj = Linear(config.width, config.n_kv_head * config.head_dim, bias=False)
        self.o_proj = Linear(config.n_head * config.head_dim, config.width, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue | None]:
        """Attend from x (B, T, C), within x alone or, given a cache, to its P slots as well."""
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, H, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, D)
        q, k = rotary(q, cos, sin), rotary(k, cos, sin)
        present = None
        if past is None:
            y = attention(q, k, v)
        else:
            y, key, value = cached_attention(q, k, v, *past, mask)
            present = (key, value)
        return self.o_proj(y.reshape(B, T, C)), present


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), position by position."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = Linear(config.width, config.hidden, bias=False)
        self.up_proj = Linear(config.width, config.hidden, bias=False)
        self.down_proj = Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """One layer. As in GPT-2, h is the residual stream and x what the next norm still has to add to it."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.rms_norm_eps)
        self.mlp = MLP(config)

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


class Llama(Causal):
    """A LLaMA language model with randomly initialised weights.

    Args:
        config: Its shape.
        init: False leaves the parameters uninitialised, for a caller that fills them all.
    """

    PARTS = Parts("embed_tokens", "layers", "norm", "lm_head", "model.")

    def __init__(self, config: LlamaConfig, *, init: bool = True):
        super().__init__()
        blocks: list[nn.Module] = [Block(config) for _ in range(config.n_layer)]
        self.assemble(config, blocks, RMSNorm(config.width, config.rms_norm_eps))
        positions = torch.arange(config.context_length)
        self.rotate_by(rotary_angles(positions, rotary_frequencies(config), torch.get_default_dtype()))
        if init:
            self.init_weights()
