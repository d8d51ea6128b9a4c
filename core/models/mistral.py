"""Mistral: LLaMA with grouped heads at every size, and in its first version a sliding window.

Jiang et al., "Mistral 7B", 2023 (arXiv:2310.06825).

- 8 key/value heads, and a head width that need not be width / n_head (Mistral Nemo)
- the first version looked back 4096 positions; later ones look back to the first
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from portlm.models import config_json
from portlm.models.grouped import Attention, Grouped
from portlm.models.grouped_config import GroupedConfig

_WINDOW = 4096  # what transformers takes where config.json has no sliding_window, not even null


@dataclass(frozen=True)
class MistralConfig(GroupedConfig):
    """The shape of a Mistral model. The defaults are transformers', which are Mistral 7B.

    Raises:
        ConfigError: A value out of range, heads that do not divide the width or each other, or an odd D.
    """

    family = "mistral"
    ARCHITECTURE = "MistralForCausalLM"
    NEEDS_KV_HEADS = True

    context_length: int = 131072
    n_kv_head: int = 8
    hidden: int = 14336
    rms_norm_eps: float = 1e-6
    window: int = 0  # how many positions each sees, its own among them; 0 for all

    def __post_init__(self) -> None:
        super().__post_init__()
        config_json.check_bounds(self, {"window": (0, config_json.MAX_CONTEXT)})
        if self.window >= self.context_length:  # one spelling of one model
            object.__setattr__(self, "window", 0)

    @classmethod
    def check_windows(cls, read: config_json.Reader, context_length: int) -> None:
        """Look at what says of layers how far they look back; ``own`` reads the window that all have."""
        read.require("use_sliding_window", False)
        read.require_full_layers()

    @classmethod
    def own(cls, read: config_json.Reader, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the window, and what all descendants have."""
        return super().own(read, values) | {"window": config_json.window(read, "sliding_window", _WINDOW)}

    def own_to_hf(self) -> dict[str, Any]:
        """Return the keys of config.json for what ``own`` reads."""
        return super().own_to_hf() | {"sliding_window": self.window or None}


def _sized(
    vocab_size: int, n_layer: int, width: int, hidden: int, theta: float, **more: Any
) -> MistralConfig:
    return MistralConfig(
        vocab_size=vocab_size,
        n_layer=n_layer,
        width=width,
        hidden=hidden,
        rope_theta=theta,
        rms_norm_eps=1e-5,
        **more,
    )


PRESETS = {
    "mistral-7b-v0.1": _sized(32000, 32, 4096, 14336, 1e4, context_length=32768, window=4096),
    "mistral-7b-v0.2": _sized(32000, 32, 4096, 14336, 1e6, context_length=32768),
    "mistral-7b-v0.3": _sized(32768, 32, 4096, 14336, 1e6, context_length=32768),
    "mistral-nemo-12b": _sized(131072, 40, 5120, 14336, 1e6, head_width=128),
    "mistral-small-24b": _sized(131072, 40, 5120, 32768, 1e8, head_width=128, context_length=32768),
}
PARAMETERS = {  # of the published files
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.2": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
}


class Mistral(Grouped):
    """A Mistral language model."""

    def attention(self, config: MistralConfig, layer: int) -> nn.Module:
        """Return a layer's attention."""
        return Attention(config, window=config.window or None)
