"""The models of the race: LLaMA shapes with random weights, whose activations and logits stay of order one.

Speed does not depend on what the weights are. Quality does: with random weights the top-1 agreement of 4-bit engines
says how exact their arithmetic is, not what quantizing costs a trained model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from portlm.compile.export import export
from portlm.models import build, save_model
from portlm.models.llama import LlamaConfig
from portlm.tokenizer import byte_tokenizer

CONTEXT = 2048
EOS = "<|endoftext|>"


@dataclass(frozen=True)
class Shape:
    """A LLaMA shape with an untied head."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    vocab: int
    note: str

    def config(self) -> LlamaConfig:
        """As portlm has it."""
        return LlamaConfig(
            vocab_size=self.vocab, context_length=CONTEXT, n_layer=self.layers, n_head=self.heads,
            n_kv_head=self.kv_heads, width=self.width, hidden=self.hidden, rms_norm_eps=1e-5,
        )  # fmt: skip


SHAPES = {
    "0.6M": Shape(2, 128, 4, 2, 352, 1024, "in a core's own cache: what is not the kernels' shows"),
    "30M": Shape(8, 512, 8, 4, 1280, 8192, "with 4-bit weights in the shared cache, in float32 in memory"),
    "125M": Shape(12, 768, 12, 4, 2048, 32000, "in memory"),
    "254M": Shape(16, 1024, 16, 8, 2816, 32000, "in memory in every precision"),
}


def make(name: str, folder: Path) -> Path:
    """Draw a model and export it into a folder, unless it is there; return the artifact."""
    artifact = folder / "artifact"
    if artifact.exists():
        return artifact
    torch.manual_seed(sum(map(ord, name)))
    model = build(SHAPES[name].config())
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if p.dim() == 1:
                p.normal_(1.0, 0.1)
            else:
                p.normal_(0.0, 1.0 if "embed_tokens" in parameter_name else p.shape[1] ** -0.5)
    save_model(folder / "checkpoint", model, byte_tokenizer(EOS))
    export(folder / "checkpoint", artifact)
    return artifact
