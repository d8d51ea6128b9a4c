"""Say the fragment that is hidden from the encoder: MASS (Song et al., 2019, arXiv:1905.02450).

Half of each text, in one piece, is hidden: of its tokens the encoder reads 80 % as masks, 10 % as random tokens and
10 % as they are. The decoder predicts that fragment alone. It has a place for every token of the text, so that places
are kept, and reads masks outside of the fragment, so that it must ask the encoder for what is there.
"""

import numpy as np
import torch

from portlm.data.batches import IGNORE
from portlm.data.noising import fragment
from portlm.train.config import PretrainConfig
from portlm.train.corpus import Corpus
from portlm.train.objectives.corruption import Corrupted, ReadingObjective


class MassObjective(ReadingObjective):
    """Cross-entropy of the tokens of the fragment; judged by that on held-out text."""

    kind = "mass"

    def __init__(self, config: PretrainConfig, corpus: Corpus, device: torch.device):
        super().__init__(config, corpus, device)
        self.read_windows(self.context - len(self.begin) - len(self.end))

    def corrupt(self, ids: np.ndarray, random: np.random.Generator) -> Corrupted:
        """Return a text (n,) without its fragment, and the fragment at its places."""
        length = min(max(round(len(ids) * self.config.noise.fragment), 1), len(ids))
        found = fragment(
            ids, length, random, mask=self.mask_id, start=self.end[-1],
            vocab_size=self.corpus.tokenizer.vocab_size, nothing=IGNORE,
        )  # fmt: skip
        source = [*self.begin, *found.source.tolist(), *self.end]
        return Corrupted(source, found.read.tolist(), found.targets.tolist())
