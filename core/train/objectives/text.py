"""What objectives over plain text share: one model, windows of a corpus, and held-out text to judge by."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from portlm import models
from portlm.data.batches import BatchSampler
from portlm.errors import FormatError
from portlm.train.config import PretrainConfig
from portlm.train.corpus import Corpus
from portlm.train.initial import begun_from, with_ids

Batch = tuple[Tensor, Tensor]  # inputs and targets, both (B, T) int64


class TextObjective:
    """Windows of the training text at random places, in as many parts as the settings say.

    Args:
        config: The settings of the run.
        corpus: The text.
        device: Where the model trains.
        extra_tokens: Ids that the model knows besides those of the tokenizer.
    """

    kind: ClassVar[str]
    sampler: Any  # of batches

    def __init__(self, config: PretrainConfig, corpus: Corpus, device: torch.device, extra_tokens: int = 0):
        self.config, self.corpus, self.device = config, corpus, device
        tokenizer = corpus.tokenizer
        eos = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        vocab_size = tokenizer.vocab_size + extra_tokens
        begun = begun_from(config.init, partial(with_ids, vocab_size))[0] if config.init else None
        shape = self.shape(config.model.config(vocab_size, eos)) if begun is None else begun.config
        self.family, self.context, self.parts = shape.family, shape.context_length, config.data.accumulate
        self.check()
        self.model: Any = (models.build(shape) if begun is None else begun).to(device)
        self.sampler = self.sampled(config.data.batch_size * self.parts)

    def shape(self, config: models.Config) -> models.Config:
        """Return what the settings describe, as this objective needs it."""
        return config

    def sampled(self, rows: int) -> Any:
        """Return what a step reads, so many rows of it."""
        return BatchSampler(self.corpus.train, rows, self.context, self.config.seed)

    def check(self) -> None:
        """Refuse settings that would fail at the first evaluation, before any work is done."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a step reads."""
        return self.config.data.batch_size * self.parts * self.context

    def facts(self) -> dict[str, int]:
        """Return the sizes of vocabulary and text."""
        return {
            "vocab_size": self.model.config.vocab_size,
            "train_tokens": len(self.corpus.train),
            "held_out_tokens": len(self.corpus.validation),
        }

    def batches(self) -> Sequence[Any]:
        """Return windows and the tokens that follow them, in equal parts."""
        inputs, targets = (torch.from_numpy(ids).to(self.device) for ids in next(self.sampler))
        if self.parts == 1:
            return [(inputs, targets)]
        return list(zip(inputs.chunk(self.parts), targets.chunk(self.parts), strict=True))

    def held_out_windows(self, tokens: int) -> Iterator[np.ndarray]:
        """Yield whole windows of the held-out tokens, (B, n) int64 each; all of it as one where it is shorter.

        Args:
            tokens: n.
        """
        held_out = self.corpus.held_out(self.config.evaluation.max_tokens).tokens
        n, size = min(tokens, len(held_out)), self.config.data.batch_size
        windows = np.asarray(held_out[: len(held_out) // n * n]).astype(np.int64).reshape(-1, n)
        for begin in range(0, len(windows), size):
            yield windows[begin : begin + size]

    def metrics(self) -> dict[str, float]:
        """Return nothing further."""
        return {}

    def save(self, folder: Path) -> None:
        """Write a checkpoint folder with the tokenizer."""
        models.save_model(folder, self.model, self.corpus.tokenizer)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return where the sampler of batches stands, and what identifies the text."""
        return {"sampler": self.sampler.state_dict(), "data": self.corpus.digest}, {}

    def restore(self, folder: Path, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint.

        Raises:
            FormatError: The state is damaged, or the weights do not fit this model.
            ConfigError: It was trained on other text, or with other batches.
        """
        self.restore_place(folder, state)
        self.model.load_state_dict(models.load_model(folder).state_dict())

    def restore_place(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Continue with the batches where a checkpoint stood; the errors are those of `restore`."""
        sampler = state.get("sampler")
        if not isinstance(sampler, dict) or not all(type(value) is int for value in sampler.values()):
            raise FormatError(f"the state in {folder} says nothing of the sampler of batches")
        self.corpus.check_digest(state.get("data"))
        self.sampler.load_state_dict(sampler)
