"""GPT-1: the decoder of "Attention Is All You Need" (Vaswani et al., 2017) alone, pretrained on books.

Radford et al., "Improving Language Understanding by Generative Pre-Training", 2018, and the code released with it.
What GPT-2 changed later stands here as it was:

- LayerNorm behind each sublayer, ``n = LN(x + attention(x))`` and ``h = LN(n + mlp(n))``, and none after the last block
- 512 positions, and 40478 lower-cased byte pairs of letters, whose words end with ``</w>``

Learned positions, GELU in its tanh form and the token embedding as output layer are those of GPT-2. The released code
kept positions and tokens in one table and dropped entries of that table; as in transformers they are two, and what is
dropped is their sum.

B batch, T time, C width, H heads, P slots already in the cache.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from portlm.errors import ConfigError
from portlm.models import config_json
from portlm.models.causal import Causal, NoNorm, Parts
from portlm.models.gpt2 import MLP, Attention
from portlm.models.layers import Embedding, KeyValue, LayerNorm, drop

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


@dataclass(frozen=True)
class GPT1Config:
    """The shape of a GPT-1 model; the defaults are the published one.

    Weights begin as N(0, init_std²), biases as 0. Dropout acts on the embeddings and on what each sublayer adds to the
    residual stream, not on attention weights: the fused attention never holds them in memory.

    Raises:
        ConfigError: A value out of range, or a width that the heads do not divide.
    """

    family: ClassVar[str] = "openai-gpt"
    # What [model] of a training run may set, and what it is for a small model on a CPU.
    SETTINGS: ClassVar[dict[str, Any]] = {
        "n_layer": 4,
        "n_head": 4,
        "width": 128,
        "context_length": 64,  # tokens the model sees at once
        "dropout": 0.0,
    }

    vocab_size: int = 40478
    context_length: int = 512  # longest sequence, and the number of learned positions
    n_layer: int = 12
    n_head: int = 12
    width: int = 768
    dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    init_std: float = 0.02
    bos_token_id: int | None = None  # this and the next two are not computed with, only kept with the model
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        config_json.check_bounds(self, _BOUNDS)
        if self.width % self.n_head:
            raise ConfigError(f"width {self.width} must be a multiple of n_head {self.n_head}")
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

    @property
    def gelu(self) -> config_json.Gelu:
        """GELU in its tanh form."""
        return "tanh"

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
        vocab_size = read.integer("vocab_size", 40478)
        context = read.integer("n_positions", 512, also="max_position_embeddings")
        dropout = read.number("resid_pdrop", 0.1)
        read.training("embd_pdrop", 0.1, kept=dropout, why="portlm drops at one rate, that of resid_pdrop")
        read.training("attn_pdrop", 0.1)
        read.require("afn", "gelu")  # transformers computes the tanh form under this name
        read.require("n_ctx", context, says="the same as n_positions")
        read.require("tie_word_embeddings", True)
        read.require_full_attention(context)
        config = cls(
            vocab_size=vocab_size,
            context_length=context,
            n_layer=read.integer("n_layer", 12, also="num_hidden_layers"),
            n_head=read.integer("n_head", 12, also="num_attention_heads"),
            width=read.integer("n_embd", 768, also="hidden_size"),
            dropout=dropout,
            layer_norm_eps=read.number("layer_norm_epsilon", 1e-5),
            init_std=read.number("initializer_range", 0.02),
            bos_token_id=read.token_id("bos_token_id", vocab_size),
            eos_token_ids=read.token_ids("eos_token_id", vocab_size),
            pad_token_id=read.token_id("pad_token_id", vocab_size),
        )
        # The summary keys belong to OpenAIGPTDoubleHeadsModel.
        read.finish(
            "summary_type",
            "summary_use_proj",
            "summary_activation",
            "summary_proj_to_labels",
            "summary_first_dropout",
        )
        return config

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json that transformers opens as OpenAIGPTLMHeadModel."""
        return {
            "architectures": ["OpenAIGPTLMHeadModel"],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "n_positions": self.context_length,
            "n_layer": self.n_layer,
            "n_head": self.n_head,
            "n_embd": self.width,
            "afn": "gelu",
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


PRESETS = {"gpt1": GPT1Config(dropout=0.1)}
PARAMETERS = {"gpt1": 116_534_784}  # of the published file, the shared embedding counted once


class Block(nn.Module):
    """One layer, with a LayerNorm behind each addition."""

    def __init__(self, config: GPT1Config):
        super().__init__()
        self.attn = Attention(config)
        self.ln_1 = LayerNorm(config.width, config.layer_norm_eps)
        self.mlp = MLP(config)
        self.ln_2 = LayerNorm(config.width, config.layer_norm_eps)
        self.dropout = config.dropout

    def forward(
        self, x: Tensor, h: Tensor | None, mask: Tensor | None = None, past: KeyValue | None = None
    ) -> tuple[Tensor, None, KeyValue | None]:
        """Map x (B, T, C) to the same. h is None: a norm behind each sublayer leaves nothing to add."""
        y, present = self.attn(x, mask, past)
        n, _ = self.ln_1(drop(y, self.dropout, self.training), x)
        y, _ = self.ln_2(drop(self.mlp(n), self.dropout, self.training), n)
        return y, None, present


class GPT1(Causal):
    """A GPT-1 language model with randomly initialised weights.

    Args:
        config: Its shape.
        init: False leaves the parameters uninitialised, for a caller that fills them all.
    """

    tokens_embed: Embedding
    positions_embed: Embedding
    PARTS = Parts("tokens_embed", "h", "no_norm", "lm_head", "transformer.")
    CONSTANTS = (".attn.bias", ".position_ids")

    def __init__(self, config: GPT1Config, *, init: bool = True):
        super().__init__()
        blocks: list[nn.Module] = [Block(config) for _ in range(config.n_layer)]
        positions = Embedding(config.context_length, config.width)
        self.assemble(config, blocks, NoNorm(), ("positions_embed", positions))
        if init:
            self.init_weights()

    def embed(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        """Return the sum of both tables' rows, (B, T, C)."""
        table, T = self.positions_embed, input_ids.shape[1]
        x = self.tokens_embed(input_ids) + (table.weight[:T] if position_ids is None else table(position_ids))
        return drop(x, self.config.dropout, self.training)

    def carried(self, tokens: int, position_ids: Tensor | None) -> tuple[Tensor, ...]:
        """Return nothing: positions are in the stream."""
        return ()

    @classmethod
    def hf_name(cls, name: str) -> tuple[str, bool]:
        """Return the name of a parameter in Hugging Face's files, and whether it is stored transposed there.

        Their Conv1D keeps its matrices (in, out), as OpenAI's TensorFlow code did.
        """
        named, _ = super().hf_name(name)
        return named, bool(re.search(r"\.c_(attn|proj|fc)\.weight$", name))
