"""What the objectives that make word vectors share: which tokens are words, how often they stand there, what is saved.

A control token, and the one that stands for all words that the vocabulary lacks, is no word: it is taken out of the
text before anything is learned, as word2vec does, and its vector in the saved model is 0.

M width of a word vector, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from portlm import models
from portlm.data.batches import Tokens
from portlm.errors import FormatError, UsageError
from portlm.models.word_vectors import WordVectorsConfig
from portlm.train.config import PretrainConfig
from portlm.train.corpus import Corpus
from portlm.train.objectives import Stop
from portlm.train.objectives.text import TextObjective

LONGEST = WordVectorsConfig.context_length  # text that a saved model reads: nothing in the table bounds it
SHOWN, NEAREST = 8, 5  # words of a sample, and neighbours of each
_AT_ONCE = 1 << 20  # tokens that are counted together


class VectorObjective(TextObjective):
    """A table of vectors and what else is trained beside it, which its checkpoints hold apart.

    Args:
        config: The settings of the run.
        corpus: The text.
        device: Where the model trains.

    Attributes:
        counts: (V,) float64, how often each word stands in the training text; 0 for what is no word.

    Raises:
        UsageError: The training text has fewer than two different words of the vocabulary.
    """

    def __init__(self, config: PretrainConfig, corpus: Corpus, device: torch.device):
        super().__init__(config, corpus, device)
        self.model_config: WordVectorsConfig = self.model.config
        tokenizer = corpus.tokenizer
        self.counts = word_counts(corpus.train, self.model_config.vocab_size, (*tokenizer.special.values(),))
        if (different := int((self.counts > 0).sum())) < 2:
            raise UsageError(
                f"the training text has {different} different words of the vocabulary, and vectors are learned from "
                "words beside each other: give more text or a larger vocabulary"
            )
        self.model = self.tables(self.model.vectors.weight).to(device)

    def tables(self, words: nn.Parameter) -> nn.Module:
        """Return what is trained, given the table (V, M) as it begins."""
        raise NotImplementedError

    def vectors(self) -> Tensor:
        """Return the vectors (V, M) as they are by now, without a gradient."""
        raise NotImplementedError

    def facts(self) -> dict[str, int]:
        """Return the sizes of vocabulary and text, and how many words it has."""
        return {
            "vocab_size": self.model_config.vocab_size,
            "train_tokens": len(self.corpus.train),
            "train_words": int(self.counts.sum()),
            "held_out_tokens": len(self.corpus.validation),
        }

    def sample(self, stop: Stop) -> str | None:
        """Return words, from the most frequent to rare ones, each with the words whose vectors are nearest."""
        if not self.config.evaluation.sample_tokens or stop():
            return None
        known = np.flatnonzero(self.counts)
        vectors = self.vectors().cpu().numpy()[known].astype(np.float64)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        order = np.argsort(-self.counts[known], kind="stable")
        ranks = np.unique(np.geomspace(1, len(known), SHOWN).astype(int)) - 1
        lines = []
        for place in order[ranks]:
            cosines = vectors @ vectors[place]
            cosines[place] = -np.inf
            nearest = np.argsort(-cosines, kind="stable")[: min(NEAREST, len(known) - 1)]
            lines.append(f"{self._name(known[place])}: {', '.join(self._name(known[i]) for i in nearest)}")
        return "\n".join(lines)

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        """Write the table as a checkpoint folder with the tokenizer."""
        saved = models.build(
            replace(self.model_config, context_length=max(self.model_config.context_length, LONGEST))
        )
        vectors = self.vectors().cpu()
        known = torch.from_numpy(self.counts > 0)
        for parameter in saved.parameters():
            parameter.copy_(vectors * known[:, None])
        models.save_model(folder, saved, self.corpus.tokenizer)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return where the batches stand and what identifies the text, and everything that is trained."""
        own, _ = super().state()
        return own, {name: tensor.detach() for name, tensor in self.model.state_dict().items()}

    def restore(self, folder: Path, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint. The table in it is what comes of the tensors, and is not read.

        Raises:
            FormatError: The state is damaged, or a tensor is missing, unexpected or of another shape.
            ConfigError: It was trained on other text, or with other batches.
        """
        own = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if own != found:
            raise FormatError(f"the state in {folder} holds tensors {found}, this run trains {own}")
        self.restore_place(folder, state)
        self.model.load_state_dict(dict(tensors))

    def _name(self, token: int) -> str:
        return self.corpus.tokenizer.decode([int(token)]).strip()


def word_counts(tokens: Tokens, vocab_size: int, no_words: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Count the tokens of a text.

    Args:
        tokens: Ids.
        vocab_size: V.
        no_words: Ids whose count is 0 in any case.

    Returns:
        (V,) float64.
    """
    counts = np.zeros(vocab_size, np.float64)
    for begin in range(0, len(tokens), _AT_ONCE):
        counts += np.bincount(tokens[begin : begin + _AT_ONCE].astype(np.int64), minlength=vocab_size)
    counts[list(no_words)] = 0
    return counts
