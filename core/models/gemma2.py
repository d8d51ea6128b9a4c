"""Gemma 2: norms on both sides of every sublayer, soft caps, and a window in every other layer.

Gemma team, "Gemma 2: Improving Open Language Models at a Practical Size", 2024 (arXiv:2408.00118); what it has from
Gemma: arXiv:2403.08295.

- RMSNorm in front of attention and perceptron and on what they give; its gain is 1 + weight
- layers see the last ``window`` positions and all of them in turn
- scores are bounded by c tanh(s / c), and so are logits; scores are scaled by a number of their own
- GELU in its tanh form instead of SiLU, and embeddings times sqrt(C)

B batch, T time, C width, V vocabulary, P slots already in the cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from portlm.errors import ConfigError
from portlm.files import shown
from portlm.models import config_json
from portlm.models.grouped import Attention, Grouped
from portlm.models.grouped_config import GroupedConfig, head_width, rotation
from portlm.models.layers import KeyValue, Linear
from portlm.ops.rms_norm import rms_norm

FULL, SLIDING = "full_attention", "sliding_attention"
MAX_CAP = 1e6


@dataclass(frozen=True)
class Gemma2Config(GroupedConfig):
    """The shape of a Gemma 2 model. The defaults are transformers', which are Gemma 2 2B.

    Attributes:
        CAPS: The soft caps of scores and logits where config.json has none, 0 for none.
        TURN: What the layers see in turn where config.json does not say it.

    Raises:
        ConfigError: A value out of range, heads that do not divide the width or each other, or an odd D.
    """

    family = "gemma2"
    ARCHITECTURE = "Gemma2ForCausalLM"
    ACTIVATIONS = ("gelu_pytorch_tanh", "gelu_new")
    NEEDS_KV_HEADS = False
    CAPS: ClassVar[tuple[float, float]] = (50.0, 30.0)
    TURN: ClassVar[tuple[str, ...]] = (SLIDING, FULL)
    SETTINGS: ClassVar[dict[str, Any]] = {
        **GroupedConfig.SETTINGS,
        "window": 16,  # positions that a token sees in layers with a window, itself among them
    }

    vocab_size: int = 256000
    context_length: int = 8192
    n_layer: int = 26
    n_head: int = 8
    n_kv_head: int = 4
    width: int = 2304
    hidden: int = 9216
    head_width: int = 256
    tie_embeddings: bool = True
    rms_norm_eps: float = 1e-6
    layers: tuple[str, ...] = TURN  # what they see, in turn
    window: int = 4096  # how many positions a layer with a window sees
    query_scalar: int = 256  # scores are divided by its root
    score_cap: float = CAPS[0]  # 0 for none
    logit_cap: float = CAPS[1]

    def __post_init__(self) -> None:
        super().__post_init__()
        caps = dict.fromkeys(("score_cap", "logit_cap"), (0.0, MAX_CAP))
        bounds = {"window": (1, config_json.MAX_CONTEXT), "query_scalar": (1, config_json.MAX_WIDTH), **caps}
        config_json.check_bounds(self, bounds)
        if not self.layers or not {FULL, SLIDING}.issuperset(self.layers):
            raise ConfigError(f"layers must be some of {FULL} and {SLIDING}, got {shown(self.layers)}")
        object.__setattr__(self, "layers", config_json.in_turn(self.kinds))

    @property
    def kinds(self) -> list[str]:
        """What each layer sees."""
        return [self.layers[i % len(self.layers)] for i in range(self.n_layer)]

    @classmethod
    def from_settings(cls, **values: Any) -> Self:
        """Return the configuration for values of SETTINGS and of the vocabulary, with heads that share the width."""
        each = values["width"] // max(values["n_head"], 1)
        return super().from_settings(**values, head_width=0, query_scalar=max(each, 1))

    @classmethod
    def tiny(cls) -> Self:
        """Return a configuration that tests compute in no time, with wide heads, and caps and windows that count."""
        score_cap, logit_cap = 0.5 * bool(cls.CAPS[0]), 2.0 * bool(cls.CAPS[1])
        return replace(
            super().tiny(), head_width=16, query_scalar=10, window=5, score_cap=score_cap, logit_cap=logit_cap
        )

    @classmethod
    def check_windows(cls, read: config_json.Reader, context_length: int) -> None:
        """Accept only models whose positions do not look ahead; ``own`` reads how far they look back."""
        read.require("use_sliding_window", False)
        read.require("use_bidirectional_attention", False)
        read.require("attention_bias", False)

    @classmethod
    def own(cls, read: config_json.Reader, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return what sets its attention apart, and what all descendants have."""
        read.require("hidden_activation", *cls.ACTIVATIONS)
        window = read.integer("sliding_window", 4096)
        scores, logits = (
            _cap(read, key, cap)
            for key, cap in zip(("attn_logit_softcapping", "final_logit_softcapping"), cls.CAPS, strict=True)
        )
        return {
            "head_width": head_width(read, values, 256),
            "layers": cls.read_layers(read, values["n_layer"]),
            "window": window,
            "query_scalar": read.integer("query_pre_attn_scalar", 256),
            "score_cap": scores,
            "logit_cap": logits,
            **cls.read_rotation(read, values),
        }

    @classmethod
    def read_rotation(cls, read: config_json.Reader, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of rotary positions."""
        return rotation(cls, read, values)

    @classmethod
    def read_layers(cls, read: config_json.Reader, n_layer: int) -> tuple[str, ...]:
        """Return what each layer sees."""
        kinds = read.raw("layer_types", f'"{SLIDING}" or "{FULL}" for each layer; in turn if missing')
        if kinds is None:
            return cls.TURN
        if (
            not isinstance(kinds, list)
            or len(kinds) != n_layer
            or any(k not in (FULL, SLIDING) for k in kinds)
        ):
            raise ConfigError(
                f"layer_types must be {SLIDING} or {FULL} for {n_layer} layers, got {shown(kinds)}"
            )
        return tuple(kinds)

    def own_to_hf(self) -> dict[str, Any]:
        """Return the keys of config.json for what ``own`` reads."""
        return super().own_to_hf() | {
            "hidden_activation": self.ACTIVATIONS[0],
            "attention_bias": False,
            "layer_types": self.kinds,
            "sliding_window": self.window,
            "query_pre_attn_scalar": self.query_scalar,
            "attn_logit_softcapping": self.score_cap or None,
            "final_logit_softcapping": self.logit_cap or None,
        }


def _cap(read: config_json.Reader, key: str, default: float) -> float:
    """Return a soft cap, 0 for null; a missing key is transformers' default."""
    value = read.optional_number(key, f"a positive number; null for none, {default or 'null'} if missing")
    if value is None:
        return 0.0 if read.holds(key) else default
    if not 0 < value <= MAX_CAP:
        raise ConfigError(f"{key} must be a positive number up to {MAX_CAP:g}, or null, got {value:g}")
    return value


def _sized(n_layer: int, n_head: int, width: int, hidden: int, **more: Any) -> Gemma2Config:
    ids: dict[str, Any] = {"bos_token_id": 2, "eos_token_ids": (1,), "pad_token_id": 0}
    shape: dict[str, Any] = {"n_layer": n_layer, "n_head": n_head, "n_kv_head": n_head // 2, "width": width}
    return Gemma2Config(**shape, hidden=hidden, **ids, **more)


PRESETS = {
    "gemma2-2b": _sized(26, 8, 2304, 9216),
    "gemma2-9b": _sized(42, 16, 3584, 14336),
    "gemma2-27b": _sized(46, 32, 4608, 36864, head_width=128, query_scalar=144),
}
PARAMETERS = {  # of the published files
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
}


class Norm(nn.Module):
    """RMSNorm whose gain is 1 + weight, with the residual addition in front of it."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return (norm(h), h), each (..., C), for h = x + residual, or h = x without one."""
        if residual is None:
            return rms_norm(x, self.weight + 1.0, self.eps), x
        return rms_norm(x, self.weight + 1.0, self.eps, residual)


class GeluGated(nn.Module):
    """down(gelu(gate(x)) * up(x)), position by position."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = Linear(width, hidden, bias=False)
        self.up_proj = Linear(width, hidden, bias=False)
        self.down_proj = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Block(nn.Module):
    """One layer. h is the residual stream and x what the next norm still has to add to it.

    Args:
        config: The shape.
        attention: (x, cos, sin, mask, past) -> (y, present).
        turn: Which of the rotations it takes, where there are several.
    """

    input_layernorm: Norm
    post_attention_layernorm: Norm
    pre_feedforward_layernorm: Norm
    post_feedforward_layernorm: Norm

    def __init__(self, config: Gemma2Config, attention: nn.Module, turn: int = 0):
        super().__init__()
        self.self_attn, self.turn = attention, turn
        self.mlp = GeluGated(config.width, config.hidden)
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            self.add_module(f"{name}_layernorm", Norm(config.width, config.rms_norm_eps))

    def forward(self, x: Tensor, h: Tensor | None, *carried: Any) -> tuple[Tensor, Tensor, KeyValue | None]:
        """Map (x, h), both (B, T, C), to the same for the next layer; carried: rotations, mask and past."""
        *rotations, mask, past = carried
        cos, sin = rotations[2 * self.turn : 2 * self.turn + 2]
        y, h = self.input_layernorm(x, h)
        y, present = self.self_attn(y, cos, sin, mask, past)
        y, _ = self.post_attention_layernorm(y, None)
        y, h = self.pre_feedforward_layernorm(y, h)
        x, _ = self.post_feedforward_layernorm(self.mlp(y), None)
        return x, h, present


class Gemma2(Grouped):
    """A Gemma 2 language model."""

    def layer_norm(self, config: Gemma2Config) -> nn.Module:
        """Return a fresh norm of the stream."""
        return Norm(config.width, config.rms_norm_eps)

    def bounds(self, config: Gemma2Config, layer: int) -> dict[str, Any]:
        """Return what a layer's attention is told beside queries, keys and values."""
        window = config.window if config.kinds[layer] == SLIDING else None
        return {"scale": config.query_scalar**-0.5, "softcap": config.score_cap or None, "window": window}

    def block(self, config: Any, layer: int) -> nn.Module:
        """Return a layer."""
        return Block(config, Attention(config, **self.bounds(config, layer)))

    @property
    def packs(self) -> bool:
        """Not with a soft cap: the attention of which takes no bias."""
        return not self.config.score_cap

    def embed(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        """Return embeddings (B, T, C) times sqrt(C), which is rounded to float32 as transformers has it."""
        return super().embed(input_ids, position_ids) * float(np.float32(self.config.width**0.5))

    def logits(self, y: Tensor) -> Tensor:
        """Return the logits (B, T, V) of normalised output y (B, T, C), bounded by the cap."""
        logits, cap = super().logits(y), self.config.logit_cap
        return torch.tanh(logits * (1 / cap)) * cap if cap else logits

    def loss(self, y: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of targets (B, T)."""
        if not self.config.logit_cap:
            return super().loss(y, targets)
        return F.cross_entropy(self.logits(y).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw fresh weights: N(0, std²) for matrices, and 0 for what is added to a gain of 1."""
        super().init_weights()
        for module in self.modules():
            if isinstance(module, Norm):
                module.weight.zero_()
