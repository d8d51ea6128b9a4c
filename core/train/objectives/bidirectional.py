"""Predict the next token from all before it, and the one before from all behind: two models that share their words.

Peters et al., "Deep contextualized word representations", 2018 (arXiv:1802.05365): the negative log-likelihoods of a
forward and of a backward language model are added up, and so trained together.

B rows, T tokens.
"""

import numpy as np
import torch
from torch import Tensor

from portlm.character_ids import spelled
from portlm.data.batches import IGNORE, evaluation_batches
from portlm.errors import ConfigError
from portlm.train.config import PretrainConfig
from portlm.train.corpus import Corpus
from portlm.train.evaluation import evaluating
from portlm.train.objectives import Stop
from portlm.train.objectives.text import Batch, TextObjective


class BidirectionalObjective(TextObjective):
    """Both cross-entropies added up; judged on held-out text by the same, and by each."""

    kind = "bidirectional"

    def check(self) -> None:
        """Refuse a context in which no token has a neighbour."""
        if self.context < 2:
            raise ConfigError("model.context_length 1 holds no token and its neighbour: set 2 or more")

    def __init__(self, config: PretrainConfig, corpus: Corpus, device: torch.device):
        super().__init__(config, corpus, device)
        shape, tokenizer = self.model.config, corpus.tokenizer
        self.spelling: Tensor | None = None  # (V, W) int64, the characters of each token
        if shape.input == "characters":
            table = spelled(tokenizer, range(tokenizer.vocab_size), shape.word_length)
            self.spelling = torch.from_numpy(table).to(device)

    def read(self, ids: Tensor) -> Tensor:
        """Return what the model reads of tokens (B, T): themselves, or their characters (B, T, W)."""
        return ids if self.spelling is None else self.spelling[ids]

    def loss(self, batch: Batch) -> Tensor:
        """Return both means over the tokens of a part, divided by the number of parts, which are equally large."""
        ids, _ = batch
        loss: Tensor = self.model(self.read(ids), ids)
        return loss if self.parts == 1 else loss / self.parts

    def evaluate(self, stop: Stop) -> dict[str, float] | None:
        """Return ``loss`` on held-out text, and what it is made of: ``forward`` and ``backward``, in nats per token.

        The first token of a window is not predicted forward, nor the last one backward.
        """
        held_out, rows = self.corpus.held_out(self.config.evaluation.max_tokens), self.config.data.batch_size
        totals, count = np.zeros(2), 0
        with evaluating(self.model), torch.no_grad():
            for _, ids in evaluation_batches(held_out.tokens, rows, self.context, held_out.before):
                if stop():
                    return None
                targets, mask = torch.from_numpy(ids).to(self.device), torch.from_numpy(ids != IGNORE)
                mask = mask.to(self.device, torch.int64)
                predicted = int((mask.sum(1) - 1).clamp(min=0).sum())
                if not predicted:
                    continue
                losses = self.model.losses(self.read(targets.clamp(min=0)), targets, mask)
                totals += predicted * np.array([loss.item() for loss in losses])
                count += predicted
        if not count:
            raise ConfigError("the held-out text has no two tokens in a row: give more text")
        forward, backward = (totals / count).tolist()
        return {"loss": forward + backward, "forward": forward, "backward": backward}

    def sample(self, stop: Stop) -> str | None:
        """Return nothing: a model that needs what is behind a token writes no text."""
        return None
