"""Qwen2 and Qwen2.5: LLaMA with biases on queries, keys and values.

Yang et al., "Qwen2 Technical Report", 2024 (arXiv:2407.10671), and "Qwen2.5 Technical Report" (arXiv:2412.15115).

- q, k and v have biases, and nothing else has
- a base of a million for the rotary frequencies, and the small sizes share embedding and output

transformers can give the upper layers a sliding window; no published size has it switched on, and it is refused.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from portlm.models import config_json
from portlm.models.grouped import Attention, Grouped
from portlm.models.grouped_config import GroupedConfig


@dataclass(frozen=True)
class Qwen2Config(GroupedConfig):
    """The shape of a Qwen2 model. The defaults are transformers'.

    Raises:
        ConfigError: A value out of range, heads that do not divide the width or each other, or an odd D.
    """

    family = "qwen2"
    ARCHITECTURE = "Qwen2ForCausalLM"
    NEEDS_KV_HEADS = True

    vocab_size: int = 151936
    context_length: int = 32768
    hidden: int = 22016
    rms_norm_eps: float = 1e-6

    @classmethod
    def check_windows(cls, read: config_json.Reader, context_length: int) -> None:
        """Accept only models whose sliding window is switched off; its size may stand there."""
        read.require_full_attention(context_length, switched=True)


def _sized(n_layer: int, n_head: int, n_kv_head: int, width: int, hidden: int, **more: Any) -> Qwen2Config:
    return Qwen2Config(
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=n_kv_head,
        width=width,
        hidden=hidden,
        rope_theta=1e6,
        **more,
    )


_SMALL: dict[str, Any] = {"tie_embeddings": True}
_LARGE: dict[str, Any] = {"vocab_size": 152064}
_LONG: dict[str, Any] = {"context_length": 131072}
PRESETS = {
    "qwen2-0.5b": _sized(24, 14, 2, 896, 4864, **_SMALL, **_LONG),
    "qwen2-1.5b": _sized(28, 12, 2, 1536, 8960, **_SMALL, **_LONG),
    "qwen2-7b": _sized(28, 28, 4, 3584, 18944, **_LARGE, **_LONG),
    "qwen2-72b": _sized(80, 64, 8, 8192, 29568, **_LARGE, **_LONG),
    "qwen2.5-3b": _sized(36, 16, 2, 2048, 11008, **_SMALL),
    "qwen2.5-14b": _sized(48, 40, 8, 5120, 13824, rms_norm_eps=1e-5, **_LARGE, **_LONG),
    "qwen2.5-32b": _sized(64, 40, 8, 5120, 27648, rms_norm_eps=1e-5, **_LARGE, **_LONG),
}
PARAMETERS = {  # of the published files
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
}


class Qwen2(Grouped):
    """A Qwen2 language model."""

    def attention(self, config: Qwen2Config, layer: int) -> nn.Module:
        """Return a layer's attention."""
        return Attention(config, bias=True)
