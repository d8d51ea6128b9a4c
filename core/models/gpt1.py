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

from portlm.models import config_json
from portlm.models.causal import Causal, NoNorm, Parts
from portlm.models.gpt2 import MLP, Attention
from portlm.models.gpt_config import GPTConfig
from portlm.models.keyed_config import Key
from portlm.models.layers import Embedding, KeyValue, LayerNorm, drop


@dataclass(frozen=True)
class GPT1Config(GPTConfig):
    """The shape of a GPT-1 model; the defaults are the published one.

    Weights begin as N(0, init_std²), biases as 0.

    Raises:
        ConfigError: A value out of range, or a width that the heads do not divide.
    """

    family: ClassVar[str] = "openai-gpt"
    ARCHITECTURE: ClassVar[str] = "OpenAIGPTLMHeadModel"
    KEYS: ClassVar[Mapping[str, Key]] = {
        "vocab_size": Key("vocab_size"),
        "context_length": Key("n_positions", also="max_position_embeddings"),
        "dropout": Key("resid_pdrop", missing=0.1),
        "n_layer": Key("n_layer", also="num_hidden_layers"),
        "n_head": Key("n_head", also="num_attention_heads"),
        "width": Key("n_embd", also="hidden_size"),
        "layer_norm_eps": Key("layer_norm_epsilon"),
        "init_std": Key("initializer_range"),
    }
    # transformers computes the tanh form under this name.
    FIXED: ClassVar[Mapping[str, Any]] = {"afn": "gelu", **GPTConfig.FIXED}

    vocab_size: int = 40478
    context_length: int = 512

    @property
    def hidden(self) -> int:
        """The inner width of the MLP."""
        return 4 * self.width

    @property
    def gelu(self) -> config_json.Gelu:
        """GELU in its tanh form."""
        return "tanh"

    @classmethod
    def tiny(cls) -> Self:
        """Return a configuration that tests compute in no time: a vocabulary of bytes, few and odd widths."""
        return cls(vocab_size=259, context_length=32, n_layer=2, n_head=4, width=24, eos_token_ids=(256,))

    @classmethod
    def check(cls, read: config_json.Reader, values: Mapping[str, Any]) -> None:
        """Look at what follows from other keys."""
        read.require("n_ctx", values["context_length"], says="the same as n_positions")
        super().check(read, values)


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
