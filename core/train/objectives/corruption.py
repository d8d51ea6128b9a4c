"""What the objectives share that take something from a plain text and have a decoder say it: span, denoise, mass.

An objective says how a text is corrupted, what the decoder reads and what it is to say; the batches, the loss and the
judgement are here, once.

B rows, S source tokens, T target tokens, n tokens of a text before it is corrupted.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from portlm import models
from portlm.control_tokens import PADDING, for_reading
from portlm.data.batches import IGNORE, BatchSampler
from portlm.errors import ConfigError
from portlm.train.config import PretrainConfig
from portlm.train.corpus import Corpus
from portlm.train.evaluation import evaluating
from portlm.train.objectives import Stop
from portlm.train.objectives.sides import Part, part
from portlm.train.objectives.text import TextObjective

_LAST_STEP = 2**64 - 1  # the step whose random numbers corrupt the held-out text


class Corrupted(NamedTuple):
    """One text.

    Attributes:
        source: What the encoder reads.
        read: What the decoder reads.
        targets: What it says at each of these, as many; -100 where that does not count.
    """

    source: Sequence[int]
    read: Sequence[int]
    targets: Sequence[int]


class CorruptionObjective(TextObjective):
    """Cross-entropy of what is to be said; judged by that on held-out text, with the same noise each time.

    A class sets ``tokens`` and ``pad`` and replaces :meth:`corrupt`.

    Attributes:
        tokens: n of each window of the text.
        pad: The id behind the end of a short row.
    """

    tokens: int
    pad: int

    def corrupt(self, ids: np.ndarray, random: np.random.Generator) -> Corrupted:
        """Return a text (n,) as it is learned from."""
        raise NotImplementedError

    def read_windows(self, tokens: int) -> None:
        """Draw windows of so many tokens from here on."""
        self.tokens = tokens
        rows = self.config.data.batch_size * self.parts
        self.sampler = BatchSampler(self.corpus.train, rows, tokens, self.config.seed)

    def batches(self) -> Sequence[Part]:
        """Return windows of the text as they are learned from."""
        step = self.sampler.step
        ids, _ = next(self.sampler)
        rows = len(ids) // self.parts
        texts = self._corrupted(ids, step)
        total = sum(map(_counted, texts))
        return [self._part(texts[i : i + rows], total) for i in range(0, len(texts), rows)]

    def loss(self, batch: Part) -> Tensor:
        """Return the mean over the targets of a part, weighted by how many of the batch they are."""
        loss: Tensor = self.model(batch.source, batch.read, batch.targets, batch.mask)
        return loss * batch.share

    def evaluate(self, stop: Stop) -> dict[str, float] | None:
        """Return ``loss`` in nats per target token."""
        total, count = 0.0, 0
        with evaluating(self.model), torch.no_grad():
            for number, ids in enumerate(self.held_out_windows(self.tokens)):
                if stop():
                    return None
                rows = self._part(self._corrupted(ids, _LAST_STEP - number), 1)
                n = int((rows.targets != IGNORE).sum())
                total += self.model(rows.source, rows.read, rows.targets, rows.mask).item() * n
                count += n
        return {"loss": total / count}

    def sample(self, stop: Stop) -> str | None:
        """Return nothing."""
        return None

    def _corrupted(self, ids: np.ndarray, step: int) -> list[Corrupted]:
        """Corrupt texts, as a function of the seed and the step alone."""
        # Another stream than that of the places in the text, whose counter begins at 0 (portlm.data.batches).
        key = np.array([self.config.seed, step], np.uint64)
        random = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, 1]))
        return [self.corrupt(row, random) for row in ids]

    def _part(self, texts: Sequence[Corrupted], total: int) -> Part:
        sources, read, targets = zip(*texts, strict=True)
        return part(sources, read, targets, pad=self.pad, total=total, device=self.device)


class ReadingObjective(CorruptionObjective):
    """One whose texts stand between the control tokens of an encoder, and are hidden by its mask.

    The tokenizer gets such tokens where it has none and is saved with them, so that afterwards a session reads a source
    as it was learned, and a mask can be written in it.
    """

    def __init__(self, config: PretrainConfig, corpus: Corpus, device: torch.device):
        own = corpus.tokenizer.vocab_size
        self.tokenizer, self.mask_id = for_reading(corpus.tokenizer)
        self.begin, self.end = self.tokenizer.begin_ids, self.tokenizer.end_ids
        special = self.tokenizer.special
        self.pad = special.get(PADDING, special.get("<pad>", self.end[-1]))
        super().__init__(config, corpus, device, extra_tokens=self.tokenizer.vocab_size - own)
        self.model.config = dataclasses.replace(
            self.model.config,
            decoder_start_token_id=self.end[-1],
            pad_token_id=self.pad,
            eos_token_ids=(self.end[-1],),
        )

    def check(self) -> None:
        """Refuse a context that holds control tokens alone."""
        if self.context < 8:
            raise ConfigError(
                f"model.context_length {self.context} is too short for objective {self.kind}: give at least 8"
            )

    def save(self, folder: Path) -> None:
        """Write a checkpoint folder with the tokenizer."""
        models.save_model(folder, self.model, self.tokenizer)


def _counted(text: Corrupted) -> int:
    return sum(token != IGNORE for token in text.targets)
