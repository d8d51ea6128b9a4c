"""Guess hidden tokens from what is left around them (BERT: Devlin et al., 2018, arXiv:1810.04805).

A share of the tokens is chosen; of these 80 % are replaced by a mask token, 10 % by a random one, and 10 % stay as
they are, so that the model cannot rely on any token being what it says. Only the chosen ones count in the loss.

An encoder reads each window between the control tokens of its tokenizer (portlm.control_tokens), and is saved with
them. Any other family can be trained so as well: its mask is an id of its own behind those of the tokenizer, and where
it hides later positions from earlier ones it guesses from what is left of a gap alone.

B rows, T tokens, V vocabulary of the tokenizer.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from portlm import models
from portlm.control_tokens import for_reading
from portlm.data.batches import IGNORE, BatchSampler, evaluation_batches
from portlm.errors import ConfigError
from portlm.models import FAMILIES
from portlm.train.config import PretrainConfig
from portlm.train.corpus import Corpus
from portlm.train.evaluation import evaluating
from portlm.train.initial import family_of
from portlm.train.objectives import Stop
from portlm.train.objectives.text import TextObjective

CHOSEN, MASKED, RANDOM = 0.15, 0.8, 0.1  # of all; of those chosen
_LAST_STEP = 2**64 - 1  # the step whose random numbers hide the held-out tokens


class Part(NamedTuple):
    """Some rows of a step's batch.

    Attributes:
        inputs: (B, T) int64, with holes.
        targets: (B, T) int64, what was there where it counts, -100 elsewhere.
        share: Of the batch's targets that are in these rows.
    """

    inputs: Tensor
    targets: Tensor
    share: float


class MaskedObjective(TextObjective):
    """Cross-entropy of the hidden tokens; judged on held-out text by that and by how many are guessed right."""

    kind = "masked"

    def __init__(self, config: PretrainConfig, corpus: Corpus, device: torch.device):
        own = corpus.tokenizer.vocab_size
        self.tokenizer, self.vocab_size, self.mask_id, extra = corpus.tokenizer, own, own, 1
        self.begin, self.end = list[int](), list[int]()
        if FAMILIES[family_of(config)].kind == "encoder":
            self.tokenizer, self.mask_id = for_reading(corpus.tokenizer)
            self.begin, self.end = self.tokenizer.begin_ids, self.tokenizer.end_ids
            extra = self.tokenizer.vocab_size - own
        super().__init__(config, corpus, device, extra_tokens=extra)
        self.window = self.context - len(self.begin) - len(self.end)
        rows = config.data.batch_size * self.parts
        self.sampler = BatchSampler(corpus.train, rows, self.window, config.seed)

    def check(self) -> None:
        """Refuse a context that holds control tokens alone."""
        if self.context <= len(self.begin) + len(self.end):
            raise ConfigError(f"model.context_length {self.context} holds no token beside [CLS] and [SEP]")

    def save(self, folder: Path) -> None:
        """Write a checkpoint folder with the tokenizer."""
        models.save_model(folder, self.model, self.tokenizer)

    def batches(self) -> Sequence[Part]:
        """Return windows of the text with holes in them; parts without a hole are left out."""
        step = self.sampler.step
        ids, _ = next(self.sampler)
        inputs, targets = self._hide(ids, step)
        total = int((targets != IGNORE).sum())
        rows = len(ids) // self.parts
        parts = []
        for start in range(0, len(ids), rows):
            wanted = targets[start : start + rows]
            if count := int((wanted != IGNORE).sum()):
                pair = (self._tensor(inputs[start : start + rows]), self._tensor(wanted))
                parts.append(Part(*pair, count / total))
        return parts

    def loss(self, batch: Part) -> Tensor:
        """Return the mean over the hidden tokens of a part, weighted by how many of the batch they are."""
        loss: Tensor = self.model(batch.inputs, batch.targets)
        return loss * batch.share

    def evaluate(self, stop: Stop) -> dict[str, float] | None:
        """Return ``loss`` in nats per hidden token and the share guessed right, the same tokens each time."""
        total, right, count = 0.0, 0, 0
        with evaluating(self.model), torch.no_grad():
            for number, ids in enumerate(self._held_out()):
                if stop():
                    return None
                corrupted, targets = self._hide_held_out(ids, number)
                wanted = self._tensor(targets)
                logits = self.model(self._tensor(corrupted)).flatten(0, 1)  # (B T, V + 1)
                total += F.cross_entropy(logits.float(), wanted.flatten(), reduction="sum").item()
                right += int((logits.argmax(-1) == wanted.flatten()).sum())
                count += int((targets != IGNORE).sum())
        return {"loss": total / count, "accuracy": right / count}

    def sample(self, stop: Stop) -> str | None:
        """Return the beginning of the held-out text with holes, and below it what the model puts there."""
        length = min(self.config.evaluation.sample_tokens, self.window, len(self.corpus.validation))
        if not length or stop():
            return None
        ids = self.corpus.validation[:length].astype(np.int64)[None]
        corrupted, targets = self._hide_held_out(ids, 0)
        with evaluating(self.model), torch.no_grad():
            guessed = self.model(self._tensor(corrupted))[0, :, : self.vocab_size].argmax(-1).cpu().numpy()
        inside = slice(len(self.begin), len(self.begin) + length)
        corrupted, targets, guessed = corrupted[:, inside], targets[:, inside], guessed[inside]
        filled = np.where(targets[0] == IGNORE, ids[0], guessed)
        decode = self.corpus.tokenizer.decode
        holes = np.flatnonzero(corrupted[0] == self.mask_id)
        pieces = np.split(corrupted[0], holes)  # each but the first begins with a hole
        text = "_".join(decode(piece[i > 0 :].tolist()) for i, piece in enumerate(pieces))
        return f"{text}\n{decode(filled.tolist())}"

    def _held_out(self) -> Iterator[np.ndarray]:
        """Yield the held-out tokens in windows, (B, T) each; -100 behind their end."""
        held_out = self.corpus.held_out(self.config.evaluation.max_tokens)
        rows = self.config.data.batch_size
        for _, targets in evaluation_batches(held_out.tokens, rows, self.window, held_out.before):
            yield targets

    def _hide_held_out(self, ids: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
        return self._hide(ids, _LAST_STEP - number)

    def _hide(self, ids: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Windows (B, window) with holes and what was there, both (B, T) with the control tokens around them."""
        inputs, targets = hide(ids, self.config.seed, step, self.vocab_size, self.mask_id)
        before, behind = (np.tile(np.array(part, np.int64), (len(ids), 1)) for part in (self.begin, self.end))
        nothing = [np.full_like(part, IGNORE) for part in (before, behind)]
        return np.hstack((before, inputs, behind)), np.hstack((nothing[0], targets, nothing[1]))

    def _tensor(self, ids: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(ids)).to(self.device)


def hide(
    ids: np.ndarray, seed: int, step: int, vocab_size: int, mask_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hide some tokens, as a function of the seed and the step alone.

    Args:
        ids: (B, T) int64; -100 is no token, it becomes 0 and is never chosen.
        seed: 0 <= seed < 2^64.
        step: 0 <= step < 2^64.
        vocab_size: Random tokens are below this.
        mask_id: Stands for a hidden token.

    Returns:
        Inputs with holes and targets, both (B, T) int64; at least one target counts.
    """
    # The batch's places come from the same key with the counter at 0 (portlm.data.batches): this is another stream.
    generator = np.random.Philox(key=np.array([seed, step], np.uint64), counter=[0, 0, 0, 1])
    raw = generator.random_raw(3 * ids.size).reshape(3, *ids.shape)
    choice, how, what = (raw >> np.uint64(11)) * 2.0**-53  # uniform in [0, 1), each (B, T)
    present = ids != IGNORE
    chosen = present & (choice < CHOSEN)
    if not chosen.any():
        chosen = present & (choice == choice[present].min())
    inputs = np.where(present, ids, 0)
    inputs[chosen & (how < MASKED)] = mask_id
    swapped = chosen & (how >= MASKED) & (how < MASKED + RANDOM)
    inputs[swapped] = (what[swapped] * vocab_size).astype(np.int64)
    return inputs, np.where(chosen, ids, IGNORE)
