"""Say what was taken out of a text: how T5 is pretrained (arXiv:1910.10683), on plain text (portlm.data.spans).

Ids behind those of the tokenizer: the start of a target, which pads, too; an end of text if the tokenizer has none; and
the sentinels, counting down from the last id.

n tokens of a text before it is corrupted, V vocabulary of the tokenizer.
"""

import dataclasses

import numpy as np
import torch

from portlm.data.spans import corrupted, noise_mask, random_spans_helper
from portlm.errors import UsageError
from portlm.train.config import PretrainConfig
from portlm.train.corpus import Corpus
from portlm.train.objectives.corruption import Corrupted, CorruptionObjective


class SpanObjective(CorruptionObjective):
    """Cross-entropy of what was taken out; judged by that on held-out text, the same holes each time."""

    kind = "span"

    def __init__(self, config: PretrainConfig, corpus: Corpus, device: torch.device):
        V, eos = corpus.tokenizer.vocab_size, corpus.tokenizer.eos_id
        context = config.model.context_length
        if context < 8:
            raise UsageError(
                f"a context of {context} tokens is too short to take spans out of: give at least 8"
            )
        tokens = random_spans_helper(context - 1).tokens  # a mask that is turned may have a span more
        # Tokens that are taken out, so at least as many as there are spans; and one for the end of a target.
        spans = int(noise_mask(tokens, np.random.default_rng(0)).sum()) + 1
        super().__init__(config, corpus, device, extra_tokens=2 + spans)
        self.start = self.pad = V
        self.end = V + 1 if eos is None else eos
        self.first = V + 1 + spans  # <extra_id_0>, the last id of all
        self.model.config = dataclasses.replace(
            self.model.config,
            decoder_start_token_id=self.start,
            pad_token_id=self.start,
            eos_token_ids=(self.end,),
        )
        self.read_windows(tokens)

    def corrupt(self, ids: np.ndarray, random: np.random.Generator) -> Corrupted:
        """Return a text (n,) with sentinels in the place of what was taken out, and that behind each sentinel."""
        noise = noise_mask(len(ids), random, shifted=True)
        text, target = corrupted(ids, noise, self.first, self.end)
        said = target.tolist()
        return Corrupted(text.tolist(), [self.start, *said[:-1]], said)
