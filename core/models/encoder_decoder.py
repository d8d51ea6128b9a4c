"""What encoder-decoders share: an encoder reads the source once, and a decoder writes the target while looking at it.

A family says how a source is encoded, what each decoder layer keeps of it (its memory: the keys and values that cross
attention sees), and how the decoder reads tokens. This file makes of it the loss of pairs, decoding step by step, and
the two roles that are exported.

B batch, S source tokens, T target tokens, P slots already in the cache, C width, H heads, D head width, V vocabulary,
L decoder layers.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from portlm.models.layers import KeyValue, check_length
from portlm.models.roles import TOTAL, Role
from portlm.ops.linear import linear
from portlm.ops.linear_cross_entropy import linear_cross_entropy
from portlm.roles import StateSpec, TensorSpec

IGNORE = -100  # a target that is none


class EncoderDecoder(nn.Module):
    """A model of pairs of texts. A family's class fills in the four methods below `forward`."""

    config: Any
    has_positions = True  # whether tokens are looked up by position as well as by id
    cache_heads_first = True  # (B, H, P, D), else (B, P, H, D)

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
            source_mask: (B, S) int64, 0 on padding at the right end of a source; None if there is none.
            label_smoothing: share of the probability that all V tokens have in equal parts (Szegedy et al., 2016).

        Raises:
            ContextLengthError: S or T is larger than the context.
        """
        check_length(max(source_ids.shape[1], target_ids.shape[1]), self.config.context_length)
        memory = self.memory(self.encode(source_ids, source_mask, None))
        y, _ = self.decode(target_ids, None, None, None, memory, source_mask)
        if targets is None:
            return self.logits(y)
        if label_smoothing == 0 and self.output_bias is None:
            return linear_cross_entropy(self.scaled(y).flatten(0, 1), self.head, targets.flatten())
        logits = self.logits(y).flatten(0, 1)
        return F.cross_entropy(
            logits, targets.flatten(), ignore_index=IGNORE, label_smoothing=label_smoothing
        )

    @property
    def head(self) -> Tensor:
        """The output matrix (V, C)."""
        raise NotImplementedError

    def encode(self, ids: Tensor, mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """Return what the encoder makes of source ids (B, S), (B, S, C).

        position_ids (B, S) are None where they are 0, 1, ... or where the family has none; mask (B, S) as in forward.
        """
        raise NotImplementedError

    def memory(self, encoded: Tensor) -> list[KeyValue]:
        """Return keys and values, each (B, S, H, D), that the layers of the decoder have of an encoded source."""
        raise NotImplementedError

    def decode(
        self,
        ids: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        past: Sequence[KeyValue] | None,
        memory: Sequence[KeyValue],
        source_mask: Tensor | None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Run the decoder on target ids (B, T); return its normalised output (B, T, C) and each layer's new cache.

        Without a cache (past None) all of the target is here, from its first token on, and no cache comes back.
        """
        raise NotImplementedError

    @property
    def output_bias(self) -> Tensor | None:
        """What is added to the logits, (1, V); None for nothing."""
        return None

    def scaled(self, y: Tensor) -> Tensor:
        """Return the decoder's output (B, T, C) as the output matrix takes it."""
        return y

    def logits(self, y: Tensor) -> Tensor:
        """Return logits (B, T, V) for the decoder's output (B, T, C)."""
        logits = linear(self.scaled(y), self.head)
        return logits if self.output_bias is None else logits + self.output_bias

    @torch.no_grad()
    def step(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor,
        memory: Sequence[KeyValue],
        source_mask: Tensor,
        past: Sequence[KeyValue] | None = None,
        logits_to_keep: Tensor | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Continue targets whose P earlier slots are in the cache.

        Args:
            input_ids: (B, T) int64, the new tokens.
            position_ids: (B, T) int64, the position of each within its own row; None where the family has none.
            attention_mask: (B, P + T) int64, 0 on the padding left of a shorter row, 1 elsewhere.
            memory: as `memory` returns it.
            source_mask: (B, S) int64, 0 where the source is padding.
            past: For each layer (key, value) as `cache_shape` says; None stands for P = 0.
            logits_to_keep: (kept,) int64, which of the T new tokens to give logits for; None for all.

        Returns:
            Logits (B, kept, V), and the cache with P + T slots.

        Raises:
            ContextLengthError: P + T is larger than the context.
        """
        check_length(attention_mask.shape[1], self.config.context_length)
        if past is None:
            sizes = {"batch": len(input_ids), "past": 0}
            shape = [sizes[d] if isinstance(d, str) else d for d in self.cache_shape()]
            empty = self.head.new_empty(shape)
            past = [(empty, empty)] * self.config.n_decoder_layer
        y, present = self.decode(input_ids, attention_mask, position_ids, past, memory, source_mask)
        if logits_to_keep is not None:
            y = y.index_select(1, logits_to_keep)
        return self.logits(y), present

    def cache_shape(self) -> tuple[int | str, ...]:
        """The shape of keys and values of the decoder's own tokens."""
        H, D = self.config.n_head, self.config.head_dim
        return ("batch", H, "past", D) if self.cache_heads_first else ("batch", "past", H, D)

    def roles(self) -> dict[str, Role]:
        """Return what this model can be exported as: an encoder, and a decoder that is given what the encoder made.

        A given state of the decoder is the encoder's output of the same name, and encoder_attention_mask the mask that
        the encoder was called with (portlm.memory). Names are those of Hugging Face's optimum.
        """
        config = self.config

        def read(ids: Tensor, mask: Tensor, places: Tensor | None) -> tuple[Tensor, list[KeyValue]]:
            encoded = self.encode(ids, mask, places)
            return encoded, self.memory(encoded)

        return source_roles(
            read,
            partial(self.step.__wrapped__, self),  # type: ignore[attr-defined]
            sizes=(config.vocab_size, config.width, config.n_decoder_layer, config.n_head, config.head_dim),
            cache_shape=self.cache_shape(),
            has_positions=self.has_positions,
        )

    def num_parameters(self) -> int:
        """Return the number of parameters, a shared embedding counted once."""
        return sum(p.numel() for p in self.parameters())


def source_roles(
    read: Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, list[KeyValue]]],
    step: Callable[..., tuple[Tensor, list[KeyValue]]],
    *,
    sizes: tuple[int, int, int, int, int],
    cache_shape: tuple[int | str, ...],
    has_positions: bool,
) -> dict[str, Role]:
    """Return the roles of a model that reads a source and writes a target.

    Args:
        read: Source ids, their mask and positions -> what the encoder made, (B, S, C), and the memory of each layer.
        step: As EncoderDecoder.step, without a wrapper.
        sizes: V, C, L, H and D.
        cache_shape: Of keys and values of the target's own tokens.
        has_positions: Whether tokens are looked up by position as well as by id.
    """
    V, C, L, H, D = sizes
    source, tokens = ("batch", "source"), ("batch", "sequence")
    memory = tuple(
        StateSpec(f"past_key_values.{layer}.encoder.{kind}", "", "float32", (*source, H, D), "given", "constant")
        for layer in range(L) for kind in ("key", "value")
    )  # fmt: skip
    own = tuple(
        StateSpec(
            f"past_key_values.{layer}.decoder.{kind}", f"present.{layer}.decoder.{kind}", "float32",
            cache_shape, "empty", "append",
        )
        for layer in range(L) for kind in ("key", "value")
    )  # fmt: skip

    def encode(input_ids: Tensor, attention_mask: Tensor, *places: Tensor) -> tuple[Tensor, ...]:
        encoded, layers = read(input_ids, attention_mask, places[0] if places else None)
        return encoded, *(tensor for layer in layers for tensor in layer)

    def decode(*given: Tensor) -> tuple[Tensor, ...]:
        input_ids, attention_mask, *rest = given
        position_ids = rest.pop(0) if has_positions else None
        logits_to_keep, source_mask, *flat = rest
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        logits, present = step(
            input_ids, position_ids, attention_mask, pairs[:L], source_mask, pairs[L:], logits_to_keep
        )
        return logits, *(tensor for layer in present for tensor in layer)

    names = ("input_ids", "attention_mask", *["position_ids"] * has_positions)
    made = (TensorSpec(state.name, state.dtype, state.shape) for state in memory)
    outputs = (TensorSpec("last_hidden_state", "float32", (*source, C)), *made)
    encoder = Role(encode, tuple(TensorSpec(name, "int64", source) for name in names), outputs)
    shapes = {"input_ids": tokens, "attention_mask": ("batch", TOTAL), "position_ids": tokens}
    inputs = [TensorSpec(name, "int64", shapes[name]) for name in names]
    inputs.append(TensorSpec("logits_to_keep", "int64", ("kept",)))
    mask = StateSpec("encoder_attention_mask", "", "int64", source, "given", "constant")
    logits = (TensorSpec("logits", "float32", ("batch", "kept", V)),)
    return {"encoder": encoder, "decoder": Role(decode, tuple(inputs), logits, (mask, *memory, *own))}
