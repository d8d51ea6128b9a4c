"""What recurrent encoder-decoders share: a source is read token by token, and what is known of it starts the decoder.

A family says what its decoder is given of a source (its memory: tensors that begin with the batch) and how the decoder
reads a target from there. This file makes of it the loss of pairs and decoding step by step. In a graph both read one
token of each row per call; portlm.memory says how the calls of an encoder become what a decoder is given.

B batch, S source tokens, T target tokens, C width, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from portlm.errors import ConfigError
from portlm.models import config_json
from portlm.models.layers import check_length
from portlm.models.own_names import OwnNames
from portlm.ops.linear import linear
from portlm.ops.linear_cross_entropy import linear_cross_entropy
from portlm.roles import TensorSpec

IGNORE = -100  # a target that is none
ONE = ("batch", 1)  # the shape of what a role is given in one call
Memory = tuple[Tensor, ...]  # what a decoder carries from token to token, and what it is given of a source


@dataclass(frozen=True)
class PairConfig:
    """The fields that both families have; what begins with an underscore is for them."""

    decoder_start_token_id: int = 0
    bos_token_id: int | None = None  # this and the next two are not computed with, only kept with the model
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    @staticmethod
    def _read_ids(read: config_json.Reader, vocab_size: int) -> dict[str, Any]:
        """The fields above, from a config.json."""
        return {
            "decoder_start_token_id": read.integer("decoder_start_token_id", 0),
            "bos_token_id": read.token_id("bos_token_id", vocab_size),
            "eos_token_ids": read.token_ids("eos_token_id", vocab_size),
            "pad_token_id": read.token_id("pad_token_id", vocab_size),
        }

    def _written_ids(self) -> dict[str, Any]:
        """What config.json says of them."""
        return {
            "is_encoder_decoder": True,
            "tie_word_embeddings": False,
            "decoder_start_token_id": self.decoder_start_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": config_json.one_or_list(self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
        }

    def _check(self, bounds: Mapping[str, tuple[float, float]], switches: tuple[str, ...] = ()) -> None:
        """Raise ConfigError for a value out of range, or a switch that is neither true nor false."""
        config_json.check_bounds(self, bounds)
        for name in switches:
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        config_json.check_token_ids(self, "decoder_start_token_id")


class RecurrentEncoderDecoder(OwnNames):
    """A model of pairs of texts. A family's class fills in `head`, `read` and `write`, and `roles`."""

    config: Any

    @property
    def head(self) -> Tensor:
        """The output matrix (V, width of what `write` returns)."""
        raise NotImplementedError

    def read(self, source_ids: Tensor, source_mask: Tensor | None) -> Memory:
        """Return what the decoder is given of sources (B, S), whose mask (B, S) is 0 on padding at either end."""
        raise NotImplementedError

    def write(self, target_ids: Tensor, mask: Tensor | None, memory: Memory) -> tuple[Tensor, Memory]:
        """Read targets (B, T) from a memory on, but where the mask (B, T) is 0.

        Returns:
            What the output matrix takes, (B, T, ...), and the next memory.
        """
        raise NotImplementedError

    def forward(
        self,
        source_ids: Tensor,
        target_ids: Tensor,
        targets: Tensor | None = None,
        source_mask: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Return logits (B, T, V), or the mean cross-entropy when targets are given.

        Args:
            source_ids: (B, S) int64.
            target_ids: (B, T) int64, the start token and then all of the target but its last token.
            targets: (B, T) int64, the token that follows each of these; -100 where there is none to predict.
            source_mask: (B, S) int64, 0 on padding at either end of a source; None if there is none.
            label_smoothing: share of the probability that all V tokens have in equal parts (Szegedy et al., 2016).

        Raises:
            ContextLengthError: S or T is larger than the context.
        """
        check_length(max(source_ids.shape[1], target_ids.shape[1]), self.config.context_length)
        y, _ = self.write(target_ids, None, self.read(source_ids, source_mask))
        if targets is None:
            return linear(y, self.head)
        if label_smoothing == 0:
            return linear_cross_entropy(y.flatten(0, 1), self.head, targets.flatten())
        logits = linear(y, self.head).flatten(0, 1)
        return F.cross_entropy(
            logits, targets.flatten(), ignore_index=IGNORE, label_smoothing=label_smoothing
        )

    @torch.no_grad()
    def step(
        self, input_ids: Tensor, memory: Memory, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Memory]:
        """Continue targets.

        Args:
            input_ids: (B, T) int64, the new tokens.
            memory: as `read` or the last step returned it.
            attention_mask: (B, T) int64, 0 on padding; None if there is none.

        Returns:
            Logits (B, T, V), and the next memory.
        """
        y, memory = self.write(input_ids, attention_mask, memory)
        return linear(y, self.head), memory


def token_inputs(*prefixes: str, below: int) -> tuple[TensorSpec, ...]:
    """Return the inputs of a role that reads one token of each row per call: ids below a number, and their mask."""
    return tuple(
        TensorSpec(f"{prefix}{name}", "int64", ONE, limit)
        for prefix in prefixes
        for name, limit in (("input_ids", below), ("attention_mask", None))
    )
