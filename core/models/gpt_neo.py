"""GPT-Neo: GPT-3's shapes with layers that look back everywhere and layers that see a window.

Black et al., "GPT-Neo: Large Scale Autoregressive Language Modeling with Mesh-Tensorflow", 2021
(doi:10.5281/zenodo.5297715).

- scores are not divided by sqrt(D)
- queries, keys and values have a matrix each, and no biases
- layers are "global" or "local" in turn; local ones see the last 256 positions

B batch, T time, C width, H heads, D = C / H head width, P slots already in the cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from portlm.errors import ConfigError
from portlm.files import shown
from portlm.models import config_json
from portlm.models.gpt2 import GPT2
from portlm.models.gpt_config import SUMMARY, GPTConfig
from portlm.models.keyed_config import Key
from portlm.models.layers import KeyValue, Linear
from portlm.models.within import attend_within
from portlm.ops.cached_attention import cached_attention

GLOBAL, LOCAL = "global", "local"


@dataclass(frozen=True)
class GPTNeoConfig(GPTConfig):
    """The shape of a GPT-Neo model. The defaults are transformers', which are GPT-Neo 1.3B.

    Raises:
        ConfigError: A value out of range, or a width that the heads do not divide.
    """

    family: ClassVar[str] = "gpt_neo"
    ARCHITECTURE: ClassVar[str] = "GPTNeoForCausalLM"
    DROPOUTS: ClassVar[tuple[str, str]] = ("embed_dropout", "attention_dropout")
    MISSING_RATE: ClassVar[float] = 0.0
    KEYS: ClassVar[Mapping[str, Key]] = {
        "vocab_size": Key("vocab_size"),
        "width": Key("hidden_size"),
        "n_layer": Key("num_layers", also="num_hidden_layers"),
        "dropout": Key("resid_dropout"),
        "context_length": Key("max_position_embeddings"),
        "n_head": Key("num_heads", also="num_attention_heads"),
        "hidden": Key(
            "intermediate_size", missing=lambda values: 4 * values["width"], says="4 times hidden_size"
        ),
        "layers": Key("attention_types", read=lambda read, values: _layers(read, values["n_layer"])),
        "window": Key("window_size", (1, config_json.MAX_CONTEXT)),
        "layer_norm_eps": Key("layer_norm_epsilon"),
        "gelu": Key("activation_function", choices=config_json.GELU),
        "init_std": Key("initializer_range"),
    }
    HARMLESS: ClassVar[tuple[str, ...]] = ("classifier_dropout", *SUMMARY)
    SETTINGS: ClassVar[dict[str, Any]] = {
        **GPTConfig.SETTINGS,
        "window": 16,  # positions that a token sees in every other layer, itself among them
    }

    context_length: int = 2048
    n_layer: int = 24
    n_head: int = 16
    width: int = 2048
    hidden: int = 8192  # inner width of the MLP
    layers: tuple[str, ...] = (GLOBAL, LOCAL)  # what they see, in turn
    window: int = 256  # how many positions a local layer sees
    gelu: config_json.Gelu = "tanh"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gelu not in ("tanh", "none"):
            raise ConfigError(f"gelu must be tanh or none, got {self.gelu!r}")
        if not self.layers or not {GLOBAL, LOCAL}.issuperset(self.layers):
            raise ConfigError(f"layers must be some of {GLOBAL} and {LOCAL}, got {shown(self.layers)}")
        object.__setattr__(self, "layers", config_json.in_turn(self.kinds))

    @property
    def kinds(self) -> list[str]:
        """What each layer sees."""
        return [self.layers[i % len(self.layers)] for i in range(self.n_layer)]

    @classmethod
    def from_settings(cls, **values: Any) -> Self:
        """Return the configuration for values of SETTINGS and of the vocabulary.

        Raises:
            ConfigError: A value out of range, by name.
        """
        return cls(**values, hidden=max(4 * values["width"], 1))

    @classmethod
    def tiny(cls) -> Self:
        """Return a configuration that tests compute in no time, whose window is smaller than the context."""
        return cls(
            vocab_size=259,
            context_length=32,
            n_layer=2,
            n_head=4,
            width=24,
            hidden=44,
            window=5,
            eos_token_ids=(256,),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json that transformers opens as GPTNeoForCausalLM."""
        return super().to_hf() | {"attention_types": [[self.kinds, 1]], "attention_layers": self.kinds}


def _layers(read: config_json.Reader, n_layer: int) -> tuple[str, ...]:
    """Return what the layers see, said once as kinds in turn and how often, and maybe again as a list."""
    groups = read.raw(
        "attention_types", 'pairs of "global" or "local" layers in turn, and how often; 12 times both'
    )
    kinds = read.raw("attention_layers", "the same, layer by layer")
    found: list[Any] = []
    pairs: Any = [[[GLOBAL, LOCAL], 12]] if groups is None else groups
    try:
        for turn, times in pairs:
            found += turn * (times if type(times) is int and 0 < times <= config_json.MAX_LAYERS else 0)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"attention_types must be pairs of layers and a number, got {shown(groups)}"
        ) from error
    if len(found) != n_layer or not all(kind in (GLOBAL, LOCAL) for kind in found):
        raise ConfigError(
            f"attention_types must be {n_layer} layers, each global or local, got {shown(groups)}"
        )
    if kinds is not None and kinds != found:
        raise ConfigError(f"attention_layers = {shown(kinds)} contradicts attention_types = {shown(groups)}")
    return tuple(found)


def _sized(n_layer: int, n_head: int, width: int) -> GPTNeoConfig:
    ids: dict[str, Any] = {"bos_token_id": 50256, "eos_token_ids": (50256,)}
    return GPTNeoConfig(n_layer=n_layer, n_head=n_head, width=width, hidden=4 * width, **ids)


PRESETS = {
    "gpt-neo-125m": _sized(12, 12, 768),
    "gpt-neo-1.3b": _sized(24, 16, 2048),
    "gpt-neo-2.7b": _sized(32, 20, 2560),
}
PARAMETERS = {  # of the published shapes
    "gpt-neo-125m": 125_198_592,
    "gpt-neo-1.3b": 1_315_575_808,
    "gpt-neo-2.7b": 2_651_307_520,
}


class SelfAttention(nn.Module):
    """Masked self-attention without a scale, over all positions or the last of them that a window shows."""

    def __init__(self, config: GPTNeoConfig, window: int | None):
        super().__init__()
        self.head_dim, self.window = config.head_dim, window
        self.k_proj = Linear(config.width, config.width, bias=False)
        self.v_proj = Linear(config.width, config.width, bias=False)
        self.q_proj = Linear(config.width, config.width, bias=False)
        self.out_proj = Linear(config.width, config.width, bias=True)

    def forward(
        self, x: Tensor, mask: Tensor | None, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue | None]:
        """Attend from x (B, T, C), within x alone or, given a cache, to its P slots as well."""
        B, T, _ = x.shape
        q, k, v = (p(x).view(B, T, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        if past is None:
            y = attend_within(q, k, v, mask, scale=1.0, window=self.window)
            return self.out_proj(y.flatten(2)), None
        y, key, value = cached_attention(q, k, v, *past, mask, scale=1.0, window=self.window)
        return self.out_proj(y.flatten(2)), (key, value)


class Attention(nn.Module):
    """The same under the name that it has in files."""

    def __init__(self, config: GPTNeoConfig, window: int | None):
        super().__init__()
        self.attention = SelfAttention(config, window)

    def forward(
        self, x: Tensor, mask: Tensor | None, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue | None]:
        """Attend as SelfAttention does."""
        result: tuple[Tensor, KeyValue | None] = self.attention(x, mask, past)
        return result


class GPTNeo(GPT2):
    """A GPT-Neo language model."""

    CONSTANTS = (".attn.attention.bias", ".attn.attention.masked_bias")

    def attention(self, config: GPTNeoConfig, layer: int) -> nn.Module:
        """Return a layer's attention."""
        return Attention(config, config.window if config.kinds[layer] == LOCAL else None)

    def std(self, name: str, parameter: Tensor) -> float:
        """Return the spread of a fresh matrix, the same for all."""
        std: float = self.config.init_std
        return std

    @classmethod
    def hf_name(cls, name: str) -> tuple[str, bool]:
        """Return the name of a parameter in Hugging Face's files, where none is transposed."""
        return super().hf_name(name)[0], False
