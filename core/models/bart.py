"""BART: the Transformer of 2017, pretrained to restore text that was damaged, with four changes.

Lewis et al., "BART: Denoising Sequence-to-Sequence Pre-training for Natural Language Generation, Translation, and
Comprehension" (arXiv:1910.13461), and the code released with it, fairseq.

- learned positions instead of sinusoids, for encoder and decoder apart, in rows from 2 on of their tables
- a LayerNorm on what enters either stack
- GELU, in its exact form, instead of ReLU
- weights begin as N(0, 0.02)

B batch, T tokens, C width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from portlm.models.layers import Embedding, LayerNorm
from portlm.models.post_norm import EPSILON, PostNorm, Stack
from portlm.models.post_norm_config import Activation, PostNormConfig
from portlm.ops.embedding import embedding

FIRST_ROW = 2  # of position 0: fairseq keeps one for padding and counts from 1


@dataclass(frozen=True)
class BartConfig(PostNormConfig):
    """The shape of a BART model; the defaults are the large one."""

    family: ClassVar[str] = "bart"
    ARCHITECTURE: ClassVar[str] = "BartForConditionalGeneration"
    BARE: ClassVar[str] = "BartModel"
    DEFAULTS: ClassVar[dict[str, Any]] = {"vocab_size": 50265, "decoder_start_token_id": 2}
    FIXED: ClassVar[dict[str, Any]] = {
        "normalize_before": False,
        "normalize_embedding": True,
        "static_position_embeddings": False,
        "add_final_layer_norm": False,
        "add_bias_logits": False,
    }

    vocab_size: int = 50265
    context_length: int = 1024
    n_layer: int = 12
    n_decoder_layer: int = 12
    n_head: int = 16
    width: int = 1024
    hidden: int = 4096
    activation: Activation = "gelu"
    scale_embedding: bool = False


_TOKENS: dict[str, Any] = {
    "decoder_start_token_id": 2, "bos_token_id": 0, "eos_token_ids": (2,), "pad_token_id": 1,
}  # fmt: skip
PRESETS = {
    "bart-base": BartConfig(n_layer=6, n_decoder_layer=6, n_head=12, width=768, hidden=3072, **_TOKENS),
    "bart-large": BartConfig(**_TOKENS),
}
PARAMETERS = {  # as published, the shared embedding counted once
    "bart-base": 139_420_416,
    "bart-large": 406_291_456,
}


class Entrance(Stack):
    """Adds where a token stands to what it is, and normalises the sum."""

    def __init__(self, config: BartConfig):
        super().__init__()
        self.embed_positions = Embedding(config.context_length + FIRST_ROW, config.width)
        self.layernorm_embedding = LayerNorm(config.width, EPSILON)

    def forward(self, x: Tensor, position_ids: Tensor | None) -> Tensor:
        """Map (B, T, C) to the same."""
        table = self.embed_positions.weight[FIRST_ROW:]
        places = table[: x.shape[1]] if position_ids is None else embedding(position_ids, table)
        normed: Tensor = self.layernorm_embedding(x + places, None)[0]
        return normed


class Bart(PostNorm):
    """A BART model with randomly initialised weights."""

    def stack(self) -> Stack:
        """Return what adds positions and normalises."""
        return Entrance(self.config)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw fresh weights from PyTorch's global generator: N(0, init_std²) for matrices, biases 0, gains 1."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif p.dim() == 1:
                p.fill_(1.0)
            else:
                p.normal_(0.0, self.config.init_std)

    @staticmethod
    def hf_alias(name: str) -> str | None:
        """Return the usual name of a tensor in a foreign file, or None for one that holds no parameter."""
        return None if name.endswith(".version") else PostNorm.hf_alias(name)
