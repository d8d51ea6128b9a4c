"""GPT-2 as a graph: learned positions, LayerNorm before each sublayer, GELU, biases, head tied to the embedding.

B batch, T time, P past, C width, H heads, D head width, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from portlm.compile.families import MAX_LAYERS, MAX_VOCABULARY, CacheShape, choice, positive, refuse, whole
from portlm.compile.forms import FAR, Forms
from portlm.errors import FormatError

ACTIVATIONS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}


@dataclass(frozen=True)
class GPT2Decoder:
    """One GPT-2, by its sizes."""

    vocab_size: int
    context_length: int
    n_layer: int
    n_head: int
    width: int
    hidden: int
    layer_norm_eps: float
    approximate: str  # of gelu: "tanh" or "none"
    tied: bool

    family = "gpt2"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "GPT2Decoder":
        """Read the fields of a Hugging Face config.json; FormatError names the one that does not fit."""
        refuse(config, "scale_attn_weights", True)
        refuse(config, "scale_attn_by_inverse_layer_idx", False)
        refuse(config, "add_cross_attention", False)
        width, n_head = whole(config, "n_embd"), whole(config, "n_head")
        if width % n_head:
            raise FormatError(f"config.json: n_head = {n_head} does not divide n_embd = {width}")
        return cls(
            vocab_size=whole(config, "vocab_size", MAX_VOCABULARY),
            context_length=whole(config, "n_positions", int(FAR) - 1),
            n_layer=whole(config, "n_layer", MAX_LAYERS),
            n_head=n_head,
            width=width,
            hidden=whole(config, "n_inner", default=4 * width),
            layer_norm_eps=positive(config, "layer_norm_epsilon", 1e-5),
            approximate=choice(config, "activation_function", ACTIVATIONS, "gelu_new"),
            tied=choice(config, "tie_word_embeddings", {True: True, False: False}, True),
        )

    @property
    def cache(self) -> CacheShape:
        """Every head keeps its own keys and values."""
        head_dim = self.width // self.n_head
        return CacheShape(self.vocab_size, self.context_length, self.n_layer, self.n_head, self.n_head, head_dim)

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face's names; linear weights are (in, out), as its Conv1D keeps them."""
        C, F = self.width, self.hidden
        shapes: dict[str, tuple[int, ...]] = {
            "transformer.wte.weight": (self.vocab_size, C),
            "transformer.wpe.weight": (self.context_length, C),
        }
        for layer in range(self.n_layer):
            for name, shape in (
                ("ln_1", (C,)),
                ("attn.c_attn", (C, 3 * C)),
                ("attn.c_proj", (C, C)),
                ("ln_2", (C,)),
                ("mlp.c_fc", (C, F)),
                ("mlp.c_proj", (F, C)),
            ):
                shapes[f"transformer.h.{layer}.{name}.weight"] = shape
                shapes[f"transformer.h.{layer}.{name}.bias"] = shape[-1:]
        shapes["transformer.ln_f.weight"] = shapes["transformer.ln_f.bias"] = (C,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, C)
        return shapes

    def weights(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Nothing to turn around but an untied head."""
        return {name: tensor.T if name == "lm_head.weight" else tensor for name, tensor in tensors.items()}

    def emit(self, forms: Forms) -> None:
        """The decoder; `h` is the residual stream, `x` what the next sublayer reads."""
        g, C, H, D, eps = forms.g, self.width, self.n_head, self.width // self.n_head, self.layer_norm_eps
        mask = forms.mask("attention_mask", "position_ids", self.context_length, group=1)
        tokens = forms.embedding("input_ids", "transformer.wte")
        positions = forms.embedding("position_ids", "transformer.wpe")
        h = g.op("Add", (tokens, positions), "transformer.embedding")  # (B, T, C)
        x = forms.layer_norm(h, "transformer.h.0.ln_1", eps)

        for layer in range(self.n_layer):
            block = f"transformer.h.{layer}"
            joint = forms.linear(x, f"{block}.attn.c_attn")  # (B, T, 3 C)
            names = [f"{block}.attn.{part}" for part in "qkv"]
            parts = g.split_op("Split", (joint, g.ints(C, C, C)), f"{block}.attn.qkv", names, axis=-1)
            q, k, v = (forms.heads(part, H, D, name) for part, name in zip(parts, names, strict=True))
            x = forms.attention(q, k, v, mask, layer, H, H, D, f"{block}.attn")
            x = forms.linear(x, f"{block}.attn.c_proj")
            x, h = forms.add_layer_norm(x, h, f"{block}.ln_2", eps)

            x = forms.gelu_mlp(x, f"{block}.mlp", "c_fc", "c_proj", self.approximate)
            last = layer + 1 == self.n_layer
            x, h = forms.add_layer_norm(x, h, "transformer.ln_f" if last else f"transformer.h.{layer + 1}.ln_1", eps)

        if self.tied:
            forms.tied_head(x, "transformer.wte")
        else:
            forms.head(x, "lm_head")
