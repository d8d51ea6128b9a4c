"""Say what was taken out of a text: how T5 is pretrained (arXiv:1910.10683), on plain text (portlm.data.spans).

Ids behind those of the tokenizer: the start of a target, which pads, too; an end of text if the tokenizer has none; and
the sentinels, counting down from the last id.

B rows, n tokens of a text before it is corrupted, V vocabulary of the tokenizer.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from portlm.data.batches import IGNORE, BatchSampler
from portlm.data.pairs import padded
from portlm.data.spans import corrupted, noise_mask, random_spans_helper
from portlm.errors import UsageError
from portlm.train.config import PretrainConfig
from portlm.train.corpus import Corpus
from portlm.train.evaluation import evaluating
from portlm.train.objectives import Stop
from portlm.train.objectives.text import TextObjective

_LAST_STEP = 2**64 - 1  # the step whose random numbers corrupt the held-out text


class Part(NamedTuple):
    """Some rows of a step's batch.

    Attributes:
        source: (B, S) int64, texts with sentinels in the place of what was taken out.
        mask: (B, S) int64, 0 on padding.
        read: (B, T) int64, the start token and the target.
        targets: (B, T) int64.
        share: Of the batch's targets that are in these rows.
    """

    source: Tensor
    mask: Tensor
    read: Tensor
    targets: Tensor
    share: float


class SpanObjective(TextObjective):
    """Cross-entropy of what was taken out; judged by that on held-out text, the same holes each time."""

    kind = "span"

    def __init__(self, config: PretrainConfig, corpus: Corpus, device: torch.device):
        V, eos = corpus.tokenizer.vocab_size, corpus.tokenizer.eos_id
        context = config.model.context_length
        if context < 8:
            raise UsageError(
                f"a context of {context} tokens is too short to take spans out of: give at least 8"
            )
        self.tokens = random_spans_helper(context - 1).tokens  # n: a mask that is turned may have a span more
        # Tokens that are taken out, so at least as many as there are spans; and one for the end of a target.
        spans = int(noise_mask(self.tokens, np.random.default_rng(0)).sum()) + 1
        super().__init__(config, corpus, device, extra_tokens=2 + spans)
        self.start, self.end = V, V + 1 if eos is None else eos
        self.first = V + 1 + spans  # <extra_id_0>, the last id of all
        self.model.config = dataclasses.replace(
            self.model.config,
            decoder_start_token_id=self.start,
            pad_token_id=self.start,
            eos_token_ids=(self.end,),
        )
        rows = config.data.batch_size * self.parts
        self.sampler = BatchSampler(corpus.train, rows, self.tokens, config.seed)

    def batches(self) -> Sequence[Part]:
        """Return windows of the text with holes in them, and what belongs there."""
        step = self.sampler.step
        ids, _ = next(self.sampler)
        rows = len(ids) // self.parts
        pairs = self._corrupted(ids, step)
        total = sum(len(target) for _, target in pairs)
        return [self._part(pairs[i : i + rows], total) for i in range(0, len(pairs), rows)]

    def loss(self, batch: Part) -> Tensor:
        """Return the mean over the targets of a part, weighted by how many of the batch they are."""
        loss: Tensor = self.model(batch.source, batch.read, batch.targets, batch.mask)
        return loss * batch.share

    def evaluate(self, stop: Stop) -> dict[str, float] | None:
        """Return ``loss`` in nats per target token, sentinels included."""
        total, count = 0.0, 0
        with evaluating(self.model), torch.no_grad():
            for number, ids in enumerate(self._held_out()):
                if stop():
                    return None
                part = self._part(self._corrupted(ids, _LAST_STEP - number), 1)
                n = int((part.targets != IGNORE).sum())
                total += self.model(part.source, part.read, part.targets, part.mask).item() * n
                count += n
        return {"loss": total / count}

    def sample(self, stop: Stop) -> str | None:
        """Return nothing: sentinels have no text."""
        return None

    def _held_out(self) -> Iterator[np.ndarray]:
        """Yield whole windows of the held-out tokens, (B, n) each; all of it as one where it is shorter."""
        held_out = self.corpus.held_out(self.config.evaluation.max_tokens).tokens
        n = min(self.tokens, len(held_out))
        windows = np.asarray(held_out[: len(held_out) // n * n]).astype(np.int64).reshape(-1, n)
        for begin in range(0, len(windows), self.config.data.batch_size):
            yield windows[begin : begin + self.config.data.batch_size]

    def _corrupted(self, ids: np.ndarray, step: int) -> list[tuple[list[int], list[int]]]:
        """Corrupt texts, as a function of the seed and the step alone."""
        # Another stream than that of the places in the text, whose counter begins at 0 (portlm.data.batches).
        key = np.array([self.config.seed, step], np.uint64)
        random = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, 1]))
        found = []
        for row in ids:
            noise = noise_mask(len(row), random, shifted=True)
            text, target = corrupted(row, noise, self.first, self.end)
            found.append((text.tolist(), target.tolist()))
        return found

    def _part(self, pairs: Sequence[tuple[list[int], list[int]]], total: int) -> Part:
        source = padded([text for text, _ in pairs], self.start)
        mask = (source != self.start).astype(np.int64)
        read = padded([[self.start, *target[:-1]] for _, target in pairs], self.start)
        arrays = source, mask, read, padded([target for _, target in pairs], IGNORE)
        text, there, begun, wanted = (torch.from_numpy(array).to(self.device) for array in arrays)
        return Part(text, there, begun, wanted, sum(len(target) for _, target in pairs) / total)
