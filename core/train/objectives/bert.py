"""BERT's two tasks at once: guess hidden tokens, and say whether one text follows another (arXiv:1810.04805).

A window of the text is cut in two behind a sentence, and half of the time the second part is replaced by a piece of the
same length from elsewhere (portlm.data.sentence_pairs). The model reads both with control tokens and segments,
[CLS] first [SEP] second [SEP]; the head for the next sentence reads the pooled [CLS]. The loss is the sum of the mean
over the hidden tokens and the mean over the pairs, as in the code released with the paper.

B rows, T tokens, n tokens of both texts, V vocabulary of the tokenizer.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from portlm.data.batches import IGNORE, BatchSampler
from portlm.data.noising import sentence_ends
from portlm.data.sentence_pairs import sentence_pair
from portlm.errors import ConfigError
from portlm.models import FAMILIES, Config
from portlm.train.config import PretrainConfig
from portlm.train.corpus import Corpus
from portlm.train.evaluation import evaluating
from portlm.train.objectives import Stop
from portlm.train.objectives.masked import MaskedObjective, hide

HEADS = ("masked_lm", "next_sentence")
_ELSEWHERE = 2**63  # added to a step: where its other texts come from
_LAST_STEP = 2**64 - 1  # the step whose random numbers make the held-out pairs


class Pairs(NamedTuple):
    """Pairs of texts with holes.

    Attributes:
        inputs: (B, T) int64, with holes.
        kinds: (B, T) int64, 0 for the first text and 1 for the second, each with the control tokens behind it.
        targets: (B, T) int64, what was there where it counts, -100 elsewhere.
        random: (B,) int64, 1 where the second text comes from elsewhere.
        holes: How many targets count in the step's batch.
        rows: How many pairs it has.
    """

    inputs: Tensor
    kinds: Tensor
    targets: Tensor
    random: Tensor
    holes: int
    rows: int


class BertObjective(MaskedObjective):
    """Cross-entropy of hidden tokens and of whether texts follow each other; judged on held-out text by both."""

    kind = "bert"

    def __init__(self, config: PretrainConfig, corpus: Corpus, device: torch.device):
        super().__init__(config, corpus, device)
        self.ends = sentence_ends(corpus.tokenizer)
        self.window -= len(self.end)  # n
        rows = config.data.batch_size * self.parts
        self.sampler = BatchSampler(corpus.train, rows, self.window, config.seed)

    def shape(self, config: Config) -> Config:
        """Return the configuration with both heads.

        Raises:
            ConfigError: The family has no such head, or segments for two texts.
        """
        able = [
            name
            for name, family in FAMILIES.items()
            if HEADS in getattr(family.config_class(), "ARCHITECTURES", {}).values()
        ]
        if config.family not in able:
            raise ConfigError(
                f"objective bert needs a head for the next sentence, and a {config.family} has none: set "
                f"model.family = {' or '.join(able)}, or objective = masked"
            )
        return dataclasses.replace(config, heads=HEADS)

    def check(self) -> None:
        """Refuse a context that does not hold two texts."""
        if self.context < 8:
            raise ConfigError(f"model.context_length {self.context} holds no two texts: give at least 8")

    def batches(self) -> Sequence[Any]:
        """Return pairs of texts with holes in them."""
        step = self.sampler.step
        ids, _ = next(self.sampler)
        inputs, kinds, targets, labels = self._pairs(ids, step)
        total, rows = int((targets != IGNORE).sum()), len(ids) // self.parts
        parts = []
        for i in range(0, len(ids), rows):
            a, b, c, d = (self._tensor(array[i : i + rows]) for array in (inputs, kinds, targets, labels))
            parts.append(Pairs(a, b, c, d, total, len(ids)))
        return parts

    def loss(self, batch: Any) -> Tensor:
        """Return a part's share in the mean over the hidden tokens plus the mean over the pairs."""
        hidden, follows = self._logits(batch)
        wanted = batch.targets.flatten()
        wanted = wanted[wanted != IGNORE]
        return (
            F.cross_entropy(hidden, wanted, reduction="sum") / batch.holes
            + F.cross_entropy(follows, batch.random, reduction="sum") / batch.rows
        )

    def evaluate(self, stop: Stop) -> dict[str, float] | None:
        """Return ``loss``, the sum of the two, which follow with the share of each that is right."""
        sums = np.zeros(6)
        with evaluating(self.model), torch.no_grad():
            for pairs in self._judged():
                if stop():
                    return None
                hidden, follows = self._logits(pairs)
                wanted = pairs.targets.flatten()
                sums += [
                    part
                    for logits, right in ((hidden, wanted[wanted != IGNORE]), (follows, pairs.random))
                    for part in (
                        F.cross_entropy(logits.float(), right, reduction="sum").item(),
                        int((logits.argmax(-1) == right).sum()),
                        len(right),
                    )
                ]
        masked, guessed, holes, following, told, rows = sums.tolist()
        return {
            "loss": masked / holes + following / rows,
            "masked_loss": masked / holes,
            "accuracy": guessed / holes,
            "next_sentence_loss": following / rows,
            "next_sentence_accuracy": told / rows,
        }

    def _logits(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """What both heads say: (holes of these rows, V) and (B, 2)."""
        hidden, pooled = self.model.encode(pairs.inputs, None, pairs.kinds)
        places = (pairs.targets.flatten() != IGNORE).nonzero().squeeze(1)
        tokens = self.model.apply_head("masked_lm", hidden.flatten(0, 1).index_select(0, places))
        return tokens, self.model.apply_head("next_sentence", pooled)

    def _judged(self) -> Iterator[Pairs]:
        """Yield pairs of held-out windows, whole ones, or all of the text as one; always the same."""
        for number, windows in enumerate(self.held_out_windows(self.window)):
            arrays = self._pairs(windows, _LAST_STEP - number)
            a, b, c, d = (self._tensor(array) for array in arrays)
            yield Pairs(a, b, c, d, int((arrays[2] != IGNORE).sum()), len(windows))

    def _pairs(self, ids: np.ndarray, step: int) -> tuple[np.ndarray, ...]:
        """Make inputs, kinds, targets and labels of windows (B, n), as a function of the seed and the step alone."""
        seed, (before,), (behind,) = self.config.seed, self.begin, self.end
        key = np.array([seed, step], np.uint64)
        random = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, 2]))  # 1: what is hidden
        others, _ = self.sampler.batch((step + _ELSEWHERE) % 2**64)
        pairs = [
            sentence_pair(row, other[: len(row)], self.ends, random)
            for row, other in zip(ids, others, strict=False)
        ]
        n = ids.shape[1]
        texts, kinds = np.full((len(ids), n + 3), IGNORE, np.int64), np.zeros((len(ids), n + 3), np.int64)
        controls = np.zeros_like(texts)
        for row, pair in enumerate(pairs):
            a = len(pair.first)
            texts[row, 1 : a + 1], texts[row, a + 2 : n + 2] = pair.first, pair.second
            controls[row, [0, a + 1, n + 2]] = before, behind, behind
            kinds[row, a + 2 :] = 1
        inputs, targets = hide(texts, seed, step, self.vocab_size, self.mask_id)
        labels = np.array([pair.random for pair in pairs], np.int64)
        return np.where(texts == IGNORE, controls, inputs), kinds, targets, labels
