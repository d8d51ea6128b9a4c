"""T5: the Transformer of 2017 as one text-to-text model, with five changes.

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (arXiv:1910.10683),
the code released with it, and for version 1.1 Shazeer, "GLU Variants Improve Transformer" (arXiv:2002.05202).

- RMSNorm in front of each sublayer instead of LayerNorm behind it, and one more after the last block of a stack
- no biases anywhere
- instead of positions, a bias on the scores by the distance of key and query, shared by the layers of a stack
- scores are not divided by sqrt(D): the queries' matrix begins smaller instead
- version 1.0: ReLU, and logits of the embedding itself, scaled by C^-0.5; 1.1: gated GELU, an output matrix of its own

B batch, S source tokens, T target tokens, C width, H heads, D head width, V vocabulary.
"""

import re
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from portlm.models.encoder_decoder import EncoderDecoder
from portlm.models.layers import Embedding, KeyValue, Linear, RMSNorm, drop
from portlm.models.t5_config import T5Config
from portlm.ops.masked_attention import masked_attention
from portlm.ops.relative_bias import relative_bias


def _preset(layers: int, heads: int, width: int, head_dim: int, hidden: int, **more: Any) -> T5Config:
    return T5Config(
        n_layer=layers, n_decoder_layer=layers, n_head=heads, width=width, head_dim=head_dim, hidden=hidden,
        eos_token_ids=(1,), pad_token_id=0, **more,
    )  # fmt: skip


_V1_1: dict[str, Any] = {"activation": "gated-gelu", "tie_embeddings": False, "scale_output": False}
PRESETS = {
    "t5-small": _preset(6, 8, 512, 64, 2048),
    "t5-base": _preset(12, 12, 768, 64, 3072),
    "t5-large": _preset(24, 16, 1024, 64, 4096),
    "t5-3b": _preset(24, 32, 1024, 128, 16384),
    "t5-11b": _preset(24, 128, 1024, 128, 65536),
    "t5-v1_1-small": _preset(8, 6, 512, 64, 1024, **_V1_1),
    "t5-v1_1-base": _preset(12, 12, 768, 64, 2048, **_V1_1),
}
PARAMETERS = {  # as published, shared tables counted once
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "t5-v1_1-small": 76_961_152,
    "t5-v1_1-base": 247_577_856,
}


class Attention(nn.Module):
    """Attention of the tokens of a sequence to those of the same or of another, without a scale."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.head_dim = config.head_dim
        inner = config.n_head * config.head_dim
        self.q, self.k, self.v = (Linear(config.width, inner, bias=False) for _ in range(3))
        self.o = Linear(inner, config.width, bias=False)

    def keys_values(self, x: Tensor) -> KeyValue:
        """Return keys and values (B, S, H, D) of x (B, S, C)."""
        B, S, _ = x.shape
        return self.k(x).view(B, S, -1, self.head_dim), self.v(x).view(B, S, -1, self.head_dim)

    def forward(self, x: Tensor, seen: KeyValue, mask: Tensor | None, bias: Tensor | None) -> Tensor:
        """Look from x (B, T, C) at keys and values (B, S, H, D) where mask (B, S) is 1, with biases (H, T, S)."""
        B, T, _ = x.shape
        q = self.q(x).view(B, T, -1, self.head_dim)  # (B, T, H, D)
        y = masked_attention(q, *seen, mask, bias, 1.0)
        return self.o(y.reshape(B, T, -1))


class MLP(nn.Module):
    """Two linear maps with ReLU between them, or with a gate of GELU in its tanh form."""

    wi: Linear  # without a gate
    wi_0: Linear  # with a gate, this and the next
    wi_1: Linear

    def __init__(self, config: T5Config):
        super().__init__()
        self.gated, self.dropout = config.activation == "gated-gelu", config.dropout
        names = ("wi_0", "wi_1") if self.gated else ("wi",)
        for name in names:
            self.add_module(name, Linear(config.width, config.hidden, bias=False))
        self.wo = Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        x = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x) if self.gated else torch.relu(self.wi(x))
        return self.wo(drop(x, self.dropout, self.training))


class Block(nn.Module):
    """One layer. h is the residual stream and x what the next norm still has to add to it."""

    def __init__(self, config: T5Config, *, crosses: bool):
        super().__init__()
        self.dropout = config.dropout
        self.attn_norm, self.attn = RMSNorm(config.width, config.rms_norm_eps), Attention(config)
        self.cross_norm = RMSNorm(config.width, config.rms_norm_eps) if crosses else None
        self.cross = Attention(config) if crosses else None
        self.mlp_norm, self.mlp = RMSNorm(config.width, config.rms_norm_eps), MLP(config)

    def forward(
        self,
        x: Tensor,
        h: Tensor | None,
        mask: Tensor | None,
        bias: Tensor,
        past: KeyValue | None = None,
        memory: KeyValue | None = None,
        source_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, KeyValue]:
        """Map (x, h), both (B, T, C), to the same for the next layer, and return keys and values (B, P + T, H, D)."""
        y, h = self.attn_norm(x, h)
        seen = self.attn.keys_values(y)
        if past is not None:
            key, value = (torch.cat(pair, dim=1) for pair in zip(past, seen, strict=True))
            seen = (key, value)
        x = drop(self.attn(y, seen, mask, bias), self.dropout, self.training)
        if self.cross is not None and self.cross_norm is not None and memory is not None:
            y, h = self.cross_norm(x, h)
            x = drop(self.cross(y, memory, source_mask, None), self.dropout, self.training)
        y, h = self.mlp_norm(x, h)
        return drop(self.mlp(y), self.dropout, self.training), h, seen


class Stack(nn.Module):
    """The blocks of the encoder or the decoder, the table of biases that they share, and the norm behind them."""

    def __init__(self, config: T5Config, layers: int, *, decodes: bool):
        super().__init__()
        self.dropout, self.decodes, self.max_distance = config.dropout, decodes, config.max_distance
        self.bias = Embedding(config.buckets, config.n_head)
        self.block = nn.ModuleList([Block(config, crosses=decodes) for _ in range(layers)])
        self.norm = RMSNorm(config.width, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        past: Sequence[KeyValue] | None = None,
        memory: Sequence[KeyValue] | None = None,
        source_mask: Tensor | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Run on embeddings (B, T, C); return the normalised output and each layer's keys and values."""
        keys = x.new_ones(x.shape[:2], dtype=torch.int64) if mask is None else mask
        bias = relative_bias(x, keys, self.bias.weight, not self.decodes, self.max_distance)
        x, h = drop(x, self.dropout, self.training), None
        presents = []
        for layer, block in enumerate(self.block):
            at = (None if past is None else past[layer], None if memory is None else memory[layer])
            x, h, present = block(x, h, mask, bias, *at, source_mask)
            presents.append(present)
        y, _ = self.norm(x, h)
        return drop(y, self.dropout, self.training), presents


class T5(EncoderDecoder):
    """A T5 model with randomly initialised weights.

    Args:
        config: Its shape.
        init: False leaves the parameters uninitialised, for a caller that fills them all.
    """

    has_positions = False
    cache_heads_first = False

    def __init__(self, config: T5Config, *, init: bool = True):
        super().__init__()
        self.config = config
        self.shared = Embedding(config.vocab_size, config.width)
        self.encoder = Stack(config, config.n_layer, decodes=False)
        self.decoder = Stack(config, config.n_decoder_layer, decodes=True)
        self.lm_head = None if config.tie_embeddings else Linear(config.width, config.vocab_size, bias=False)
        if init:
            self.init_weights()

    @property
    def head(self) -> Tensor:
        """The output matrix (V, C)."""
        return self.shared.weight if self.lm_head is None else self.lm_head.weight

    def scaled(self, y: Tensor) -> Tensor:
        """Return the decoder's output (B, T, C) times C^-0.5, in version 1.0."""
        return y * self.config.width**-0.5 if self.config.scale_output else y

    def encode(self, ids: Tensor, mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """Return what the encoder makes of source ids (B, S); see EncoderDecoder."""
        return self.encoder(self.shared(ids), mask)[0]

    def memory(self, encoded: Tensor) -> list[KeyValue]:
        """Return each decoder layer's keys and values of an encoded source; see EncoderDecoder."""
        looks = cast("list[Attention]", [block.cross for block in self.decoder.block])
        return [look.keys_values(encoded) for look in looks]

    def decode(
        self,
        ids: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        past: Sequence[KeyValue] | None,
        memory: Sequence[KeyValue],
        source_mask: Tensor | None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Run the decoder on target ids (B, T); see EncoderDecoder."""
        return self.decoder(self.shared(ids), mask, past, memory, source_mask)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw fresh weights from PyTorch's global generator, each matrix as wide as its inputs ask for."""
        c, f = self.config, self.config.init_factor
        for name, p in self.named_parameters():
            kind = name.split(".")[-2]
            if kind in ("shared", "lm_head"):
                p.normal_(0.0, f)
            elif p.dim() == 1:
                p.fill_(f)
            elif kind == "q":
                p.normal_(0.0, f * (c.width * c.head_dim) ** -0.5)
            else:  # by the number of inputs; a bias of the scores like what reads the stream
                p.normal_(0.0, f * (c.width if kind == "bias" else p.shape[1]) ** -0.5)

    @staticmethod
    def hf_name(name: str) -> tuple[str, bool]:
        """Return a parameter's name in Hugging Face's files, and whether it is stored transposed there."""
        stack, last = name.partition(".")[0], 2 if name.startswith("decoder.") else 1
        name = re.sub(r"^(\w+)\.bias\b", r"\1.block.0.layer.0.SelfAttention.relative_attention_bias", name)
        name = re.sub(r"^(\w+)\.norm\b", r"\1.final_layer_norm", name)
        for part, module, place in (
            ("attn", "SelfAttention", 0), ("cross", "EncDecAttention", 1), ("mlp", "DenseReluDense", last)
        ):  # fmt: skip
            block = rf"^({stack}\.block\.\d+)"
            name = re.sub(rf"{block}\.{part}_norm\b", rf"\1.layer.{place}.layer_norm", name)
            name = re.sub(rf"{block}\.{part}\b", rf"\1.layer.{place}.{module}", name)
        return name, False

    @staticmethod
    def hf_alias(name: str) -> str | None:
        """Return the usual name of a tensor in a foreign file, or None for one that holds no parameter.

        Files of the first release hold a table of biases for the decoder's look at the source, which nobody reads.
        """
        unread = re.fullmatch(
            r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight", name
        )
        return None if unread else name

    @staticmethod
    def hf_tied(config: T5Config) -> dict[str, str]:
        """Return {name: the tensor it must equal} for what some files store twice."""
        copies = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
        return dict.fromkeys(copies + ["lm_head.weight"] * config.tie_embeddings, "shared.weight")
