"""OPT: GPT-2 with ReLU, and its matrices for queries, keys and values apart.

Zhang et al., "OPT: Open Pre-trained Transformer Language Models", 2022 (arXiv:2205.01068).

- ReLU between the two maps of the perceptron
- q, k and v come of three matrices with biases
- the learned table of positions has two rows in front that no position reads, as fairseq's padding had it

OPT-350M alone puts its norms behind the sublayers (``norm_first`` false), has none at the end, and projects tokens of
``token_width`` to the width of its layers and back.

B batch, T time, C width, E width of a token's row, H heads, D = C / H head width, P slots already in the cache.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from portlm.errors import ConfigError
from portlm.models import config_json
from portlm.models.causal import Causal, Parts
from portlm.models.gpt_config import LearnedConfig
from portlm.models.grouped import attend
from portlm.models.keyed_config import Key
from portlm.models.layers import Embedding, KeyValue, LayerNorm, Linear, drop
from portlm.ops.embedding import embedding

_EPS = 1e-5  # of every norm; config.json has no key for it
_UNREAD = 2  # rows in front of the table of positions


@dataclass(frozen=True)
class OPTConfig(LearnedConfig):
    """The shape of an OPT model. The defaults are OPT-125M, but for ``init_std``, which is transformers'.

    Weights begin as N(0, s²), and as N(0, s²/2L) in the two maps that write to the residual stream; biases as 0. The
    presets have the paper's s.

    Raises:
        ConfigError: A value out of range, or a width that the heads do not divide.
    """

    family: ClassVar[str] = "opt"
    ARCHITECTURE: ClassVar[str] = "OPTForCausalLM"
    KEYS: ClassVar[Mapping[str, Key]] = {
        "vocab_size": Key("vocab_size"),
        "width": Key("hidden_size"),
        "context_length": Key("max_position_embeddings"),
        "norm_first": Key("do_layer_norm_before"),
        "n_layer": Key("num_hidden_layers"),
        "n_head": Key("num_attention_heads"),
        "hidden": Key("ffn_dim"),
        "token_width": Key(
            "word_embed_proj_dim", (0, config_json.MAX_WIDTH), missing=lambda values: values["width"],
            says="hidden_size",
        ),
        "dropout": Key("dropout", missing=0.1),
        "init_std": Key("init_std"),
    }  # fmt: skip
    FIXED: ClassVar[Mapping[str, Any]] = {"activation_function": "relu", **LearnedConfig.FIXED}
    SETTINGS: ClassVar[dict[str, Any]] = {
        **LearnedConfig.SETTINGS,
        "hidden": 0,  # width of the feed-forward layer; 0 means 4 times the width
    }

    vocab_size: int = 50272
    context_length: int = 2048
    hidden: int = 3072  # inner width of the perceptron
    token_width: int = 0  # E; 0 for the width
    norm_first: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.token_width == self.width:  # one spelling of one shape
            object.__setattr__(self, "token_width", 0)
        if self.norm_first == bool(self.token_width):
            raise ConfigError(
                f"norm_first {self.norm_first} and token_width {self.embedding_width} of width {self.width} do not go "
                "together: OPT-350M alone has its norms behind the sublayers, and it alone projects its tokens"
            )

    @property
    def embedding_width(self) -> int:
        """E, the width of a token's row in the table."""
        return self.token_width or self.width

    @classmethod
    def from_settings(cls, **values: Any) -> Self:
        """Return the configuration for values of SETTINGS and of the vocabulary; 0 stands for what follows from others.

        Raises:
            ConfigError: A value out of range, by name.
        """
        return cls(**values | {"hidden": values["hidden"] or 4 * values["width"]})

    @classmethod
    def tiny(cls) -> Self:
        """Return a configuration that tests compute in no time: a vocabulary of bytes, odd widths."""
        return cls(
            vocab_size=259, context_length=32, n_layer=2, n_head=4, width=24, hidden=44, eos_token_ids=(256,)
        )

    @classmethod
    def check(cls, read: config_json.Reader, values: Mapping[str, Any]) -> None:
        """Look at what no published model has, and at the other rates of dropout."""
        super().check(read, values)
        read.require("enable_bias", True)
        read.require("layer_norm_elementwise_affine", True)
        there = (False,) if values["norm_first"] else (False, True)
        read.require("_remove_final_layer_norm", *there, says="false")
        for key in ("attention_dropout", "activation_dropout", "layerdrop"):
            read.training(key, 0.0)

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json that transformers opens as OPTForCausalLM."""
        rates = {"attention_dropout": 0.0, "layerdrop": 0.0}
        return super().to_hf() | {"word_embed_proj_dim": self.embedding_width, **rates}


def _sized(n_layer: int, n_head: int, width: int, **more: Any) -> OPTConfig:
    return OPTConfig(
        n_layer=n_layer, n_head=n_head, width=width, hidden=4 * width, dropout=0.1, init_std=0.006, **more
    )


PRESETS = {
    "opt-125m": _sized(12, 12, 768),
    "opt-350m": _sized(24, 16, 1024, token_width=512, norm_first=False),
    "opt-1.3b": _sized(24, 32, 2048),
    "opt-2.7b": _sized(32, 32, 2560),
    "opt-6.7b": _sized(32, 32, 4096),
    "opt-13b": _sized(40, 40, 5120),
    "opt-30b": _sized(48, 56, 7168),
}
PARAMETERS = {  # of the published files, the shared embedding counted once
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
}


class Attention(nn.Module):
    """Masked self-attention: position t looks at positions 0..t."""

    def __init__(self, config: OPTConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (
            Linear(config.width, config.width, bias=True) for _ in range(4)
        )

    def forward(
        self, x: Tensor, mask: Tensor | None, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue | None]:
        """Attend from x (B, T, C), within x alone or, given a cache, to its P slots as well."""
        B, T, _ = x.shape
        q, k, v = (m(x).view(B, T, -1, self.head_dim) for m in (self.q_proj, self.k_proj, self.v_proj))
        return attend(self.out_proj, q, k, v, mask, past)


class Block(nn.Module):
    """One layer. h is the residual stream and x what the next norm still has to add to it."""

    def __init__(self, config: OPTConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.self_attn_layer_norm = LayerNorm(config.width, _EPS)
        self.fc1 = Linear(config.width, config.hidden, bias=True)
        self.fc2 = Linear(config.hidden, config.width, bias=True)
        self.final_layer_norm = LayerNorm(config.width, _EPS)
        self.dropout, self.norm_first = config.dropout, config.norm_first

    def mlp(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        return self.fc2(self.fc1(x).relu())

    def forward(
        self, x: Tensor, h: Tensor | None, mask: Tensor | None = None, past: KeyValue | None = None
    ) -> tuple[Tensor, Tensor | None, KeyValue | None]:
        """Map (x, h), both (B, T, C), to the same for the next layer. h is None before the first.

        Without ``norm_first`` it is None after each, too: norms behind the sublayers leave nothing to add.
        """
        if self.norm_first:
            y, h = self.self_attn_layer_norm(x, h)
            x, present = self.self_attn(y, mask, past)
            y, h = self.final_layer_norm(drop(x, self.dropout, self.training), h)
            return drop(self.mlp(y), self.dropout, self.training), h, present
        y, present = self.self_attn(x, mask, past)
        x, _ = self.self_attn_layer_norm(drop(y, self.dropout, self.training), x)
        y, _ = self.final_layer_norm(drop(self.mlp(x), self.dropout, self.training), x)
        return y, None, present


class Projection(Linear):
    """What follows the last block of OPT-350M: no norm, but a map to the width of tokens."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, None]:  # type: ignore[override]
        """Return (..., E) for x (..., C), to which nothing is left to be added."""
        return super().forward(x), None


class OPT(Causal):
    """An OPT language model with randomly initialised weights.

    Args:
        config: Its shape.
        init: False leaves the parameters uninitialised, for a caller that fills them all.
    """

    PARTS = Parts("embed_tokens", "layers", "final_layer_norm", "lm_head", "model.decoder.")
    embed_tokens: Embedding
    embed_positions: Embedding
    project_in: Linear  # only with token_width

    def __init__(self, config: OPTConfig, *, init: bool = True):
        super().__init__()
        more: list[tuple[str, nn.Module]] = [
            ("embed_positions", Embedding(_UNREAD + config.context_length, config.width))
        ]
        last: nn.Module = LayerNorm(config.width, _EPS)
        if config.token_width:
            more.append(("project_in", Linear(config.token_width, config.width, bias=False)))
            last = Projection(config.width, config.token_width, bias=False)
            self.PARTS = self.PARTS._replace(norm="project_out")  # type: ignore[misc]
        self.assemble(config, [Block(config) for _ in range(config.n_layer)], last, *more)
        if init:
            self.init_weights()

    def embed(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        """Return the sum of both tables' rows, (B, T, C), tokens as wide as the layers."""
        x = self.embed_tokens(input_ids)
        if self.config.token_width:
            x = self.project_in(x)
        _, table = self.embed_positions.weight.split((_UNREAD, self.config.context_length))
        places = table[: input_ids.shape[1]] if position_ids is None else embedding(position_ids, table)
        return drop(x + places, self.config.dropout, self.training)

    def carried(self, tokens: int, position_ids: Tensor | None) -> tuple[Tensor, ...]:
        """Return nothing: positions are in the stream."""
        return ()

    def std(self, name: str, parameter: Tensor) -> float:
        """Return the spread of a fresh matrix, smaller by sqrt(2 L) where it writes to the stream."""
        spread: float = self.config.init_std
        writes = name.startswith("layers.") and name.endswith(("out_proj.weight", "fc2.weight"))
        return spread / math.sqrt(2 * self.config.n_layer) if writes else spread

    @classmethod
    def hf_alias(cls, name: str) -> str | None:
        """Return the usual name of a tensor in a foreign file. Those of the bare model begin with ``decoder.``."""
        return super().hf_alias(f"model.{name}" if name.startswith("decoder.") else name)
