"""GPT-2 as a graph: learned positions, LayerNorm before each sublayer, GELU, biases, head tied to the embedding.

B batch, T time, P past, C width, H heads, D head width, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from portlm.compile.families import CacheShape
from portlm.compile.forms import Forms
from portlm.errors import ConfigError
from portlm.models.config_json import MAX_WIDTH, Reader, check_bounds

ACTIVATIONS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}

# Keys that concern training, other heads or half precision, never these logits.
HARMLESS = (
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "initializer_range",
    "portlm_init",
    "bos_token_id",
    "eos_token_id",
    "reorder_and_upcast_attn",
    "summary_type",
    "summary_use_proj",
    "summary_activation",
    "summary_proj_to_labels",
    "summary_first_dropout",
)


@dataclass(frozen=True)
class GPT2Decoder:
    """One GPT-2, by its sizes."""

    cache: CacheShape
    width: int
    layer_norm_eps: float
    approximate: str  # of gelu: "tanh" or "none"

    family: ClassVar[str] = "gpt2"

    def __post_init__(self) -> None:
        check_bounds(self, {"width": (1, MAX_WIDTH), "layer_norm_eps": (1e-12, 0.1)})

    @classmethod
    def from_config(cls, read: Reader) -> Self:
        """Read a Hugging Face config.json.

        Raises:
            ConfigError: a key is missing, unknown, out of range or asks for another model.
        """
        read.require("model_type", "gpt2")
        width, n_head, context = read.integer("n_embd"), read.integer("n_head"), read.integer("n_positions")
        if n_head < 1 or width % n_head:
            raise ConfigError(f"n_head {n_head} does not divide n_embd {width}")
        read.require("n_inner", 4 * width)
        read.require("n_ctx", context)
        read.require("scale_attn_weights", True)
        read.require("scale_attn_by_inverse_layer_idx", False)
        read.require("add_cross_attention", False)
        read.require("is_encoder_decoder", False)
        read.require("tie_word_embeddings", True)
        read.require("pruned_heads", {})
        vocab_size, n_layer = read.integer("vocab_size"), read.integer("n_layer")
        decoder = cls(
            cache=CacheShape(vocab_size, context, n_layer, n_head, n_head, width // n_head),
            width=width,
            layer_norm_eps=read.number("layer_norm_epsilon", 1e-5),
            approximate=read.choice("activation_function", "gelu_new", ACTIVATIONS),
        )
        read.finish(*HARMLESS)
        return decoder

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face's names; linear weights are (in, out), as its Conv1D keeps them."""
        C = self.width
        shapes: dict[str, tuple[int, ...]] = {
            "transformer.wte.weight": (self.cache.vocab_size, C),
            "transformer.wpe.weight": (self.cache.context_length, C),
        }
        for layer in range(self.cache.n_layer):
            for name, shape in (
                ("ln_1", (C,)),
                ("attn.c_attn", (C, 3 * C)),
                ("attn.c_proj", (C, C)),
                ("ln_2", (C,)),
                ("mlp.c_fc", (C, 4 * C)),
                ("mlp.c_proj", (4 * C, C)),
            ):
                shapes[f"transformer.h.{layer}.{name}.weight"] = shape
                shapes[f"transformer.h.{layer}.{name}.bias"] = shape[-1:]
        shapes["transformer.ln_f.weight"] = shapes["transformer.ln_f.bias"] = (C,)
        return shapes

    def weights(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """As they are: Conv1D keeps its weights the way MatMul takes them."""
        return dict(tensors)

    def emit(self, forms: Forms) -> None:
        """The decoder; `h` is the residual stream, `x` what the next sublayer reads."""
        g, C, eps = forms.g, self.width, self.layer_norm_eps
        H, D, L = self.cache.n_head, self.cache.head_dim, self.cache.n_layer
        mask = forms.mask("attention_mask", "position_ids", self.cache.context_length, group=1)
        tokens = forms.embedding("input_ids", "transformer.wte")
        positions = forms.embedding("position_ids", "transformer.wpe")
        h = g.op("Add", (tokens, positions), "transformer.embedding")  # (B, T, C)
        x = forms.layer_norm(h, "transformer.h.0.ln_1", eps)

        for layer in range(L):
            block = f"transformer.h.{layer}"
            joint = forms.linear(x, f"{block}.attn.c_attn")  # (B, T, 3 C)
            names = [f"{block}.attn.{part}" for part in "qkv"]
            parts = g.split_op("Split", (joint, g.ints(C, C, C)), f"{block}.attn.qkv", names, axis=-1)
            q, k, v = (forms.heads(part, H, D, name) for part, name in zip(parts, names, strict=True))
            x = forms.attention(q, k, v, mask, layer, H, H, D, f"{block}.attn")
            x = forms.linear(x, f"{block}.attn.c_proj")
            x, h = forms.add_layer_norm(x, h, f"{block}.ln_2", eps)

            x = forms.gelu_mlp(x, f"{block}.mlp", "c_fc", "c_proj", self.approximate)
            norm = "transformer.ln_f" if layer + 1 == L else f"transformer.h.{layer + 1}.ln_1"
            x, h = forms.add_layer_norm(x, h, norm, eps)

        forms.tied_head(x, "transformer.wte")
