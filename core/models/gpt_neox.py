"""GPT-NeoX: GPT-2 with four changes. The architecture of GPT-NeoX-20B, Pythia and the StableLM alphas.

Black et al., "GPT-NeoX-20B: An Open-Source Autoregressive Language Model", 2022 (arXiv:2204.06745), and Biderman et
al., "Pythia", 2023 (arXiv:2304.01373).

- attention and MLP side by side: both read the block's input, each through a LayerNorm of its own, and both are added
  to it (Wang and Komatsuzaki, 2021); ``parallel_residual = False`` puts them one behind the other again
- rotary positions (Su et al., 2021) on the first ``rotary_pct`` of each head, the rest of it without a position
- one matrix for queries, keys and values, whose rows go head by head: q, k and v of the first head, then of the next
- the output layer has its own matrix, unless ``tie_embeddings``, and GELU is the exact form

B batch, T time, C width, H heads, D = C / H head width, R the rotated part of it, P slots already in the cache, V
vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from portlm.errors import ConfigError
from portlm.models import config_json, config_rope
from portlm.models.causal import Causal, Parts
from portlm.models.layers import KeyValue, LayerNorm, Linear
from portlm.models.rope import Scaling, tables
from portlm.models.within import attend_within
from portlm.ops.cached_attention import cached_attention
from portlm.ops.gelu_mlp import gelu_mlp
from portlm.ops.rotary import rotary

_BOUNDS = {
    "vocab_size": (1, config_json.MAX_VOCAB),
    "context_length": (1, config_json.MAX_CONTEXT),
    "n_layer": (1, config_json.MAX_LAYERS),
    "n_head": (1, config_json.MAX_HEADS),
    "width": (1, config_json.MAX_WIDTH),
    "hidden": (1, config_json.MAX_HIDDEN),
    "rotary_pct": (0.0, 1.0),
    "rope_theta": (1.0, 1e12),
    "layer_norm_eps": (1e-12, 0.1),
    "init_std": (0.0, 1.0),
}


@dataclass(frozen=True)
class GPTNeoXConfig:
    """The shape of a GPT-NeoX model. The defaults are Pythia-70M.

    Raises:
        ConfigError: A value out of range, a width that the heads do not divide, or an odd or empty rotated part.
    """

    family: ClassVar[str] = "gpt_neox"
    # What [model] of a training run may set, and what it is for a small model on a CPU.
    SETTINGS: ClassVar[dict[str, Any]] = {
        "n_layer": 4,
        "n_head": 4,
        "width": 128,
        "hidden": 0,  # width of the feed-forward layer; 0 means 4 times the width
        "context_length": 64,  # tokens the model sees at once
        "rotary_pct": 0.25,
        "rope_theta": 10000.0,
        "parallel_residual": True,
    }

    vocab_size: int = 50304
    context_length: int = 2048
    n_layer: int = 6
    n_head: int = 8
    width: int = 512
    hidden: int = 2048  # inner width of the MLP
    rotary_pct: float = 0.25  # R / D, rounded down to whole elements
    rope_theta: float = 10000.0
    rope_scaling: Scaling | None = None
    parallel_residual: bool = True
    attention_bias: bool = True  # of the two matrices of attention; those of the MLP always have one
    layer_norm_eps: float = 1e-5
    gelu: config_json.Gelu = "none"
    tie_embeddings: bool = False
    init_std: float = 0.02  # of every matrix
    bos_token_id: int | None = None  # this and the next two are not computed with, only kept with the model
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        config_json.check_bounds(self, _BOUNDS)
        if self.width % self.n_head:
            raise ConfigError(f"width {self.width} must be a multiple of n_head {self.n_head}")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ConfigError(
                f"rotary positions turn pairs: rotary_pct {self.rotary_pct:g} of the head width {self.head_dim} "
                f"must be an even number of at least 2, got {self.rotary_dim}"
            )
        if self.gelu not in ("tanh", "none"):
            raise ConfigError(f"gelu must be tanh or none, got {self.gelu!r}")
        for name in ("parallel_residual", "attention_bias", "tie_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        config_json.check_token_ids(self)

    @property
    def head_dim(self) -> int:
        """D, the width of one head."""
        return self.width // self.n_head

    @property
    def rotary_dim(self) -> int:
        """R, how many elements of each head are rotated."""
        return int(self.head_dim * self.rotary_pct)

    @property
    def n_kv_head(self) -> int:
        """Every query head has its own key and value head."""
        return self.n_head

    @classmethod
    def from_settings(cls, **values: Any) -> Self:
        """Return the configuration for values of SETTINGS and of the vocabulary; 0 stands for what follows from others.

        Raises:
            ConfigError: A value out of range, by name.
        """
        return cls(**values | {"hidden": values["hidden"] or 4 * values["width"]})

    @classmethod
    def tiny(cls) -> Self:
        """Return a configuration that tests compute in no time: a vocabulary of bytes, a quarter of a head rotated."""
        return cls(
            vocab_size=259, context_length=32, n_layer=2, n_head=4, width=32, hidden=44, eos_token_ids=(256,)
        )

    @classmethod
    def from_hf(cls, data: Mapping[str, Any] | config_json.Reader) -> Self:
        """Read the contents of a Hugging Face config.json, strictly.

        Raises:
            ConfigError: A key that is missing, unknown, out of range or asks for another model. It is named.
        """
        read = config_json.Reader.of(data)
        read.require("model_type", "gpt_neox")
        vocab_size = read.integer("vocab_size", 50432)
        context = read.integer("max_position_embeddings", 2048)
        for key in (
            "attention_dropout",
            "attention_probs_dropout_prob",
            "hidden_dropout",
            "hidden_dropout_prob",
        ):
            read.training(key, 0.0)  # nothing published used them
        read.require_full_attention(context)
        rotation = config_rope.rotary(
            read, context, base="rotary_emb_base", share="rotary_pct", default_share=0.25
        )
        config = cls(
            vocab_size=vocab_size,
            context_length=context,
            n_layer=read.integer("num_hidden_layers", 44),
            n_head=read.integer("num_attention_heads", 64),
            width=read.integer("hidden_size", 6144),
            hidden=read.integer("intermediate_size", 24576),
            rotary_pct=rotation.share,
            rope_theta=rotation.theta,
            rope_scaling=rotation.scaling,
            parallel_residual=read.boolean("use_parallel_residual", True),
            attention_bias=read.boolean("attention_bias", True),
            layer_norm_eps=read.number("layer_norm_eps", 1e-5),
            gelu=read.choice("hidden_act", "gelu", config_json.GELU),
            tie_embeddings=read.boolean("tie_word_embeddings", False),
            init_std=read.number("initializer_range", 0.02),
            bos_token_id=read.token_id("bos_token_id", vocab_size),
            eos_token_ids=read.token_ids("eos_token_id", vocab_size),
            pad_token_id=read.token_id("pad_token_id", vocab_size),
        )
        read.finish("classifier_dropout")
        return config

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json that transformers opens as GPTNeoXForCausalLM."""
        return {
            "architectures": ["GPTNeoXForCausalLM"],
            "model_type": "gpt_neox",
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.context_length,
            "num_hidden_layers": self.n_layer,
            "num_attention_heads": self.n_head,
            "hidden_size": self.width,
            "intermediate_size": self.hidden,
            "hidden_act": "gelu" if self.gelu == "none" else "gelu_new",
            "rotary_pct": self.rotary_pct,
            **config_rope.to_hf(
                self.rope_theta,
                self.rope_scaling,
                base="rotary_emb_base",
                partial_rotary_factor=self.rotary_pct,
            ),
            "use_parallel_residual": self.parallel_residual,
            "attention_bias": self.attention_bias,
            "layer_norm_eps": self.layer_norm_eps,
            "initializer_range": self.init_std,
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": config_json.one_or_list(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
        }


def _pythia(n_layer: int, n_head: int, width: int, vocab_size: int = 50304) -> GPTNeoXConfig:
    return GPTNeoXConfig(vocab_size=vocab_size, n_layer=n_layer, n_head=n_head, width=width, hidden=4 * width)


PRESETS = {
    "pythia-70m": _pythia(6, 8, 512),
    "pythia-160m": _pythia(12, 12, 768),
    "pythia-410m": _pythia(24, 16, 1024),
    "pythia-1b": _pythia(16, 8, 2048),
    "pythia-1.4b": _pythia(24, 16, 2048),
    "pythia-2.8b": _pythia(32, 32, 2560),
    "pythia-6.9b": _pythia(32, 32, 4096, 50432),
    "pythia-12b": _pythia(36, 40, 5120, 50688),
    "gpt-neox-20b": GPTNeoXConfig(
        vocab_size=50432, n_layer=44, n_head=64, width=6144, hidden=24576, gelu="tanh"
    ),
}
PARAMETERS = {  # as published
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    "gpt-neox-20b": 20_554_567_680,
}


class Attention(nn.Module):
    """Masked self-attention with rotary positions on a part of each head."""

    def __init__(self, config: GPTNeoXConfig):
        super().__init__()
        self.n_head, self.head_dim, self.rotary_dim = config.n_head, config.head_dim, config.rotary_dim
        self.query_key_value = Linear(
            config.width, 3 * config.width, bias=config.attention_bias, maps=3, turns=config.n_head
        )
        self.dense = Linear(config.width, config.width, bias=config.attention_bias)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue | None]:
        """Attend from x (B, T, C), within x alone or, given a cache, to its P slots as well."""
        B, T, C = x.shape
        R, D = self.rotary_dim, self.head_dim
        qkv = self.query_key_value(x).view(B, T, self.n_head, 3 * D)
        if R == D:
            q, k, v = qkv.chunk(3, dim=-1)  # each (B, T, H, D)
            q, k = rotary(q, cos, sin), rotary(k, cos, sin)
        else:
            q, q_rest, k, k_rest, v = qkv.split((R, D - R, R, D - R, D), dim=-1)
            q = torch.cat((rotary(q, cos, sin), q_rest), dim=-1)  # (B, T, H, D)
            k = torch.cat((rotary(k, cos, sin), k_rest), dim=-1)  # (B, T, H, D)
        present = None
        if past is None:
            y = attend_within(q, k, v, mask)
        else:
            y, key, value = cached_attention(q, k, v, *past, mask)
            present = (key, value)
        return self.dense(y.reshape(B, T, C)), present


class MLP(nn.Module):
    """Two linear maps with GELU between them, position by position."""

    def __init__(self, config: GPTNeoXConfig):
        super().__init__()
        self.dense_h_to_4h = Linear(config.width, config.hidden, bias=True)
        self.dense_4h_to_h = Linear(config.hidden, config.width, bias=True)
        self.gelu = config.gelu

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        up, down = self.dense_h_to_4h, self.dense_4h_to_h
        return gelu_mlp(x, up.weight, up.bias, down.weight, down.bias, approximate=self.gelu)


class Block(nn.Module):
    """One layer. As in GPT-2, h is the residual stream and x what the next norm still has to add to it."""

    def __init__(self, config: GPTNeoXConfig):
        super().__init__()
        self.input_layernorm = LayerNorm(config.width, config.layer_norm_eps)
        self.post_attention_layernorm = LayerNorm(config.width, config.layer_norm_eps)
        self.attention = Attention(config)
        self.mlp = MLP(config)
        self.parallel_residual = config.parallel_residual

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
        x, present = self.attention(y, cos, sin, mask, past)
        if self.parallel_residual:
            y, _ = self.post_attention_layernorm(h, None)
            return x + self.mlp(y), h, present
        y, h = self.post_attention_layernorm(x, h)
        return self.mlp(y), h, present


class GPTNeoX(Causal):
    """A GPT-NeoX language model with randomly initialised weights.

    Args:
        config: Its shape.
        init: False leaves the parameters uninitialised, for a caller that fills them all.
    """

    PARTS = Parts("embed_in", "layers", "final_layer_norm", "embed_out", "gpt_neox.")
    CONSTANTS = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")

    def __init__(self, config: GPTNeoXConfig, *, init: bool = True):
        super().__init__()
        blocks: list[nn.Module] = [Block(config) for _ in range(config.n_layer)]
        self.assemble(config, blocks, LayerNorm(config.width, config.layer_norm_eps))
        self.rotate_by(
            tables(config.context_length, config.rotary_dim, config.rope_theta, config.rope_scaling)
        )
        if init:
            self.init_weights()

    @classmethod
    def hf_alias(cls, name: str) -> str | None:
        """Return the usual name of a tensor in a foreign file, or None for one that holds no parameter.

        Newer files call the head lm_head.
        """
        return super().hf_alias(
            name.replace("lm_head.", "embed_out.") if name.startswith("lm_head.") else name
        )
