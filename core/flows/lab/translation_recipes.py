"""How the models of the translation experiment are trained: the settings of ``portlm pretrain``, as data.

They are the published recipes at a size for some ten thousand short pairs and two cores. What all share is what the
comparison must not depend on: the tokenizer, the batches, the optimiser, the judging.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Vaswani et al. (2017): Adam with these betas, label smoothing, warm-up. The rate then falls along a cosine to nothing
# instead of with the root of the step, which does the work of the averaged checkpoints of the paper.
SHARED: Mapping[str, Any] = {
    "objective": "seq2seq",
    "label_smoothing": 0.1,
    "precision": "bf16",
    "log_interval": 20,
    "data.tokenizer": "bpe:6000",  # one for both languages
    "data.batch_size": 128,
    "model.context_length": 96,
    "optimizer.beta2": 0.98,
    "optimizer.eps": 1e-9,
    "optimizer.weight_decay": 1e-4,
    "schedule.warmup": 400.0,
    "schedule.min_lr": 1e-6,
    "evaluation.sample_tokens": 0,
}


@dataclass(frozen=True)
class Recipe:
    """How one model is trained.

    Attributes:
        epochs: How often each pair is seen.
        settings: What differs from SHARED, by name.
    """

    epochs: int
    settings: Mapping[str, Any]

    def overrides(self, pairs: int, more: Mapping[str, Any]) -> dict[str, Any]:
        """Return all settings for a number of pairs to learn from; progress is judged and saved after each epoch."""
        values = {**SHARED, **self.settings, **more}
        epoch = max(1, pairs // values["data.batch_size"])
        counts = {
            "steps": self.epochs * epoch,
            "evaluation.interval": epoch,
            "checkpoint.interval": epoch,
        }
        return {**counts, **values}


RECIPES: Mapping[str, Recipe] = {
    # Sutskever et al. (2014): the source from its end, one state from one network to the other.
    "seq2seq": Recipe(
        15,
        {
            "model.family": "seq2seq",
            "model.n_layer": 2,
            "model.width": 384,
            "model.dropout": 0.3,
            "optimizer.lr": 1e-3,
        },
    ),
    # Bahdanau et al. (2015): as wide in all as the one above.
    "bahdanau": Recipe(
        15,
        {
            "model.family": "bahdanau",
            "model.width": 256,
            "model.maxout": 256,
            "model.dropout": 0.3,
            "optimizer.lr": 1e-3,
        },
    ),
    # Vaswani et al. (2017).
    "marian": Recipe(
        20,
        {
            "model.family": "marian",
            "model.n_layer": 3,
            "model.n_head": 8,
            "model.width": 256,
            "model.hidden": 1024,
            "model.dropout": 0.2,
            "optimizer.lr": 1e-3,
        },
    ),
}
