"""Qwen3, the sizes with experts: a norm on every query and key, and many small perceptrons of which a token takes some.

Yang et al., "Qwen3 Technical Report", 2025 (arXiv:2505.09388).

- 128 experts, eight for each token, whose weights add up to 1 where ``norm_topk_prob``, and to less otherwise
- experts in every ``decoder_sparse_step``-th layer but the ``mlp_only_layers``; the others have one wide perceptron
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import nn

from portlm.errors import ConfigError
from portlm.files import shown
from portlm.models import config_json
from portlm.models.mixture import Mixture, MixtureConfig
from portlm.models.qwen3 import NormedAttention


@dataclass(frozen=True)
class Qwen3MoeConfig(MixtureConfig):
    """The shape of such a Qwen3 model. The defaults are transformers'.

    Raises:
        ConfigError: A value out of range, heads that do not divide the width or each other, or an odd D.
    """

    family = "qwen3_moe"
    ARCHITECTURE = "Qwen3MoeForCausalLM"
    NEEDS_KV_HEADS = True
    EXPERTS = ("num_experts", "num_local_experts")
    HIDDEN = "expert_hidden"
    SETTINGS = MixtureConfig.SETTINGS | {
        "expert_hidden": 0  # inner width of an expert; 0 for hidden's share of each of a token's experts
    }

    vocab_size: int = 151936
    context_length: int = 32768
    n_layer: int = 24
    n_kv_head: int = 4
    width: int = 2048
    hidden: int = 6144  # inner width of the perceptron of layers without experts
    expert_hidden: int = 768
    n_expert: int = 128
    experts_per_token: int = 8
    norm_topk_prob: bool = False  # whether the weights of a token's experts add up to 1
    sparse_step: int = 1  # every so many layers one has experts
    dense_layers: tuple[int, ...] = ()  # layers that have none all the same
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False  # of all four matrices of attention

    def __post_init__(self) -> None:
        super().__post_init__()
        config_json.check_bounds(self, {"sparse_step": (1, config_json.MAX_LAYERS)})
        wrong = [n for n in self.dense_layers if type(n) is not int or not 0 <= n < self.n_layer]
        if wrong:
            raise ConfigError(
                f"dense_layers holds {shown(wrong[0])}, but layers run from 0 to {self.n_layer - 1}"
            )
        object.__setattr__(self, "dense_layers", tuple(sorted(set(self.dense_layers))))

    @property
    def normalizes(self) -> bool:
        """Whether the weights of a token's experts add up to 1."""
        return self.norm_topk_prob

    @classmethod
    def tiny(cls) -> Self:
        """Return a configuration that tests compute in no time: one layer with experts, and one without."""
        return replace(
            super().tiny(),
            head_width=16,
            hidden=40,
            expert_hidden=24,
            n_expert=4,
            experts_per_token=2,
            dense_layers=(0,),
        )

    @classmethod
    def check_windows(cls, read: config_json.Reader, context_length: int) -> None:
        """Accept only models whose sliding window is switched off; its size may stand there."""
        read.require_full_attention(context_length, switched=True)

    @classmethod
    def own(cls, read: config_json.Reader, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return which layers have experts, and what all mixtures have."""
        layers = read.raw("mlp_only_layers", "a list of layers without experts")
        last = values["n_layer"] - 1
        if layers is not None and (
            not isinstance(layers, list) or any(type(n) is not int or not 0 <= n <= last for n in layers)
        ):
            raise ConfigError(
                f"mlp_only_layers must be a list of layers from 0 to {last}, got {shown(layers)}"
            )
        return super().own(read, values) | {
            "expert_hidden": read.integer("moe_intermediate_size", 768),
            "norm_topk_prob": read.boolean("norm_topk_prob", False),
            "sparse_step": read.integer("decoder_sparse_step", 1),
            "dense_layers": tuple(layers or ()),
            "attention_bias": read.boolean("attention_bias", False),
        }

    def own_to_hf(self) -> dict[str, Any]:
        """Return the keys of config.json for what ``own`` reads."""
        return super().own_to_hf() | {
            "moe_intermediate_size": self.expert_hidden,
            "norm_topk_prob": self.norm_topk_prob,
            "decoder_sparse_step": self.sparse_step,
            "mlp_only_layers": list(self.dense_layers),
            "attention_bias": self.attention_bias,
        }


def _sized(n_layer: int, n_head: int, width: int, hidden: int, expert_hidden: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        context_length=40960,
        n_layer=n_layer,
        n_head=n_head,
        width=width,
        hidden=hidden,
        expert_hidden=expert_hidden,
        head_width=128,
        rope_theta=1e6,
        norm_topk_prob=True,
    )


PRESETS = {
    "qwen3-30b-a3b": _sized(48, 32, 2048, 6144, 768),
    "qwen3-235b-a22b": _sized(94, 64, 4096, 12288, 1536),
}
PARAMETERS = {  # V C (2) + C + layers (2 C + 2 D + 2 C H D + 2 C K D + E C + 3 E C F), computed and not read from files
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
}


class Qwen3Moe(Mixture):
    """A Qwen3 language model with experts."""

    def is_routed(self, config: Qwen3MoeConfig, layer: int) -> bool:
        """Say whether a layer has experts."""
        return layer not in config.dense_layers and (layer + 1) % config.sparse_step == 0

    def attention(self, config: Qwen3MoeConfig, layer: int) -> nn.Module:
        """Return a layer's attention."""
        return NormedAttention(config)
