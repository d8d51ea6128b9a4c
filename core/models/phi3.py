"""Phi-3 and Phi-4: LLaMA with fewer, larger matrices.

Abdin et al., "Phi-3 Technical Report", 2024 (arXiv:2404.14219), and "Phi-4 Technical Report" (arXiv:2412.08905).

- queries, keys and values come of one matrix: all rows of q, then those of k, then those of v
- gate and up of the perceptron come of one matrix, too
- rotary positions may cover a part of each head only (Phi-4-mini)

- the first versions look back 2047 positions or so
- in the long versions each pair has its own frequency (LongRoPE): one set for texts of up to the original context, and
  another for longer ones

Which set transformers takes depends on how long the whole text is, and it computes a cache anew where that grows beyond
the original context. Here, as in llama.cpp, the context decides that the model is opened with: one that is longer than
the original takes the long set at every length of the text. Who imports such a model says which (`at_context`), and
config.json keeps it under ``portlm_rope_factors``.

B batch, T time, C width, H query heads, K key/value heads, D head width, R the rotated part of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from portlm.errors import ConfigError
from portlm.models import config_json, config_rope
from portlm.models.grouped import Grouped, attend, turned
from portlm.models.grouped_config import GroupedConfig, head_width
from portlm.models.layers import KeyValue, Linear
from portlm.models.rope import LongRope
from portlm.ops.swiglu import swiglu

_ORIGINAL, _FACTORS = "original_max_position_embeddings", "portlm_rope_factors"


@dataclass(frozen=True)
class Phi3Config(GroupedConfig):
    """The shape of a Phi-3 model. The defaults are transformers', which are Phi-3-mini without its window.

    With LongRoPE, ``context_length`` beyond the original one stands for the long factors at every length.

    Raises:
        ConfigError: A value out of range, heads that do not divide the width or each other, or an odd R.
    """

    family = "phi3"
    ARCHITECTURE = "Phi3ForCausalLM"
    SCALINGS = ("longrope",)

    vocab_size: int = 32064
    context_length: int = 4096
    width: int = 3072
    hidden: int = 8192
    rms_norm_eps: float = 1e-5
    rotary_pct: float = 1.0  # R / D, rounded down to whole elements
    window: int = 0  # how many positions each sees, its own among them; 0 for all

    def __post_init__(self) -> None:
        super().__post_init__()
        config_json.check_bounds(self, {"window": (0, config_json.MAX_CONTEXT)})
        if self.window >= self.context_length:  # one spelling of one model
            object.__setattr__(self, "window", 0)
        if isinstance(self.rope_scaling, LongRope):
            for name in ("short_factor", "long_factor"):
                if len(getattr(self.rope_scaling, name)) != self.rotary_dim // 2:
                    raise ConfigError(
                        f"longrope: {name} must have a number for each of {self.rotary_dim // 2} pairs, got "
                        f"{len(getattr(self.rope_scaling, name))}"
                    )

    @property
    def rotary_dim(self) -> int:
        """R, how many elements of each head are rotated."""
        return int(self.head_dim * self.rotary_pct)

    @classmethod
    def check_windows(cls, read: config_json.Reader, context_length: int) -> None:
        """Look at what says of layers how far they look back; ``own`` reads the window that all have."""
        read.require("use_sliding_window", False)
        read.require_full_layers()

    @classmethod
    def own(cls, read: config_json.Reader, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the head width, the window and the rotation."""
        read.require("attention_bias", False)
        read.require("mlp_bias", False)
        for key in ("resid_pdrop", "embd_pdrop"):
            read.training(key, 0.0)
        context, original = values["context_length"], read.integer(_ORIGINAL, 4096)
        found = config_rope.rotary(read, original, kinds=cls.SCALINGS)
        factors, scaling = read.raw(_FACTORS, '"long"; of a longrope whose context is longer'), found.scaling
        if isinstance(scaling, LongRope):
            scaling = _resolved(scaling, context, original)
        long = isinstance(scaling, LongRope) and scaling.is_long(context)
        if long and factors is None:
            raise ConfigError(
                f"max_position_embeddings = {context} is longer than {_ORIGINAL} = {original}: transformers rotates by "
                f"short_factor in texts of at most {original} tokens and by long_factor in longer ones, and keys in a "
                f"cache are of one. Choose: portlm import --context {original} for short_factor, or --context "
                f"{context} for long_factor at every length"
            )
        if factors is not None and not (long and factors == "long"):
            raise ConfigError(
                f"{_FACTORS} = {factors!r} does not fit max_position_embeddings = {context}: remove it"
            )
        return {
            "head_width": head_width(read, values),
            "window": config_json.window(read, "sliding_window", 0),
            "rope_theta": found.theta,
            "rope_scaling": scaling,
            "rotary_pct": found.share,
        }

    @classmethod
    def at_context(cls, data: Mapping[str, Any], context: int) -> dict[str, Any]:
        """Return the contents of a config.json with so many of its positions, which decides which factors are taken.

        Raises:
            ConfigError: The model has fewer positions, or its rotation does not depend on how many there are.
        """
        most, original = data.get("max_position_embeddings", 4096), data.get(_ORIGINAL, 4096)
        blocks = [key for key in ("rope_scaling", "rope_parameters") if isinstance(data.get(key), dict)]
        said = {data[key].get("rope_type", data[key].get("type")) for key in blocks}
        if not said & {"longrope", "su"}:
            raise ConfigError("positions do not depend on the context here, so there is none to choose")
        if any(type(value) is not int for value in (most, original)) or not 1 <= context <= most:
            raise ConfigError(
                f"the context must be from 1 to max_position_embeddings = {most}, got {context}"
            )
        changed = dict(data) | {"max_position_embeddings": context}
        for key in blocks:  # what the attention factor follows from is no longer said by the context
            changed[key] = {"factor": max(most / original, 1.0), **data[key]}
        return changed | ({_FACTORS: "long"} if context > original else {})

    def own_to_hf(self) -> dict[str, Any]:
        """Return the keys of config.json for what ``own`` reads."""
        share, scaling = self.rotary_pct, self.rope_scaling
        long = isinstance(scaling, LongRope) and scaling.is_long(self.context_length)
        original = (
            scaling.original_max_position_embeddings if isinstance(scaling, LongRope) else self.context_length
        )
        return {
            "head_dim": self.head_dim,
            "sliding_window": self.window or None,
            "partial_rotary_factor": share,
            **config_rope.to_hf(self.rope_theta, scaling, partial_rotary_factor=share),
            _ORIGINAL: original,
            **({_FACTORS: "long"} if long else {}),
        }


def _resolved(scaling: LongRope, context: int, original: int) -> LongRope:
    """Return LongRoPE with the attention factor that transformers computes, as a number of its own.

    Raises:
        ConfigError: Versions of transformers differ in which it is, or in the original context.
    """
    if scaling.original_max_position_embeddings != original:
        raise ConfigError(
            f"longrope: {_ORIGINAL} is {original}, and {scaling.original_max_position_embeddings} beside the factors, "
            "which transformers does not look at: make them equal"
        )
    ratio = context / original
    if scaling.attention_factor is None:
        scaling = replace(scaling, factor=ratio if scaling.factor is None else scaling.factor)
    return replace(scaling, factor=None, attention_factor=scaling.size)


PRESETS = {
    "phi3-mini-4k": Phi3Config(window=2047),
    "phi3-medium-4k": Phi3Config(n_layer=40, n_head=40, n_kv_head=10, width=5120, hidden=17920, window=2047),
    "phi4": Phi3Config(
        vocab_size=100352,
        context_length=16384,
        n_layer=40,
        n_head=40,
        n_kv_head=10,
        width=5120,
        hidden=17920,
        rope_theta=250000.0,
    ),
}
PARAMETERS = {  # of the published files
    "phi3-mini-4k": 3_821_079_552,
    "phi3-medium-4k": 13_960_238_080,
    "phi4": 14_659_507_200,
}


class Attention(nn.Module):
    """Masked self-attention whose queries, keys and values come of one matrix."""

    def __init__(self, config: Phi3Config):
        super().__init__()
        self.head_dim, self.window = config.head_dim, config.window or None
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
        return attend(
            self.o_proj, turned(q, cos, sin), turned(k, cos, sin), v, mask, past, window=self.window
        )


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
