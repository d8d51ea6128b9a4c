"""The layers of the Transformer of 2017, for the families that kept them: attention and MLP, a LayerNorm behind each.

Vaswani et al., "Attention Is All You Need" (arXiv:1706.03762), section 3. What families differ in is how tokens enter
(transformer.py, bart.py); their files have the same names and config.json the same keys.

B batch, S source tokens, T target tokens, P slots in the cache, C width, H heads, D = C / H head width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from portlm.models.config_json import Gelu
from portlm.models.encoder_decoder import EncoderDecoder
from portlm.models.layers import Embedding, KeyValue, LayerNorm, Linear, drop
from portlm.models.post_norm_config import PostNormConfig
from portlm.ops.attention import attention
from portlm.ops.cached_attention import cached_attention
from portlm.ops.gelu_mlp import gelu_mlp
from portlm.ops.masked_attention import masked_attention

EPSILON = 1e-5  # of every norm


class Attention(nn.Module):
    """Attention with four maps, of the tokens of a sequence to those of the same or of another."""

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    out_proj: Linear

    def __init__(self, config: PostNormConfig):
        super().__init__()
        self.head_dim = config.head_dim
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, Linear(config.width, config.width, bias=True))

    def heads(self, x: Tensor) -> Tensor:
        """Return x (B, T, C) as (B, T, H, D)."""
        return x.view(*x.shape[:2], -1, self.head_dim)

    def keys_values(self, x: Tensor) -> KeyValue:
        """Return keys and values (B, S, H, D) of x (B, S, C)."""
        return self.heads(self.k_proj(x)), self.heads(self.v_proj(x))

    def look(self, x: Tensor, seen: KeyValue, mask: Tensor | None) -> Tensor:
        """Look from x (B, T, C) at keys and values (B, S, H, D) where mask (B, S) is 1."""
        y = masked_attention(self.heads(self.q_proj(x)), *seen, mask)
        return self.out_proj(y.reshape(x.shape))

    def look_back(
        self, x: Tensor, mask: Tensor | None, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue | None]:
        """Look from each of x (B, T, C) at itself and those before it and, given a cache, at its P slots as well."""
        q, (k, v), present = self.heads(self.q_proj(x)), self.keys_values(x), None
        if past is None:
            y = attention(q, k, v)
        else:
            y, key, value = cached_attention(q, k, v, *past, mask)
            present = (key, value)
        return self.out_proj(y.reshape(x.shape)), present


class Layer(nn.Module):
    """One layer of either stack: each sublayer's output is added to its input, and the sum normalised."""

    self_attn: Attention
    self_attn_layer_norm: LayerNorm
    encoder_attn: Attention  # this and its norm in a decoder only
    encoder_attn_layer_norm: LayerNorm

    def __init__(self, config: PostNormConfig, *, crosses: bool):
        super().__init__()
        self.activation, self.dropout = config.activation, config.dropout
        for name in ("self_attn", "encoder_attn")[: 1 + crosses]:
            self.add_module(name, Attention(config))
            self.add_module(f"{name}_layer_norm", LayerNorm(config.width, EPSILON))
        self.fc1 = Linear(config.width, config.hidden, bias=True)
        self.fc2 = Linear(config.hidden, config.width, bias=True)
        self.final_layer_norm = LayerNorm(config.width, EPSILON)

    def encode(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Map (B, S, C) to the same, each position seeing all that the mask (B, S) shows."""
        x = self.added(
            self.self_attn.look(x, self.self_attn.keys_values(x), mask), x, self.self_attn_layer_norm
        )
        return self.added(self.mlp(x), x, self.final_layer_norm)

    def decode(
        self,
        x: Tensor,
        mask: Tensor | None,
        past: KeyValue | None,
        memory: KeyValue,
        source_mask: Tensor | None,
    ) -> tuple[Tensor, KeyValue | None]:
        """Map (B, T, C) to the same, each position seeing what is before it and the source; return the grown cache."""
        y, present = self.self_attn.look_back(x, mask, past)
        x = self.added(y, x, self.self_attn_layer_norm)
        x = self.added(self.encoder_attn.look(x, memory, source_mask), x, self.encoder_attn_layer_norm)
        return self.added(self.mlp(x), x, self.final_layer_norm), present

    def added(self, y: Tensor, x: Tensor, norm: nn.Module) -> Tensor:
        """Return norm(x + y), y a sublayer's output."""
        normed: Tensor = norm(drop(y, self.dropout, self.training), x)[0]
        return normed

    def mlp(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C), position by position."""
        if self.activation in ("gelu", "gelu_new"):
            kind: Gelu = "none" if self.activation == "gelu" else "tanh"
            return gelu_mlp(
                x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, approximate=kind
            )
        inner = self.fc1(x)
        return self.fc2(F.silu(inner) if self.activation == "silu" else torch.relu(inner))


class Stack(nn.Module):
    """What maps embeddings (B, T, C) and positions, None for 0, 1, ..., to what the first of its layers reads."""

    layers: nn.ModuleList  # PostNorm fills it

    def each(self) -> Sequence[Layer]:
        """Return the layers, first to last."""
        return cast("Sequence[Layer]", self.layers)


class PostNorm(EncoderDecoder):
    """An encoder-decoder of such layers with randomly initialised weights. A family says how tokens enter a stack.

    Args:
        config: Its shape.
        init: False leaves the parameters uninitialised, for a caller that fills them all.
    """

    final_logits_bias: nn.Parameter | None

    def __init__(self, config: Any, *, init: bool = True):
        super().__init__()
        self.config = config
        self.shared = Embedding(config.vocab_size, config.width)
        self.encoder, self.decoder = self.stack(), self.stack()
        for stack, layers in ((self.encoder, config.n_layer), (self.decoder, config.n_decoder_layer)):
            crosses = stack is self.decoder
            stack.layers = nn.ModuleList([Layer(config, crosses=crosses) for _ in range(layers)])
        bias = nn.Parameter(torch.empty(1, config.vocab_size)) if config.output_bias else None
        self.register_parameter("final_logits_bias", bias)
        if init:
            self.init_weights()

    def stack(self) -> Stack:
        """Return a stack without its layers."""
        raise NotImplementedError

    def init_weights(self) -> None:
        """Draw fresh weights from PyTorch's global generator."""
        raise NotImplementedError

    @property
    def head(self) -> Tensor:
        """The output matrix (V, C): that of the embeddings."""
        return self.shared.weight

    @property
    def output_bias(self) -> Tensor | None:
        """What is added to the logits, (1, V)."""
        return self.final_logits_bias

    def enter(self, stack: Stack, ids: Tensor, position_ids: Tensor | None) -> Tensor:
        """Return what the first layer of a stack reads of ids (B, T)."""
        x = self.shared(ids)
        if self.config.scale_embedding:
            x = x * self.config.width**0.5
        return drop(stack(x, position_ids), self.config.dropout, self.training)

    def encode(self, ids: Tensor, mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """Return what the encoder makes of source ids (B, S); see EncoderDecoder."""
        x = self.enter(self.encoder, ids, position_ids)
        for layer in self.encoder.each():
            x = layer.encode(x, mask)
        return x

    def memory(self, encoded: Tensor) -> list[KeyValue]:
        """Return each decoder layer's keys and values of an encoded source; see EncoderDecoder."""
        return [layer.encoder_attn.keys_values(encoded) for layer in self.decoder.each()]

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
        x = self.enter(self.decoder, ids, position_ids)
        presents: list[KeyValue] = []
        for number, layer in enumerate(self.decoder.each()):
            own = None if past is None else past[number]
            x, present = layer.decode(x, mask, own, memory[number], source_mask)
            if present is not None:
                presents.append(present)
        return x, presents

    @staticmethod
    def hf_name(name: str) -> tuple[str, bool]:
        """Return a parameter's name in Hugging Face's files, and whether it is stored transposed there."""
        return name if name.startswith("final_logits_bias") else f"model.{name}", False

    @staticmethod
    def hf_alias(name: str) -> str | None:
        """Return the usual name of a tensor in a foreign file: files of the bare model lack the prefix."""
        return name if name.startswith(("model.", "lm_head.", "final_logits_bias")) else f"model.{name}"

    @staticmethod
    def hf_tied(config: PostNormConfig) -> dict[str, str]:
        """Return {name: the tensor it must equal} for what some files store twice."""
        copies = ("lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
        return dict.fromkeys(copies, "model.shared.weight")
