"""Mixtral: Mistral with a mixture of experts in every layer.

Jiang et al., "Mixtral of Experts", 2024 (arXiv:2401.04088).

- eight gated perceptrons, of which each token goes through the two that its router prefers; their weights add up to 1
- grouped heads, and a sliding window where config.json has one
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import nn

from portlm.models import config_json
from portlm.models.grouped import Attention
from portlm.models.mixture import Mixture, MixtureConfig


@dataclass(frozen=True)
class MixtralConfig(MixtureConfig):
    """The shape of a Mixtral model. The defaults are transformers', which are Mixtral 8x7B.

    Raises:
        ConfigError: A value out of range, heads that do not divide the width or each other, or an odd D.
    """

    family = "mixtral"
    ARCHITECTURE = "MixtralForCausalLM"
    NEEDS_KV_HEADS = True
    THETA = 1e6
    EXPERTS = ("num_local_experts", "num_experts")

    context_length: int = 131072
    n_kv_head: int = 8
    hidden: int = 14336
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    window: int = 0  # how many positions each sees, its own among them; 0 for all

    def __post_init__(self) -> None:
        super().__post_init__()
        config_json.check_bounds(self, {"window": (0, config_json.MAX_CONTEXT)})
        if self.window >= self.context_length:  # one spelling of one model
            object.__setattr__(self, "window", 0)

    @classmethod
    def tiny(cls) -> Self:
        """Return a configuration that tests compute in no time: four narrow experts."""
        return replace(super().tiny(), hidden=24, n_expert=4)

    @classmethod
    def check_windows(cls, read: config_json.Reader, context_length: int) -> None:
        """Look at what says of layers how far they look back; ``own`` reads the window that all have."""
        read.require("use_sliding_window", False)
        read.require_full_layers()

    @classmethod
    def own(cls, read: config_json.Reader, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the window, and what all mixtures have."""
        read.training("router_jitter_noise", 0.0)
        return super().own(read, values) | {"window": config_json.window(read, "sliding_window", 0)}

    def own_to_hf(self) -> dict[str, Any]:
        """Return the keys of config.json for what ``own`` reads."""
        return super().own_to_hf() | {"sliding_window": self.window or None}


def _sized(n_layer: int, n_head: int, width: int, hidden: int, context_length: int) -> MixtralConfig:
    return MixtralConfig(
        context_length=context_length, n_layer=n_layer, n_head=n_head, width=width, hidden=hidden
    )


PRESETS = {
    "mixtral-8x7b": _sized(32, 32, 4096, 14336, 32768),
    "mixtral-8x22b": _sized(56, 48, 6144, 16384, 65536),
}
PARAMETERS = {  # V C (2) + C + layers (2 C + 2 C H D + 2 C K D + E C + 3 E C F), computed and not read from files
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
}


class Mixtral(Mixture):
    """A Mixtral language model."""

    ROUTED = "block_sparse_moe"
    MATRICES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}  # noqa: RUF012 - a constant of the class

    def attention(self, config: MixtralConfig, layer: int) -> nn.Module:
        """Return a layer's attention."""
        return Attention(config, window=config.window or None)
