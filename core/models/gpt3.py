"""GPT-3: GPT-2 in which every other layer looks back only a part of the way.

Brown et al., "Language Models are Few-Shot Learners", 2020 (arXiv:2005.14165), section 2.1: "we use alternating dense
and locally banded sparse attention patterns in the layers of the transformer, similar to the Sparse Transformer" (Child
et al., 2019, arXiv:1904.10509).

- the first layer and every second one after it is dense, the others see the last ``window`` positions
- twice the context

The width of the band was not published: the presets have 256, that of GPT-Neo, which was made after this paper. Two
rows of the paper's table contradict themselves and are read so that the number of parameters is the paper's: XL has 16
heads (24 of 128 are not 2048), and 13B has a width of 5120 (5140 is not 40 times 128). transformers has no class for
it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn

from portlm.models import config_json
from portlm.models.gpt2 import GPT2, Attention, GPT2Config
from portlm.models.keyed_config import Key


@dataclass(frozen=True)
class GPT3Config(GPT2Config):
    """The shape of a GPT-3 model. The defaults are the smallest of the paper's.

    Raises:
        ConfigError: A value out of range, or a width that the heads do not divide.
    """

    family: ClassVar[str] = "gpt3"
    ARCHITECTURE: ClassVar[str] = "GPT3LMHeadModel"
    SETTINGS: ClassVar[dict[str, Any]] = {
        **GPT2Config.SETTINGS,
        "window": 16,  # positions that a token sees in every other layer, itself among them; 0 for all
    }

    KEYS: ClassVar[Mapping[str, Key]] = {
        **GPT2Config.KEYS,
        "context_length": GPT2Config.KEYS["context_length"]._replace(missing=1024),
        "window": Key(
            "window_size", (0, config_json.MAX_CONTEXT),
            read=lambda read, values: config_json.window(read, "window_size", 256), write=lambda n: n or None,
        ),
    }  # fmt: skip

    context_length: int = 2048
    window: int = 256  # of every other layer; 0 for none

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window >= self.context_length:  # one spelling of one model
            object.__setattr__(self, "window", 0)

    @classmethod
    def tiny(cls) -> Self:
        """Return a configuration that tests compute in no time, whose band is narrower than the context."""
        return cls(
            vocab_size=259, context_length=32, n_layer=2, n_head=4, width=24, window=5, eos_token_ids=(256,)
        )


def _sized(n_layer: int, n_head: int, width: int) -> GPT3Config:
    return GPT3Config(n_layer=n_layer, n_head=n_head, width=width)


PRESETS = {
    "gpt3-small": _sized(12, 12, 768),
    "gpt3-medium": _sized(24, 16, 1024),
    "gpt3-large": _sized(24, 16, 1536),
    "gpt3-xl": _sized(24, 16, 2048),
    "gpt3-2.7b": _sized(32, 32, 2560),
    "gpt3-6.7b": _sized(32, 32, 4096),
    "gpt3-13b": _sized(40, 40, 5120),
    "gpt3-175b": _sized(96, 96, 12288),
}
PARAMETERS = {  # of the shapes; the paper prints them in millions: 125, 356, 760, 1320, 2650, 6660, 12850, 174600
    "gpt3-small": 125_226_240,
    "gpt3-medium": 355_871_744,
    "gpt3-large": 760_300_032,
    "gpt3-xl": 1_315_723_264,
    "gpt3-2.7b": 2_651_553_280,
    "gpt3-6.7b": 6_658_404_352,
    "gpt3-13b": 12_853_386_240,
    "gpt3-175b": 174_604_259_328,
}


class GPT3(GPT2):
    """A GPT-3 language model."""

    def attention(self, config: GPT3Config, layer: int) -> nn.Module:
        """Return a layer's attention: banded in the second, the fourth and so on."""
        return Attention(config, (config.window or None) if layer % 2 else None)
