"""GPT-2: the decoder of "Attention Is All You Need" (Vaswani et al., 2017) with five changes.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, and the code released with it.

- no encoder, so no cross-attention: a block is masked self-attention and a two-layer MLP
- LayerNorm in front of each sublayer instead of behind it, and one more after the last block
- learned positions instead of sinusoids
- GELU, in its tanh form, instead of ReLU
- the output layer is the token embedding itself, and no factor of sqrt(C) anywhere

B batch, T time, C width, H heads, D = C / H head width, P slots already in the cache, V vocabulary.

The presets are the four published sizes. GPT-3's are in gpt3.py: every other of its layers sees a window.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, Self

from torch import Tensor, nn

from portlm.errors import ConfigError
from portlm.models import config_json
from portlm.models.causal import Causal, Parts
from portlm.models.layers import Embedding, KeyValue, LayerNorm, Linear, drop
from portlm.models.within import attend_within
from portlm.ops.attention import attention_qkv
from portlm.ops.cached_attention import cached_attention
from portlm.ops.gelu_mlp import gelu_mlp

_BOUNDS = {
    "vocab_size": (1, config_json.MAX_VOCAB),
    "context_length": (1, config_json.MAX_CONTEXT),
    "n_layer": (1, config_json.MAX_LAYERS),
    "n_head": (1, config_json.MAX_HEADS),
    "width": (1, config_json.MAX_WIDTH),
    "dropout": (0.0, 0.99),
    "layer_norm_eps": (1e-12, 0.1),
    "init_std": (0.0, 1.0),
}
Init = Literal["scaled", "released", "preferences"]
_INITS: dict[str, Init] = {"scaled": "scaled", "released": "released", "preferences": "preferences"}


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2 model, and how its weights begin.

    Three initialisations were published for the same architecture, all with biases 0 and gains 1:

    - ``scaled``: N(0, s²), and N(0, s²/2L) for the two projections that write to the residual stream, so
      that its variance does not grow with depth. The paper's words, as Hugging Face and Megatron read them.
    - ``released``: N(0, s²), and N(0, s²/4) for positions. The code OpenAI released with GPT-2.
    - ``preferences``: N(0, 1/n_in), N(0, 1/(n_in L)) for those two projections, N(0, s²) for tokens and
      N(0, s²/4) for positions. The code of Ziegler et al., 2019 (arXiv:1909.08593).

    Dropout acts on the embeddings and on what each sublayer adds to the residual stream. Attention weights
    are not dropped: the fused attention never holds them in memory.

    Raises:
        ConfigError: A value out of range, or a width that the heads do not divide.
    """

    family: ClassVar[str] = "gpt2"
    ARCHITECTURE: ClassVar[str] = "GPT2LMHeadModel"
    # What [model] of a training run may set, and what it is for a small model on a CPU.
    SETTINGS: ClassVar[dict[str, Any]] = {
        "n_layer": 4,
        "n_head": 4,
        "width": 128,
        "context_length": 64,  # tokens the model sees at once
        "dropout": 0.0,
    }

    vocab_size: int = 50257
    context_length: int = 1024  # longest sequence, and the number of learned positions
    n_layer: int = 12
    n_head: int = 12
    width: int = 768
    dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    gelu: config_json.Gelu = "tanh"
    init: Init = "scaled"
    init_std: float = 0.02  # s above
    bos_token_id: int | None = None  # this and the next two are not computed with, only kept with the model
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        config_json.check_bounds(self, _BOUNDS)
        if self.width % self.n_head:
            raise ConfigError(f"width {self.width} must be a multiple of n_head {self.n_head}")
        if self.gelu not in ("tanh", "none"):
            raise ConfigError(f"gelu must be tanh or none, got {self.gelu!r}")
        if self.init not in _INITS:
            raise ConfigError(f"init must be one of {', '.join(_INITS)}, got {self.init!r}")
        config_json.check_token_ids(self)

    @property
    def head_dim(self) -> int:
        """D, the width of one head."""
        return self.width // self.n_head

    @property
    def n_kv_head(self) -> int:
        """Every query head has its own key and value head."""
        return self.n_head

    @property
    def hidden(self) -> int:
        """The inner width of the MLP."""
        return 4 * self.width

    @classmethod
    def from_settings(cls, **values: Any) -> Self:
        """Return the configuration for values of SETTINGS and of the vocabulary.

        Raises:
            ConfigError: A value out of range, by name.
        """
        return cls(**values)

    @classmethod
    def tiny(cls) -> Self:
        """Return a configuration that tests compute in no time: a vocabulary of bytes, few and odd widths."""
        return cls(vocab_size=259, context_length=32, n_layer=2, n_head=4, width=24, eos_token_ids=(256,))

    @classmethod
    def from_hf(cls, data: Mapping[str, Any] | config_json.Reader) -> Self:
        """Read the contents of a Hugging Face config.json, strictly.

        Raises:
            ConfigError: A key that is missing, unknown, out of range or asks for another model. It is named.
        """
        read = config_json.Reader.of(data)
        read.require("model_type", cls.family)
        vocab_size = read.integer("vocab_size", 50257)
        width = read.integer("n_embd", 768, also="hidden_size")
        context = read.integer("n_positions", 1024, also="max_position_embeddings")
        dropout = read.number("resid_pdrop", 0.1)
        read.training("embd_pdrop", 0.1, kept=dropout, why="portlm drops at one rate, that of resid_pdrop")
        read.training("attn_pdrop", 0.1)
        read.require("n_inner", 4 * width, says="4 times n_embd")
        read.require("n_ctx", context, says="the same as n_positions")
        read.require("scale_attn_weights", True)
        read.require("scale_attn_by_inverse_layer_idx", False)
        read.require("tie_word_embeddings", True)
        read.require_full_attention(context)
        config = cls(
            vocab_size=vocab_size,
            context_length=context,
            n_layer=read.integer("n_layer", 12, also="num_hidden_layers"),
            n_head=read.integer("n_head", 12, also="num_attention_heads"),
            width=width,
            dropout=dropout,
            layer_norm_eps=read.number("layer_norm_epsilon", 1e-5),
            gelu=read.choice("activation_function", "gelu_new", config_json.GELU),
            init=read.choice("portlm_init", "scaled", _INITS),
            init_std=read.number("initializer_range", 0.02),
            bos_token_id=read.token_id("bos_token_id", vocab_size),
            eos_token_ids=read.token_ids("eos_token_id", vocab_size),
            pad_token_id=read.token_id("pad_token_id", vocab_size),
            **cls.own(read),
        )
        # The summary keys belong to GPT2DoubleHeadsModel, and the upcast matters in half precision only.
        read.finish(
            "summary_type",
            "summary_use_proj",
            "summary_activation",
            "summary_proj_to_labels",
            "summary_first_dropout",
            "reorder_and_upcast_attn",
        )
        return config

    @classmethod
    def own(cls, read: config_json.Reader) -> dict[str, Any]:
        """Return the fields that a descendant reads in its own way."""
        return {}

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json that transformers opens as GPT2LMHeadModel."""
        data = {
            "architectures": [self.ARCHITECTURE],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "n_positions": self.context_length,
            "n_layer": self.n_layer,
            "n_head": self.n_head,
            "n_embd": self.width,
            "activation_function": "gelu_new" if self.gelu == "tanh" else "gelu",
            "layer_norm_epsilon": self.layer_norm_eps,
            "resid_pdrop": self.dropout,
            "embd_pdrop": self.dropout,
            "attn_pdrop": 0.0,
            "initializer_range": self.init_std,
            "tie_word_embeddings": True,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": config_json.one_or_list(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
        }
        if self.init != "scaled":
            data["portlm_init"] = self.init  # transformers keeps it as an attribute nobody reads
        return data


PRESETS = {
    "gpt2": GPT2Config(n_layer=12, n_head=12, width=768),
    "gpt2-medium": GPT2Config(n_layer=24, n_head=16, width=1024),
    "gpt2-large": GPT2Config(n_layer=36, n_head=20, width=1280),
    "gpt2-xl": GPT2Config(n_layer=48, n_head=25, width=1600),
}
PARAMETERS = {  # as published, the shared embedding counted once
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


class Heads(Protocol):
    """What attention needs to know of a configuration."""

    @property
    def width(self) -> int:
        """C."""

    @property
    def n_head(self) -> int:
        """H."""

    @property
    def head_dim(self) -> int:
        """D."""


class Attention(nn.Module):
    """Masked self-attention: position t looks at positions 0..t, or at the last of them that a window shows."""

    def __init__(self, config: Heads, window: int | None = None):
        super().__init__()
        self.n_head, self.head_dim, self.window = config.n_head, config.head_dim, window
        self.c_attn = Linear(config.width, 3 * config.width, bias=True, maps=3)
        self.c_proj = Linear(config.width, config.width, bias=True)

    def forward(
        self, x: Tensor, mask: Tensor | None, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue | None]:
        """Attend from x (B, T, C), within x alone or, given a cache, to its P slots as well."""
        B, T, C = x.shape
        qkv = self.c_attn(x)  # (B, T, 3 C)
        if past is None and mask is None:
            y = attention_qkv(qkv, self.n_head, window=self.window)
            return self.c_proj(y.reshape(B, T, C)), None
        q, k, v = qkv.view(B, T, 3, self.n_head, self.head_dim).unbind(2)  # each (B, T, H, D)
        if past is None:
            y = attend_within(q, k, v, mask, window=self.window)
            return self.c_proj(y.reshape(B, T, C)), None
        y, key, value = cached_attention(q, k, v, *past, mask, window=self.window)
        return self.c_proj(y.reshape(B, T, C)), (key, value)


class MLP(nn.Module):
    """Two linear maps with GELU between them, position by position."""

    def __init__(self, config: Any):
        super().__init__()
        self.c_fc = Linear(config.width, config.hidden, bias=True)
        self.c_proj = Linear(config.hidden, config.width, bias=True)
        self.gelu = config.gelu

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        return gelu_mlp(
            x, self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias, approximate=self.gelu
        )


class Block(nn.Module):
    """One layer. The residual stream h and the sublayer output x still to be added to it travel side by side.

    So each addition happens inside the next LayerNorm, which has to read both anyway.

    Args:
        config: The shape, of GPT-2 or a descendant.
        attention: (x, mask, past) -> (y, present).
    """

    def __init__(self, config: Any, attention: nn.Module):
        super().__init__()
        self.ln_1 = LayerNorm(config.width, config.layer_norm_eps)
        self.attn = attention
        self.ln_2 = LayerNorm(config.width, config.layer_norm_eps)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(
        self, x: Tensor, h: Tensor | None, mask: Tensor | None = None, past: KeyValue | None = None
    ) -> tuple[Tensor, Tensor, KeyValue | None]:
        """Map (x, h), both (B, T, C), to the same for the next layer. h is None before the first."""
        y, h = self.ln_1(x, h)
        x, present = self.attn(y, mask, past)
        y, h = self.ln_2(drop(x, self.dropout, self.training), h)
        return drop(self.mlp(y), self.dropout, self.training), h, present


class GPT2(Causal):
    """A GPT-2 language model with randomly initialised weights.

    Args:
        config: Its shape.
        init: False leaves the parameters uninitialised, for a caller that fills them all.
    """

    wte: Embedding
    wpe: Embedding  # positions
    PARTS = Parts("wte", "h", "ln_f", "lm_head", "transformer.")
    CONSTANTS = (".attn.bias", ".attn.masked_bias")

    def __init__(self, config: Any, *, init: bool = True):
        super().__init__()
        blocks: list[nn.Module] = [Block(config, self.attention(config, i)) for i in range(config.n_layer)]
        positions = Embedding(config.context_length, config.width)
        self.assemble(config, blocks, LayerNorm(config.width, config.layer_norm_eps), ("wpe", positions))
        if init:
            self.init_weights()

    def attention(self, config: Any, layer: int) -> nn.Module:
        """Return a layer's attention."""
        return Attention(config)

    def embed(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        """Return the sum of both tables' rows, (B, T, C)."""
        T = input_ids.shape[1]
        x = self.wte(input_ids) + (self.wpe.weight[:T] if position_ids is None else self.wpe(position_ids))
        return drop(x, self.config.dropout, self.training)

    def carried(self, tokens: int, position_ids: Tensor | None) -> tuple[Tensor, ...]:
        """Return nothing: positions are in the stream."""
        return ()

    def std(self, name: str, parameter: Tensor) -> float:
        """Return the spread of a fresh matrix (out, in), as ``config.init`` says."""
        s, L, n_in = self.config.init_std, self.config.n_layer, parameter.shape[1]
        init, writes_to_stream = self.config.init, name.endswith("c_proj.weight")
        if name == "wte.weight":
            return s
        if name == "wpe.weight":
            return s if init == "scaled" else s / 2
        if init == "preferences":
            return 1 / math.sqrt(n_in * L) if writes_to_stream else 1 / math.sqrt(n_in)
        return s / math.sqrt(2 * L) if init == "scaled" and writes_to_stream else s

    @classmethod
    def hf_name(cls, name: str) -> tuple[str, bool]:
        """Return the name of a parameter in Hugging Face's files, and whether it is stored transposed there.

        Their Conv1D keeps its matrices (in, out), as OpenAI's TensorFlow code did.
        """
        named, _ = super().hf_name(name)
        return named, bool(re.search(r"\.c_(attn|proj|fc)\.weight$", name))
