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
from portlm.models.gpt_config import SUMMARY, GPTConfig
from portlm.models.keyed_config import Key
from portlm.models.layers import Embedding, KeyValue, LayerNorm, Linear, drop
from portlm.models.within import attend_within
from portlm.ops.attention import attention_qkv
from portlm.ops.cached_attention import cached_attention
from portlm.ops.gelu_mlp import gelu_mlp

Init = Literal["scaled", "released", "preferences"]
_INITS: dict[str, Init] = {"scaled": "scaled", "released": "released", "preferences": "preferences"}


@dataclass(frozen=True)
class GPT2Config(GPTConfig):
    """The shape of a GPT-2 model, and how its weights begin.

    Three initialisations were published for the same architecture, all with biases 0 and gains 1:

    - ``scaled``: N(0, s²), and N(0, s²/2L) for the two projections that write to the residual stream, so
      that its variance does not grow with depth. The paper's words, as Hugging Face and Megatron read them.
    - ``released``: N(0, s²), and N(0, s²/4) for positions. The code OpenAI released with GPT-2.
    - ``preferences``: N(0, 1/n_in), N(0, 1/(n_in L)) for those two projections, N(0, s²) for tokens and
      N(0, s²/4) for positions. The code of Ziegler et al., 2019 (arXiv:1909.08593).

    Raises:
        ConfigError: A value out of range, or a width that the heads do not divide.
    """

    family: ClassVar[str] = "gpt2"
    ARCHITECTURE: ClassVar[str] = "GPT2LMHeadModel"
    KEYS: ClassVar[Mapping[str, Key]] = {
        "vocab_size": Key("vocab_size"),
        "width": Key("n_embd", also="hidden_size"),
        "context_length": Key("n_positions", also="max_position_embeddings"),
        "dropout": Key("resid_pdrop", missing=0.1),
        "n_layer": Key("n_layer", also="num_hidden_layers"),
        "n_head": Key("n_head", also="num_attention_heads"),
        "layer_norm_eps": Key("layer_norm_epsilon"),
        "gelu": Key("activation_function", choices=config_json.GELU),
        "init": Key("portlm_init", choices=_INITS),
        "init_std": Key("initializer_range"),
    }
    # The upcast matters in half precision only.
    HARMLESS: ClassVar[tuple[str, ...]] = (*SUMMARY, "reorder_and_upcast_attn")

    gelu: config_json.Gelu = "tanh"
    init: Init = "scaled"  # init_std is s above

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gelu not in ("tanh", "none"):
            raise ConfigError(f"gelu must be tanh or none, got {self.gelu!r}")
        if self.init not in _INITS:
            raise ConfigError(f"init must be one of {', '.join(_INITS)}, got {self.init!r}")

    @property
    def hidden(self) -> int:
        """The inner width of the MLP."""
        return 4 * self.width

    @classmethod
    def tiny(cls) -> Self:
        """Return a configuration that tests compute in no time: a vocabulary of bytes, few and odd widths."""
        return cls(vocab_size=259, context_length=32, n_layer=2, n_head=4, width=24, eos_token_ids=(256,))

    @classmethod
    def check(cls, read: config_json.Reader, values: Mapping[str, Any]) -> None:
        """Look at what follows from other keys, and at how scores are scaled."""
        read.require("n_inner", 4 * values["width"], says="4 times n_embd")
        read.require("n_ctx", values["context_length"], says="the same as n_positions")
        read.require("scale_attn_weights", True)
        read.require("scale_attn_by_inverse_layer_idx", False)
        super().check(read, values)

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json that transformers opens as GPT2LMHeadModel."""
        data = super().to_hf()
        if self.init == "scaled":
            del data["portlm_init"]  # transformers keeps it as an attribute nobody reads
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
