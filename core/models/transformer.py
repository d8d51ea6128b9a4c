"""The Transformer: an encoder and a decoder of attention alone, made for translation.

Vaswani et al., "Attention Is All You Need" (arXiv:1706.03762), and the code released with it, tensor2tensor.

- attention in place of recurrence: all positions at once, so where a token stands must be said beside what it is
- positions are sinusoids, sines in the first half of the width and cosines in the second, as in tensor2tensor
- one matrix is the embedding of source and target and the output layer; embeddings are multiplied by sqrt(C)
- ReLU between the two maps of the MLP; LayerNorm behind each sublayer

In Hugging Face's words this is Marian, whose files are read and written: OPUS-MT's have SiLU and a bias of the logits.

B batch, T tokens, C width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from portlm.models.post_norm import PostNorm, Stack
from portlm.models.post_norm_config import Activation, PostNormConfig
from portlm.ops.embedding import embedding


@dataclass(frozen=True)
class TransformerConfig(PostNormConfig):
    """The shape of a Transformer; the defaults are the base model, with its 37000 byte pairs."""

    family: ClassVar[str] = "marian"
    ARCHITECTURE: ClassVar[str] = "MarianMTModel"
    BARE: ClassVar[str] = "MarianModel"
    DEFAULTS: ClassVar[dict[str, Any]] = {"vocab_size": 58101, "decoder_start_token_id": 58100}
    FIXED: ClassVar[dict[str, Any]] = {
        "share_encoder_decoder_embeddings": True,
        "decoder_vocab_size": "vocab_size",
        "normalize_before": False,
        "normalize_embedding": False,
        "static_position_embeddings": True,
        "add_final_layer_norm": False,
        "add_bias_logits": False,
    }

    vocab_size: int = 37000
    context_length: int = 512
    n_layer: int = 6
    n_decoder_layer: int = 6
    n_head: int = 8
    width: int = 512
    hidden: int = 2048
    activation: Activation = "relu"
    scale_embedding: bool = True


PRESETS = {
    "transformer-base": TransformerConfig(),
    "transformer-big": TransformerConfig(n_head=16, width=1024, hidden=4096),
}
PARAMETERS = {  # with the shared embedding counted once; the paper prints 65 and 213 million
    "transformer-base": 63_082_496,
    "transformer-big": 214_245_376,
}


def sinusoids(count: int, width: int) -> Tensor:
    """Return the position table (count, width), float32: sin and cos of position / 10000^(2i / width)."""
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(count, dtype=torch.float64)[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=1).float()


class Entrance(Stack):
    """Adds where a token stands to what it is."""

    positions: Tensor  # (context, C), not saved: it follows from the configuration

    def __init__(self, config: TransformerConfig):
        super().__init__()
        table = sinusoids(config.context_length, config.width).to(torch.get_default_dtype())
        self.register_buffer("positions", table, persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor | None) -> Tensor:
        """Map (B, T, C) to the same."""
        if position_ids is None:
            return x + self.positions[: x.shape[1]]
        return x + embedding(position_ids, self.positions)


class Transformer(PostNorm):
    """A Transformer with randomly initialised weights."""

    def stack(self) -> Stack:
        """Return what adds positions."""
        return Entrance(self.config)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw fresh weights from PyTorch's global generator, as tensor2tensor does.

        Matrices are uniform with the variance of Glorot and Bengio (2010), the embedding N(0, 1/C), biases 0, gains 1.
        """
        for name, p in self.named_parameters():
            if name == "shared.weight":
                p.normal_(0.0, p.shape[1] ** -0.5)
            elif name.endswith("bias"):
                p.zero_()
            elif p.dim() == 1:
                p.fill_(1.0)
            else:
                nn.init.xavier_uniform_(p)

    @staticmethod
    def hf_alias(name: str) -> str | None:
        """Return the usual name of a tensor in a foreign file, or None for one that holds no parameter."""
        return None if name.endswith(".embed_positions.weight") else PostNorm.hf_alias(name)
