"""The layers of the Transformer of 2017, for the families that kept them: attention and MLP, a LayerNorm behind each.

Vaswani et al., "Attention Is All You Need" (arXiv:1706.03762), section 3. What families differ in is how tokens enter
(transformer.py, bart.py); their files have the same names and config.json the same keys.

B batch, S source tokens, T target tokens, P slots in the cache, C width, H heads, D = C / H head width, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from portlm.errors import ConfigError
from portlm.models import config_json
from portlm.models.encoder_decoder import EncoderDecoder
from portlm.models.layers import Embedding, KeyValue, LayerNorm, Linear, drop
from portlm.ops.attention import attention
from portlm.ops.cached_attention import cached_attention
from portlm.ops.gelu_mlp import gelu_mlp
from portlm.ops.masked_attention import masked_attention

EPSILON = 1e-5  # of every norm
_BOUNDS = {
    "vocab_size": (1, config_json.MAX_VOCAB),
    "context_length": (1, config_json.MAX_CONTEXT),
    "n_layer": (1, config_json.MAX_LAYERS),
    "n_decoder_layer": (1, config_json.MAX_LAYERS),
    "n_head": (1, config_json.MAX_HEADS),
    "width": (1, config_json.MAX_WIDTH),
    "hidden": (1, config_json.MAX_HIDDEN),
    "dropout": (0.0, 0.99),
    "init_std": (0.0, 1.0),
}
Activation = Literal["relu", "gelu", "gelu_new", "silu"]
_ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu", "gelu": "gelu", "gelu_new": "gelu_new", "silu": "silu", "swish": "silu",
}  # fmt: skip


@dataclass(frozen=True)
class PostNormConfig:
    """The shape of such a model; a family says in FIXED and DEFAULTS what config.json must hold and may leave out.

    Dropout acts on what enters a stack and on what each sublayer adds. Attention weights are not dropped: the fused
    attention never holds them in memory.

    Raises:
        ConfigError: A value out of range, or a width that the heads do not divide.
    """

    family: ClassVar[str]
    ARCHITECTURE: ClassVar[str]
    BARE: ClassVar[str]  # transformers' class without a head
    DEFAULTS: ClassVar[dict[str, Any]]  # of transformers' class, for keys that are missing
    FIXED: ClassVar[
        dict[str, Any]
    ]  # further keys that older versions of it wrote, and the value that is computed
    # What [model] of a training run may set, and what it is for a small model on a CPU.
    SETTINGS: ClassVar[dict[str, Any]] = {
        "n_layer": 2,
        "n_head": 4,
        "width": 128,
        "hidden": 0,  # inner width of the MLP; 0 means 4 times the width
        "context_length": 64,  # tokens of a source, and of a target
        "dropout": 0.0,
    }

    vocab_size: int
    context_length: int
    n_layer: int  # of the encoder
    n_decoder_layer: int
    n_head: int
    width: int
    hidden: int
    activation: Activation
    scale_embedding: bool  # by sqrt(C)
    dropout: float = 0.0
    output_bias: bool = False  # one for every logit
    init_std: float = 0.02
    decoder_start_token_id: int = 0
    bos_token_id: int | None = None  # this and the next two are not computed with, only kept with the model
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        config_json.check_bounds(self, _BOUNDS)
        if self.width % self.n_head or self.width % 2:
            raise ConfigError(f"width {self.width} must be even and a multiple of n_head {self.n_head}")
        if self.activation not in _ACTIVATIONS.values():
            raise ConfigError(f"activation must be relu, gelu, gelu_new or silu, got {self.activation!r}")
        config_json.check_token_ids(self, "decoder_start_token_id")

    @property
    def head_dim(self) -> int:
        """D, the width of one head."""
        return self.width // self.n_head

    @classmethod
    def from_settings(cls, **values: Any) -> Self:
        """Return the configuration for values of SETTINGS and of the vocabulary, as deep on both sides.

        Raises:
            ConfigError: A value out of range, by name.
        """
        hidden = values.pop("hidden") or 4 * values["width"]
        return cls(**values, hidden=hidden, n_decoder_layer=values["n_layer"])

    @classmethod
    def tiny(cls) -> Self:
        """Return a configuration that tests compute in no time: a vocabulary of bytes, an odd inner width."""
        return cls(
            vocab_size=259, context_length=40, n_layer=2, n_decoder_layer=2, n_head=3, width=24, hidden=37,
            eos_token_ids=(256,), pad_token_id=258, decoder_start_token_id=258,
        )  # fmt: skip

    @classmethod
    def from_hf(cls, data: Mapping[str, Any] | config_json.Reader) -> Self:
        """Read the contents of a Hugging Face config.json, strictly.

        Raises:
            ConfigError: A key that is missing, unknown, out of range or asks for another model. It is named.
        """
        read, usual = config_json.Reader.of(data), cls.DEFAULTS
        read.require("model_type", cls.family)
        vocab_size = read.integer("vocab_size", usual["vocab_size"])
        layers = read.integer("encoder_layers", 12, also="num_hidden_layers")
        heads = read.integer("encoder_attention_heads", 16, also="num_attention_heads")
        hidden = read.integer("encoder_ffn_dim", 4096)
        read.require("decoder_attention_heads", heads, says="encoder_attention_heads")
        read.require("decoder_ffn_dim", hidden, says="encoder_ffn_dim")
        read.require("tie_word_embeddings", True)
        for key, value in cls.FIXED.items():
            read.require(key, value if value != "vocab_size" else vocab_size)
        for key in ("attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop"):
            read.training(key, 0.0)
        # Only files of the class with a language model's head hold a bias of the logits.
        read.require("architectures", [cls.ARCHITECTURE], [cls.BARE])
        takes = f"{cls.ARCHITECTURE} or {cls.BARE}, in a list"
        biased = read.raw("architectures", takes, "checked") != [cls.BARE]
        config = cls(
            vocab_size=vocab_size,
            context_length=read.integer("max_position_embeddings", 1024),
            n_layer=layers,
            n_decoder_layer=read.integer("decoder_layers", 12),
            n_head=heads,
            width=read.integer("d_model", 1024, also="hidden_size"),
            hidden=hidden,
            activation=read.choice("activation_function", "gelu", _ACTIVATIONS),
            scale_embedding=read.boolean("scale_embedding", False),
            dropout=read.number("dropout", 0.1),
            output_bias=read.boolean("portlm_output_bias", biased),
            init_std=read.number("init_std", 0.02),
            decoder_start_token_id=read.integer("decoder_start_token_id", usual["decoder_start_token_id"]),
            bos_token_id=read.token_id("bos_token_id", vocab_size),
            eos_token_ids=read.token_ids("eos_token_id", vocab_size),
            pad_token_id=read.token_id("pad_token_id", vocab_size),
        )
        # The first two are of other heads; the last two said once what generation is told now, and where rows begin.
        read.finish(
            "classif_dropout", "classifier_dropout", "force_bos_token_to_be_generated", "extra_pos_embeddings",
            encoder_decoder=True,
        )  # fmt: skip
        return config

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json that transformers opens as ARCHITECTURE."""
        data = {
            "architectures": [self.ARCHITECTURE],
            "model_type": self.family,
            "is_encoder_decoder": True,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.context_length,
            "encoder_layers": self.n_layer,
            "decoder_layers": self.n_decoder_layer,
            "encoder_attention_heads": self.n_head,
            "decoder_attention_heads": self.n_head,
            "encoder_ffn_dim": self.hidden,
            "decoder_ffn_dim": self.hidden,
            "d_model": self.width,
            "activation_function": self.activation,
            "scale_embedding": self.scale_embedding,
            "tie_word_embeddings": True,
            "dropout": self.dropout,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
            "init_std": self.init_std,
            "decoder_start_token_id": self.decoder_start_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": config_json.one_or_list(self.eos_token_ids),
            "forced_eos_token_id": None,
            "pad_token_id": self.pad_token_id,
        }
        if not self.output_bias:
            data["portlm_output_bias"] = False  # transformers keeps it as an attribute nobody reads
        return data


class Attention(nn.Module):
    """Attention with four maps, of the tokens of a sequence to those of the same or of another."""

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
            kind: config_json.Gelu = "none" if self.activation == "gelu" else "tanh"
            return gelu_mlp(
                x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, approximate=kind
            )
        inner = self.fc1(x)
        return self.fc2(F.silu(inner) if self.activation == "silu" else torch.relu(inner))


class PostNorm(EncoderDecoder):
    """An encoder-decoder of such layers with randomly initialised weights. A family says how tokens enter a stack.

    Args:
        config: Its shape.
        init: False leaves the parameters uninitialised, for a caller that fills them all.
    """

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

    def stack(self) -> nn.Module:
        """Return a module that maps embeddings (B, T, C) and positions, None for 0, 1, ..., to what a stack reads."""
        raise NotImplementedError

    @property
    def head(self) -> Tensor:
        """The output matrix (V, C): that of the embeddings."""
        return self.shared.weight

    @property
    def output_bias(self) -> Tensor | None:
        """What is added to the logits, (1, V)."""
        return self.final_logits_bias

    def enter(self, stack: nn.Module, ids: Tensor, position_ids: Tensor | None) -> Tensor:
        """Return what the first layer of a stack reads of ids (B, T)."""
        x = self.shared(ids)
        if self.config.scale_embedding:
            x = x * self.config.width**0.5
        return drop(stack(x, position_ids), self.config.dropout, self.training)

    def encode(self, ids: Tensor, mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """Return what the encoder makes of source ids (B, S); see EncoderDecoder."""
        x = self.enter(self.encoder, ids, position_ids)
        for layer in self.encoder.layers:
            x = layer.encode(x, mask)
        return x

    def memory(self, encoded: Tensor) -> list[KeyValue]:
        """Return each decoder layer's keys and values of an encoded source; see EncoderDecoder."""
        return [layer.encoder_attn.keys_values(encoded) for layer in self.decoder.layers]

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
        x, presents = self.enter(self.decoder, ids, position_ids), []
        for number, layer in enumerate(self.decoder.layers):
            own = None if past is None else past[number]
            x, present = layer.decode(x, mask, own, memory[number], source_mask)
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
