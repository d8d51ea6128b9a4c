"""Say a text of which only a noised form is read: how BART is pretrained (Lewis et al., 2019, arXiv:1910.13461).

The noises are those of the paper's section 2.2 (portlm.data.noising), alone or several together, as ``noise`` of the
settings says; by default infilling of 30 % of the tokens and permutation of the sentences, as the published models. The
encoder reads the noised text between the control tokens of the tokenizer, and the decoder says all of the text, from
the token that ends one to that token.
"""

import numpy as np
import torch

from portlm.data.noising import Noise, noised, sentence_ends
from portlm.train.config import PretrainConfig
from portlm.train.corpus import Corpus
from portlm.train.objectives.corruption import Corrupted, ReadingObjective


class DenoiseObjective(ReadingObjective):
    """Cross-entropy of the tokens of the whole text; judged by that on held-out text."""

    kind = "denoise"

    def __init__(self, config: PretrainConfig, corpus: Corpus, device: torch.device):
        super().__init__(config, corpus, device)
        asked = config.noise
        ends = sentence_ends(corpus.tokenizer)
        self.noise = Noise(self.mask_id, ends, asked.share, asked.span)
        self.read_windows(self.context - len(self.begin) - len(self.end))

    def corrupt(self, ids: np.ndarray, random: np.random.Generator) -> Corrupted:
        """Return a text (n,) with noise, and the text as it was."""
        said = [*ids.tolist(), self.end[-1]]
        # Many empty spans make a text longer: the encoder then does not read its end.
        text = noised(ids, self.config.noise.kinds, random, self.noise)[: self.tokens].tolist()
        return Corrupted([*self.begin, *text, *self.end], [self.end[-1], *said[:-1]], said)
