"""Word vectors: one table, a row for each word, and nothing else.

Mikolov et al., "Distributed Representations of Words and Phrases and their Compositionality", 2013 (arXiv:1310.4546),
and Pennington et al., "GloVe: Global Vectors for Word Representation", 2014. Against an encoder:

- a word has the same vector in every context, whatever stands beside it
- there are no layers and no positions: reading a text is looking its words up
- a token that stands for no word, such as [UNK], has the vector 0, which turns no mean of a text

B batch, T time, M width of a word vector, V vocabulary.

transformers has no such model, so it does not open these checkpoints and says that it does not know their model_type.
The presets are the published sizes of GloVe. How vectors are learned is portlm.train.objectives' skipgram and glove.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from portlm.models.keyed_config import Key, KeyedConfig
from portlm.models.layers import Embedding, check_length
from portlm.models.own_names import OwnNames
from portlm.models.roles import Role
from portlm.roles import TensorSpec

TOKENS = "last_hidden_state"  # what the verbs for encoders read


@dataclass(frozen=True)
class WordVectorsConfig(KeyedConfig):
    """The shape of the table.

    Raises:
        ConfigError: A value out of range.
    """

    family: ClassVar[str] = "word_vectors"
    ARCHITECTURE: ClassVar[str] = "WordVectors"
    KEYS: ClassVar[Mapping[str, Key]] = {
        "vocab_size": Key("vocab_size"),
        "context_length": Key("max_position_embeddings"),
        "width": Key("embedding_size"),
    }
    # What [model] of a training run may set, and what it is for a small model on a CPU.
    SETTINGS: ClassVar[dict[str, Any]] = {"width": 64, "context_length": 64}  # of a row of a batch

    vocab_size: int = 400_000
    context_length: int = 1 << 16  # the longest text; nothing depends on it
    width: int = 300  # M

    @classmethod
    def tiny(cls) -> Self:
        """Return a configuration that tests compute in no time: a vocabulary of bytes, an odd width."""
        return cls(vocab_size=259, context_length=32, width=13, eos_token_ids=(256,))


PRESETS = {f"glove-6b-{width}": WordVectorsConfig(width=width) for width in (50, 100, 200, 300)}
PARAMETERS = {f"glove-6b-{width}": 400_000 * width for width in (50, 100, 200, 300)}


class WordVectors(OwnNames):
    """A table of word vectors, which begin as word2vec's do: uniform from -0.5 / M to 0.5 / M.

    Args:
        config: Its shape.
        init: False leaves the table uninitialised, for a caller that fills it.
    """

    def __init__(self, config: WordVectorsConfig, *, init: bool = True):
        super().__init__()
        self.config = config
        self.vectors = Embedding(config.vocab_size, config.width)
        if init:
            with torch.no_grad():
                self.vectors.weight.uniform_(-0.5 / config.width, 0.5 / config.width)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the vectors (B, T, M) of tokens (B, T), int64.

        Raises:
            ContextLengthError: T is larger than the context.
        """
        check_length(input_ids.shape[1], self.config.context_length)
        vectors: Tensor = self.vectors(input_ids)
        return vectors

    def roles(self) -> dict[str, Role]:
        """Return what this model can be exported as: an encoder, which does not ask where a token stands."""
        ids = ("batch", "sequence")
        inputs = (TensorSpec("input_ids", "int64", ids),)
        outputs = (TensorSpec(TOKENS, "float32", (*ids, self.config.width)),)
        return {"encoder": Role(lambda input_ids: (self(input_ids),), inputs, outputs)}
