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
from portlm.models.layers import KeyValue, Linear
from portlm.models.within import attend_within
from portlm.ops.cached_attention import cached_attention

GLOBAL, LOCAL = "global", "local"
_BOUNDS = {
    "vocab_size": (1, config_json.MAX_VOCAB),
    "context_length": (1, config_json.MAX_CONTEXT),
    "n_layer": (1, config_json.MAX_LAYERS),
    "n_head": (1, config_json.MAX_HEADS),
    "width": (1, config_json.MAX_WIDTH),
    "hidden": (1, config_json.MAX_HIDDEN),
    "window": (1, config_json.MAX_CONTEXT),
    "dropout": (0.0, 0.99),
    "layer_norm_eps": (1e-12, 0.1),
    "init_std": (0.0, 1.0),
}


@dataclass(frozen=True)
class GPTNeoConfig:
    """The shape of a GPT-Neo model. The defaults are transformers', which are GPT-Neo 1.3B.

    Raises:
        ConfigError: A value out of range, or a width that the heads do not divide.
    """

    family: ClassVar[str] = "gpt_neo"
    # What [model] of a training run may set, and what it is for a small model on a CPU.
    SETTINGS: ClassVar[dict[str, Any]] = {
        "n_layer": 4,
        "n_head": 4,
        "width": 128,
        "context_length": 64,  # tokens the model sees at once
        "window": 16,  # positions that a token sees in every other layer, itself among them
        "dropout": 0.0,
    }

    vocab_size: int = 50257
    context_length: int = 2048  # longest sequence, and the number of learned positions
    n_layer: int = 24
    n_head: int = 16
    width: int = 2048
    hidden: int = 8192  # inner width of the MLP
    layers: tuple[str, ...] = (GLOBAL, LOCAL)  # what they see, in turn
    window: int = 256  # how many positions a local layer sees
    dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    gelu: config_json.Gelu = "tanh"
    init_std: float = 0.02
    bos_token_id: int | None = None  # this and the next two are not computed with, only kept with the model
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        config_json.check_bounds(self, _BOUNDS)
        if self.width % self.n_head:
            raise ConfigError(f"width {self.width} must be a multiple of n_head {self.n_head}")
        if self.gelu not in ("tanh", "none"):
            raise ConfigError(f"gelu must be tanh or none, got {self.gelu!r}")
        if not self.layers or not {GLOBAL, LOCAL}.issuperset(self.layers):
            raise ConfigError(f"layers must be some of {GLOBAL} and {LOCAL}, got {shown(self.layers)}")
        config_json.check_token_ids(self)
        object.__setattr__(self, "layers", config_json.in_turn(self.kinds))

    @property
    def kinds(self) -> list[str]:
        """What each layer sees."""
        return [self.layers[i % len(self.layers)] for i in range(self.n_layer)]

    @property
    def head_dim(self) -> int:
        """D, the width of one head."""
        return self.width // self.n_head

    @property
    def n_kv_head(self) -> int:
        """Every query head has its own key and value head."""
        return self.n_head

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

    @classmethod
    def from_hf(cls, data: Mapping[str, Any] | config_json.Reader) -> Self:
        """Read the contents of a Hugging Face config.json, strictly.

        Raises:
            ConfigError: A key that is missing, unknown, out of range or asks for another model. It is named.
        """
        read = config_json.Reader.of(data)
        read.require("model_type", cls.family)
        vocab_size, width = read.integer("vocab_size", 50257), read.integer("hidden_size", 2048)
        n_layer = read.integer("num_layers", 24, also="num_hidden_layers")
        dropout = read.number("resid_dropout", 0.0)
        read.training(
            "embed_dropout", 0.0, kept=dropout, why="portlm drops at one rate, that of resid_dropout"
        )
        read.training("attention_dropout", 0.0)
        read.require("tie_word_embeddings", True)
        context = read.integer("max_position_embeddings", 2048)
        read.require_full_attention(context)  # in the words of others; window_size is GPT-Neo's
        config = cls(
            vocab_size=vocab_size,
            context_length=context,
            n_layer=n_layer,
            n_head=read.integer("num_heads", 16, also="num_attention_heads"),
            width=width,
            hidden=read.integer("intermediate_size", 4 * width, says="4 times hidden_size"),
            layers=_layers(read, n_layer),
            window=read.integer("window_size", 256),
            dropout=dropout,
            layer_norm_eps=read.number("layer_norm_epsilon", 1e-5),
            gelu=read.choice("activation_function", "gelu_new", config_json.GELU),
            init_std=read.number("initializer_range", 0.02),
            bos_token_id=read.token_id("bos_token_id", vocab_size),
            eos_token_ids=read.token_ids("eos_token_id", vocab_size),
            pad_token_id=read.token_id("pad_token_id", vocab_size),
        )
        read.finish(
            "classifier_dropout",
            "summary_type",
            "summary_use_proj",
            "summary_activation",
            "summary_proj_to_labels",
            "summary_first_dropout",
        )
        return config

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json that transformers opens as GPTNeoForCausalLM."""
        return {
            "architectures": ["GPTNeoForCausalLM"],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.context_length,
            "num_layers": self.n_layer,
            "num_heads": self.n_head,
            "hidden_size": self.width,
            "intermediate_size": self.hidden,
            "attention_types": [[self.kinds, 1]],
            "attention_layers": self.kinds,
            "window_size": self.window,
            "activation_function": "gelu_new" if self.gelu == "tanh" else "gelu",
            "layer_norm_epsilon": self.layer_norm_eps,
            "resid_dropout": self.dropout,
            "embed_dropout": self.dropout,
            "attention_dropout": 0.0,
            "initializer_range": self.init_std,
            "tie_word_embeddings": True,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": config_json.one_or_list(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
        }


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
