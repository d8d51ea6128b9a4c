"""One model, and in each step a mask that says what it learns: how UniLM is pretrained (arXiv:1905.03197).

A third of the steps guess hidden tokens from both sides, a third from a source and what is before them in its target, a
sixth each from what is before them and from what is behind them. Always 15 % of the tokens are hidden, 80 % of the
choices are single tokens and the others two or three side by side (portlm.data.noising), and of the hidden tokens 80 %
are read as masks, 10 % as random tokens and 10 % as they are.

A window of the text is one text, [CLS] text [SEP], where it is read in one direction, and else two, cut behind a
sentence: [CLS] first [SEP] second [SEP]. In a target its closing [SEP] may be hidden, too, so that a model learns where
one ends. Whether the second text follows the first is not asked (objective bert does).

B rows, T tokens, n tokens of a window, V vocabulary of the tokenizer.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from portlm import models
from portlm.control_tokens import PADDING, for_reading
from portlm.data.batches import IGNORE, BatchSampler
from portlm.data.noising import hide_spans, sentence_ends
from portlm.data.sentence_pairs import sentence_cut
from portlm.models.unilm import MODES, bias_of, seen
from portlm.train.config import PretrainConfig
from portlm.train.corpus import Corpus
from portlm.train.evaluation import evaluating
from portlm.train.objectives import Stop
from portlm.train.objectives.text import TextObjective

SHARES = dict(zip(MODES, (1 / 3, 1 / 3, 1 / 6, 1 / 6), strict=True))  # of the steps
_LAST_STEP = 2**64 - 1  # the step whose random numbers hide the held-out tokens


class Part(NamedTuple):
    """Some rows of a step's batch.

    Attributes:
        mode: One of MODES, of the whole batch.
        inputs: (B, T) int64, with holes.
        segments: (B, T) int64, 0 for the first text and the [SEP] behind it, 1 for what follows.
        kinds: (B, T) int64, 0 for what a target sees all of, 1 from the [SEP] behind it on.
        targets: (B, T) int64, what was there where it counts, -100 elsewhere.
        holes: How many targets count in the step's batch.
    """

    mode: str
    inputs: Tensor
    segments: Tensor
    kinds: Tensor
    targets: Tensor
    holes: int


class PrefixObjective(TextObjective):
    """Cross-entropy of hidden tokens; judged on held-out text in every mode."""

    kind = "prefix"

    def __init__(self, config: PretrainConfig, corpus: Corpus, device: torch.device):
        own = corpus.tokenizer.vocab_size
        self.tokenizer, self.mask_id = for_reading(corpus.tokenizer, closed=False)
        special = self.tokenizer.special
        (self.begin,) = self.tokenizer.begin_ids
        (self.end,) = for_reading(corpus.tokenizer)[0].end_ids
        self.pad = special.get(PADDING, special.get("<pad>", self.end))
        super().__init__(config, corpus, device, extra_tokens=self.tokenizer.vocab_size - own)
        self.ends, self.window = sentence_ends(corpus.tokenizer), self.model.config.longest - 3  # n
        rows = config.data.batch_size * self.parts
        self.sampler = BatchSampler(corpus.train, rows, self.window, config.seed)

    def shape(self, config: Any) -> Any:
        """Return the configuration with the control tokens of the tokenizer."""
        return dataclasses.replace(
            config, eos_token_ids=(self.end,), pad_token_id=self.pad,
            decoder_start_token_id=self.end, mask_token_id=self.mask_id,
        )  # fmt: skip

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a step reads: rows are as long as a source and its target."""
        return self.config.data.batch_size * self.parts * (self.window + 3)

    def save(self, folder: Path) -> None:
        """Write a checkpoint folder with the tokenizer, which puts no [SEP] behind a source."""
        models.save_model(folder, self.model, self.tokenizer)

    def batches(self) -> Sequence[Part]:
        """Return windows of the text with holes in them, and how they are to be looked at."""
        step = self.sampler.step
        ids, _ = next(self.sampler)
        random = self._random(step)
        mode = MODES[int(random.choice(len(MODES), p=[*SHARES.values()]))]
        arrays = self._hidden(ids, mode, random)
        holes, rows = int((arrays[-1] != IGNORE).sum()), len(ids) // self.parts
        parts = []
        for i in range(0, len(ids), rows):
            a, b, c, d = (self._tensor(array[i : i + rows]) for array in arrays)
            parts.append(Part(mode, a, b, c, d, holes))
        return parts

    def loss(self, batch: Part) -> Tensor:
        """Return a part's share in the mean over the hidden tokens."""
        logits, wanted = self._logits(batch)
        return F.cross_entropy(logits, wanted, reduction="sum") / batch.holes

    def evaluate(self, stop: Stop) -> dict[str, float] | None:
        """Return ``loss`` in nats per hidden token, with the weights that modes have, and for each its loss."""
        losses: dict[str, float] = {}
        with evaluating(self.model), torch.no_grad():
            for mode in MODES:
                total, count = 0.0, 0
                for number, ids in enumerate(self.held_out_windows(self.window)):
                    if stop():
                        return None
                    arrays = self._hidden(ids, mode, self._random(_LAST_STEP - number))
                    a, b, c, d = (self._tensor(array) for array in arrays)
                    logits, wanted = self._logits(Part(mode, a, b, c, d, 1))
                    total += F.cross_entropy(logits.float(), wanted, reduction="sum").item()
                    count += len(wanted)
                losses[f"{mode}_loss"] = total / count
        return {"loss": sum(SHARES[mode] * losses[f"{mode}_loss"] for mode in MODES), **losses}

    def sample(self, stop: Stop) -> str | None:
        """Return the first sentences of the held-out text, and below them what the model writes behind them."""
        from portlm.runtimes.eager import TorchEngine
        from portlm.runtimes.session import Session

        context = self.model.config.context_length
        limit = min(self.config.evaluation.sample_tokens, context - 1)
        if not limit or stop():
            return None
        ids = np.asarray(self.corpus.validation[: context - 1]).astype(np.int64)
        source = ids[: sentence_cut(ids, self.ends, self._random(_LAST_STEP))].tolist()
        with evaluating(self.model):
            engine = TorchEngine.of(self.model, str(self.device))
            session = Session(engine, self.tokenizer, eos_ids=(self.end,), start_ids=(self.end,))
            written = session.generate([self.begin, *source], max_new_tokens=limit).text
        return f"{self.corpus.tokenizer.decode(source)}\n{written}"

    def _logits(self, part: Part) -> tuple[Tensor, Tensor]:
        """What the head says of the holes, (holes of these rows, V), and what was there."""
        bias = bias_of(seen(part.mode, part.kinds))
        hidden, _ = self.model.encode(part.inputs, None, part.segments, None, bias.to(self.device))
        wanted = part.targets.flatten()
        places = (wanted != IGNORE).nonzero().squeeze(1)
        logits = self.model.apply_head("masked_lm", hidden.flatten(0, 1).index_select(0, places))
        return logits, wanted.index_select(0, places)

    def _hidden(self, ids: np.ndarray, mode: str, random: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Make inputs, segments, kinds and targets of windows (B, n)."""
        rows = [self._row(row, mode, random) for row in ids]
        return tuple(np.stack(arrays) for arrays in zip(*rows, strict=True))

    def _row(self, ids: np.ndarray, mode: str, random: np.random.Generator) -> tuple[np.ndarray, ...]:
        one = mode in ("left_to_right", "right_to_left")
        cut = len(ids) if one else sentence_cut(ids, self.ends, random)
        second = [] if one else [*ids[cut:].tolist(), self.end]
        text = np.array([self.begin, *ids[:cut].tolist(), self.end, *second], np.int64)
        free = np.ones(len(text), bool)
        free[[0, cut + 1]] = False
        free[-1] = mode == "seq2seq"
        segments, kinds = np.zeros_like(text), np.zeros_like(text)
        segments[cut + 2 :] = 1
        kinds[cut + 1 :] = 1
        read, said = hide_spans(
            text, free, random, mask=self.mask_id, vocab_size=self.corpus.tokenizer.vocab_size, nothing=IGNORE
        )
        return read, segments, kinds, said

    def _random(self, step: int) -> np.random.Generator:
        # Another stream than that of the places in the text, whose counter begins at 0 (portlm.data.batches).
        key = np.array([self.config.seed, step], np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, 1]))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
