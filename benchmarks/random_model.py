"""A model of random weights, exported: what the benchmarks of whole engines write with."""

from pathlib import Path

__all__ = ["export_random"]


def export_random(
    folder: Path,
    vocabulary: int,
    layers: int,
    heads: int,
    width: int,
    *,
    context: int,
    quantize: str | None = None,
) -> Path:
    """Export a random GPT-2 of these sizes, perhaps quantized; return the artifact, not compiled yet."""
    import torch

    from portlm.compile.export import export
    from portlm.models import build, save_model
    from portlm.models.gpt2 import GPT2Config

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, context_length=context, n_layer=layers, n_head=heads, width=width
    )
    save_model(folder / "checkpoint", build(config))
    return export(folder / "checkpoint", folder / "artifact", quantize=quantize)
