"""The same small GPT in C with OpenMP, OpenCL, WGSL and on Vulkan: the same answer, and what fusing kernels saves.

A model of random weights is exported, and its portable graph goes through each back end twice, with operators fused and
one kernel for each of them (portlm.flows.backends). What is counted has a bar for the LLaMA, whose norms, rotations and
gates are many operators. GPT-2 is told without one: its graph has layer norm, GELU and softmax as one operator each, so
that less is left to fuse.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import torch

from portlm.flows.backends import RAN, compare
from portlm.flows.lab.experiment import Bar
from portlm.flows.lab.fitting import fresh, seeded
from portlm.models import Config, save_model
from portlm.models.gpt2 import GPT2Config
from portlm.models.llama import LlamaConfig
from portlm.tokenizer import byte_tokenizer

_MODELS: dict[str, Config] = {"llama": LlamaConfig.tiny(), "gpt2": replace(GPT2Config.tiny(), width=32)}
_ROWS, _TOKENS = 2, 16
_SCALE = 0.3  # of random weights: logits are then as large as a trained model's


class Backends:
    """A LLaMA and a GPT-2 of two layers, on rows of 16 tokens."""

    name: ClassVar[str] = "backends"
    shows: ClassVar[str] = (
        "One graph gives the same answer in C with OpenMP, OpenCL, WGSL and on Vulkan, and fused kernels are fewer."
    )
    source: ClassVar[str] = "Chen et al., 2018 (TVM), section 3"
    seeds: ClassVar[tuple[int, ...]] = (0,)
    bars: ClassVar[tuple[Bar, ...]] = (
        Bar("largest_error", "<=", 1e-4),  # of both models and all back ends, fused and not
        Bar(
            "largest_share_of_kernels", "<=", 0.6
        ),  # fused, of those that are not: the LLaMA in TVM's languages
        Bar("backends", "==", float(len(RAN))),  # fewer where a driver is missing, which is told
    )

    def run(self, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
        """Export both models, run them everywhere, and count."""
        generator = seeded(seed)
        figures: dict[str, Any] = {"columns": {}, "missing": {}}
        for name, config in _MODELS.items():
            ids = generator.integers(0, config.vocab_size, (_ROWS, _TOKENS))
            with tempfile.TemporaryDirectory() as folder:
                checkpoint = _saved(config, seed, Path(folder) / "checkpoint")
                columns, missing = compare(checkpoint, ids, partial(_told, tell, name))
            figures["columns"][name] = [msgspec.to_builtins(column) for column in columns]
            figures["missing"] |= missing
        every = [column for columns in figures["columns"].values() for column in columns]
        counted = [column for column in figures["columns"]["llama"] if RAN[column["name"]][0]]
        shares = [column["kernels"] / column["kernels_unfused"] for column in counted]
        return figures | {
            "largest_error": max(column["error"] for column in every),
            "largest_share_of_kernels": max(shares),
            "backends": len({column["name"] for column in every}),
        }

    def draw(self, results: Mapping[int, dict[str, Any]], path: Path) -> None:
        """Draw the errors, and the kernels of a call, by back end."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4), layout="constrained")
        errors, kernels = figure.subplots(1, 2)
        for number, model in enumerate(_MODELS):
            for place, result in enumerate(results.values()):
                columns = result["columns"][model]
                names, label = [column["name"] for column in columns], model if place == 0 else None
                errors.plot(
                    names, [column["error"] for column in columns], "o", color=f"C{number}", label=label
                )
                for key, style in (("kernels_unfused", "s"), ("kernels", "o")):
                    what = f"{model}, {'fused' if key == 'kernels' else 'one by one'}" if place == 0 else None
                    counts = [column[key] for column in columns]
                    kernels.plot(names, counts, style, color=f"C{number}", label=what)
        errors.set_yscale("log")
        errors.set_ylabel("largest error of a logit, against eager PyTorch")
        kernels.set_ylabel("kernels of a call (vulkan: nodes)")
        for axes in (errors, kernels):
            axes.legend()
        figure.savefig(path, dpi=120)


def _told(tell: Callable[[str], None], name: str, line: str) -> None:
    tell(f"{name}, {line}")


def _saved(config: Config, seed: int, folder: Path) -> Path:
    """A checkpoint of random weights."""
    model: Any = fresh(config, seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape)
            p.copy_(_SCALE * noise if p.dim() > 1 else p + 0.1 * noise)
    save_model(folder, model.eval(), byte_tokenizer("<|endoftext|>"))
    return folder
