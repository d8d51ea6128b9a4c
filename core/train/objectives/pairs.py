"""What objectives over pairs share: batches of like length, pairs to judge by, and where a run stands."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from portlm import models
from portlm.data.batches import IGNORE
from portlm.data.pairs import PairSampler
from portlm.errors import ConfigError, FormatError, UsageError
from portlm.train.config import PretrainConfig
from portlm.train.evaluation import evaluating
from portlm.train.objectives import Stop


class PairObjective:
    """Pairs that fit the context, in as many parts as the settings say. A kind of pair fills in the methods at the end.

    Args:
        config: The settings of the run.
        corpus: The pairs, with ``tokenizer``, ``train``, ``validation`` and ``digest``.
        device: Where the model trains.
        model: What is trained.
    """

    kind: ClassVar[str]
    model: Any

    def __init__(self, config: PretrainConfig, corpus: Any, device: torch.device, model: Any):
        self.config, self.corpus, self.device = config, corpus, device
        self.parts = config.data.accumulate
        self.pairs, self.judged = (
            [pair for pair in pairs if self.fits(pair, model.config)]
            for pairs in (corpus.train, corpus.validation)
        )
        if not self.judged:
            raise UsageError(f"no pair to judge by fits the context of {model.config.context_length} tokens")
        self.model = model.to(device)
        lengths = np.array([self.lengths(pair) for pair in self.pairs]).reshape(-1, 2)
        self.sampler = PairSampler(lengths, config.data.batch_size * self.parts, config.seed)
        self._tokens = float(lengths.sum(axis=1).mean()) + 1

    @property
    def tokens_per_step(self) -> int:
        """Tokens of both sides that a step reads, on average."""
        return round(self._tokens * self.sampler.batch_size)

    def facts(self) -> dict[str, int]:
        """Return the sizes of vocabulary and data, and how many pairs do not fit the context."""
        every = len(self.corpus.train) + len(self.corpus.validation)
        return {
            "vocab_size": self.model.config.vocab_size,
            "train_pairs": len(self.pairs),
            "held_out_pairs": len(self.judged),
            "pairs_left_out": every - len(self.pairs) - len(self.judged),
        }

    def batches(self) -> Sequence[Any]:
        """Return pairs of like length, in as many parts as the settings say."""
        chosen = [self.pairs[i] for i in next(self.sampler).tolist()]
        total = sum(self.targets_of(pair) for pair in chosen)
        rows = len(chosen) // self.parts
        return [self.part(chosen[i : i + rows], total) for i in range(0, len(chosen), rows)]

    def loss(self, batch: Any) -> Tensor:
        """Return the mean over the targets of a part, weighted by how many of the batch they are."""
        share: float = batch.share
        return self.mean(batch, self.config.label_smoothing) * share

    def metrics(self) -> dict[str, float]:
        """Return nothing further."""
        return {}

    def evaluate(self, stop: Stop) -> dict[str, float] | None:
        """Return ``loss`` in nats per target token, of the pairs that were not learned from."""
        total, count = 0.0, 0
        with evaluating(self.model), torch.no_grad():
            for part in self._judged():
                if stop():
                    return None
                n = int((part.targets != IGNORE).sum())
                total += self.mean(part, 0.0).item() * n
                count += n
        return {"loss": total / count}

    def save(self, folder: Path) -> None:
        """Write a checkpoint folder with the tokenizer."""
        models.save_model(folder, self.model, self.corpus.tokenizer)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return where the sampler of batches stands, and what identifies the pairs."""
        return {"step": self.sampler.step, "data": self.corpus.digest}, {}

    def restore(self, folder: Path, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint.

        Raises:
            FormatError: The state is damaged, or the weights do not fit this model.
            ConfigError: It was trained on other pairs.
        """
        if type(state.get("step")) is not int or state["step"] < 0:
            raise FormatError(f"the state in {folder} says nothing of the sampler of batches")
        if state.get("data") != self.corpus.digest:
            raise ConfigError(
                "the pairs are not those of the checkpoint: resume with the same files and tokenizer"
            )
        self.model.load_state_dict(models.load_model(folder).state_dict())
        self.sampler.step = state["step"]

    def _judged(self) -> Iterator[Any]:
        """Yield the pairs to judge by in batches of like length."""
        order = sorted(range(len(self.judged)), key=lambda i: tuple(self.lengths(self.judged[i])))
        size = self.config.data.batch_size
        for begin in range(0, len(order), size):
            yield self.part([self.judged[i] for i in order[begin : begin + size]], 1)

    def fits(self, pair: Any, shape: Any) -> bool:
        """Say whether a model of a shape can read a pair."""
        raise NotImplementedError

    def lengths(self, pair: Any) -> tuple[int, int]:
        """Return the tokens of both sides."""
        raise NotImplementedError

    def targets_of(self, pair: Any) -> int:
        """Return how many tokens of a pair are predicted."""
        raise NotImplementedError

    def part(self, pairs: Sequence[Any], total: int) -> Any:
        """Return pairs as tensors, of a batch with so many targets."""
        raise NotImplementedError

    def mean(self, part: Any, label_smoothing: float) -> Tensor:
        """Return the mean cross-entropy over the targets of a part."""
        raise NotImplementedError
