"""SmolLM3: LLaMA in which every fourth layer has no positions.

Bakouch et al., "SmolLM3: smol, multilingual, long-context reasoner", 2025 (huggingface.co/blog/smollm3); layers without
positions after Yang et al., "Rope to Nope and Back Again", 2025 (arXiv:2501.18795).

- layers 4, 8, 12, ... do not rotate queries and keys: they see which tokens there are, and only order by the others
- embedding and output are shared

B batch, T time, C width, P slots already in the cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor, nn

from portlm.errors import ConfigError
from portlm.files import shown
from portlm.models import config_json
from portlm.models.grouped import Attention, GatedMLP, Grouped, attend
from portlm.models.grouped_config import GroupedConfig
from portlm.models.layers import KeyValue


@dataclass(frozen=True)
class SmolLM3Config(GroupedConfig):
    """The shape of a SmolLM3 model. The defaults are transformers', which are SmolLM3-3B before its context grew.

    Raises:
        ConfigError: A value out of range, heads that do not divide the width or each other, or an odd D.
    """

    family = "smollm3"
    ARCHITECTURE = "SmolLM3ForCausalLM"
    NEEDS_KV_HEADS = True
    THETA = 2e6
    HARMLESS = ("pretraining_tp",)

    vocab_size: int = 128256
    context_length: int = 32768
    n_layer: int = 36
    n_head: int = 16
    n_kv_head: int = 4
    width: int = 2048
    rope_theta: float = 2e6
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = True
    attention_bias: bool = False  # of all four matrices of attention
    mlp_bias: bool = False
    unplaced_interval: int = 4  # every so-manieth layer has no positions; 0 for none

    def __post_init__(self) -> None:
        super().__post_init__()
        config_json.check_bounds(self, {"unplaced_interval": (0, config_json.MAX_LAYERS)})

    def rotates(self, layer: int) -> bool:
        """Say whether a layer, counted from 0, has positions."""
        return not self.unplaced_interval or (layer + 1) % self.unplaced_interval != 0

    @classmethod
    def tiny(cls) -> Self:
        """Return a configuration that tests compute in no time, whose second layer has no positions."""
        return replace(super().tiny(), unplaced_interval=2)

    @classmethod
    def check_windows(cls, read: config_json.Reader, context_length: int) -> None:
        """Accept only models whose sliding window is switched off; its size may stand there."""
        read.require_full_attention(context_length, switched=True)

    @classmethod
    def own(cls, read: config_json.Reader, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the biases and the layers without positions."""
        biases = {key: read.boolean(key, False) for key in ("attention_bias", "mlp_bias")}
        return super().own(read, values) | biases | {"unplaced_interval": _interval(read, values["n_layer"])}

    def own_to_hf(self) -> dict[str, Any]:
        """Return the keys of config.json for what ``own`` reads."""
        return super().own_to_hf() | {
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "no_rope_layers": [int(self.rotates(layer)) for layer in range(self.n_layer)],
        }


def _interval(read: config_json.Reader, n_layer: int) -> int:
    """Return the number of the first layer without positions: no_rope_layers, in spite of its name, has a 0 for it."""
    interval = read.integer("no_rope_layer_interval", 4)
    flags = read.raw(
        "no_rope_layers",
        "0 for every so-manieth layer and 1 for the others; by no_rope_layer_interval if missing",
    )
    if flags is None:
        if interval < 1:
            raise ConfigError(f"no_rope_layer_interval must be at least 1, got {interval}")
        return interval
    if not isinstance(flags, list) or any(type(flag) is not int for flag in flags):
        raise ConfigError(f"no_rope_layers must be a list of zeros and ones, got {shown(flags)}")
    interval = flags.index(0) + 1 if 0 in flags else 0
    by_turns = [int(not interval or (layer + 1) % interval != 0) for layer in range(len(flags))]
    if len(flags) != n_layer or flags != by_turns:
        raise ConfigError(
            f"no_rope_layers = {shown(flags)} is not supported: only {n_layer} ones, or a zero for every so-manieth "
            "layer, gives a model portlm computes"
        )
    return interval


PRESETS = {"smollm3-3b": SmolLM3Config(context_length=65536, rope_theta=5e6)}
PARAMETERS = {"smollm3-3b": 3_075_098_624}  # of the published file


class Unplaced(Attention):
    """Attention without positions."""

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue | None]:
        """Attend from x (B, T, C), within x alone or, given a cache, to its P slots as well."""
        q, k, v = self.project(x)
        return attend(self.o_proj, q, k, v, mask, past)


class SmolLM3(Grouped):
    """A SmolLM3 language model."""

    def attention(self, config: SmolLM3Config, layer: int) -> nn.Module:
        """Return a layer's attention."""
        kind = Attention if config.rotates(layer) else Unplaced
        return kind(config, bias=config.attention_bias, out_bias=config.attention_bias)

    def mlp(self, config: SmolLM3Config) -> nn.Module:
        """Return a layer's perceptron."""
        return GatedMLP(config.width, config.hidden, bias=config.mlp_bias)
