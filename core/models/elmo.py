"""ELMo: two recurrent language models, one in each direction, whose states are vectors of a token in its context.

Peters et al., "Deep contextualized word representations", 2018 (arXiv:1802.05365), and the code released with it.

- the forward model predicts each token from all before it, the backward one from all behind it; they share nothing but
  the vectors of tokens and the output layer
- LSTM layers with a projection and with bounds on cells and states (core/models/projected_lstm.py)
- each layer but the first adds what it reads to what it says
- a task gets γ Σ s_j h_j of all layers, s = softmax(w), and learns γ and w; layer 0 is the vector of the token alone,
  once for each direction

B batch, T time, C width of a direction, L layers, V vocabulary, W characters of a word.

A model of tokens has a table of vectors. One of characters makes the vector of a word from its characters
(core/models/character_cnn.py), so that no word is unknown to it; what it predicts are tokens all the same. The weights
that were published are of characters and have no output layer, and so do the presets; transformers has no such models.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from portlm.character_ids import CHARACTERS
from portlm.errors import UsageError
from portlm.memory import BACKWARD
from portlm.models.character_cnn import CharacterCNN
from portlm.models.elmo_config import ElmoConfig
from portlm.models.layers import Embedding, Linear, check_length, drop
from portlm.models.own_names import OwnNames
from portlm.models.projected_lstm import Counting, ProjectedLSTM, State
from portlm.models.recurrent_decoder import biased_cross_entropy
from portlm.models.roles import Role
from portlm.ops.embedding import embedding
from portlm.roles import StateSpec, TensorSpec

IGNORED = -100  # as a target
TOKENS = "last_hidden_state"  # what the encoder gives, of each direction
DIRECTIONS = ("forward", "backward")

_CHARACTERS = ElmoConfig(input="characters", output=False)
PRESETS = {
    "elmo-original": _CHARACTERS,
    "elmo-medium": replace(_CHARACTERS, cells=2048, width=256, n_highway=1),
    "elmo-small": replace(_CHARACTERS, cells=1024, width=128, n_highway=1),
}
PARAMETERS = {  # which the paper's page rounds to 93.6, 28.0 and 13.6 million
    "elmo-original": 93_600_864,
    "elmo-medium": 28_027_744,
    "elmo-small": 13_593_312,
}


class Direction(nn.Module):
    """A stack of layers that reads a text in one direction.

    Args:
        config: Its shape.
        reverse: From the last token to the first.
    """

    def __init__(self, config: ElmoConfig, *, reverse: bool):
        super().__init__()
        self.config, self.reverse = config, reverse
        clips = {"cell_clip": config.cell_clip, "projection_clip": config.projection_clip}
        self.layers = nn.ModuleList(
            [ProjectedLSTM(config.width, config.cells, config.width, **clips) for _ in range(config.n_layer)]
        )

    def forward(
        self, x: Tensor, past: Sequence[State] | None, counting: Counting | None
    ) -> tuple[list[Tensor], list[State]]:
        """Return what every layer says, (B, T, C) each, and its state after the token that is read last.

        Args:
            x: (B, T, C), the vectors of the tokens; they are layer 0.
            past: The states of each layer; None before the token that is read first.
            counting: Which tokens are no padding; None if none is.
        """
        if past is None:
            nothing = (x.new_zeros(len(x), self.config.width), x.new_zeros(len(x), self.config.cells))
            past = [nothing] * self.config.n_layer
        found, after = [x], []
        for number, (layer, state) in enumerate(zip(self.layers, past, strict=True)):
            y, new = layer(drop(x, self.config.dropout, self.training), state, counting, reverse=self.reverse)
            x = y + x if number else y
            found.append(x)
            after.append(new)
        return found, after


class Elmo(OwnNames):
    """A bidirectional language model with randomly initialised weights.

    Args:
        config: Its shape.
        init: False leaves the parameters uninitialised, for a caller that fills them all.
    """

    flags: Tensor  # (2, 2), not saved: what a token counts and what the state before it does, by its mask

    def __init__(self, config: ElmoConfig, *, init: bool = True):
        super().__init__()
        self.config, C = config, config.width
        self.tokens: nn.Module = (
            Embedding(config.vocab_size, C)
            if config.input == "tokens"
            else CharacterCNN(CHARACTERS, config.character_width, config.filters, config.n_highway, C)
        )
        self.forward_lm = Direction(config, reverse=False)
        self.backward_lm = Direction(config, reverse=True)
        self.head = Linear(C, config.vocab_size, bias=True) if config.output else None
        self.register_buffer("flags", torch.tensor([[0.0, 1.0], [1.0, 0.0]]), persistent=False)
        if init:
            self.init_weights()

    def forward(
        self, input_ids: Tensor, targets: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Return what both models predict, or their losses added up when targets are given.

        Args:
            input_ids: (B, T) int64, or (B, T, W) of a model of characters.
            targets: (B, T) int64, the tokens themselves; -100 where one is not to be predicted.
            attention_mask: (B, T) int64, 0 on padding, on either side; None if there is none.

        Returns:
            Logits (B, T, 2, V) of the token behind each and of the one before it; or the mean negative log-likelihood
            of the forward model and that of the backward one, added.

        Raises:
            ContextLengthError: T is larger than the context.
            UsageError: The model has no output layer.
        """
        if targets is not None:
            return torch.stack(self.losses(input_ids, targets, attention_mask)).sum()
        head = self._output()
        return torch.stack([head(states[-1]) for states in self.layers(input_ids, attention_mask)], dim=2)

    def losses(
        self, input_ids: Tensor, targets: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the mean negative log-likelihood of the forward model and of the backward one.

        A token is predicted from its neighbour, so the first of a text is none for the forward model, nor the last for
        the backward one. Arguments and errors as of :meth:`forward`.
        """
        head = self._output()
        assert head.bias is not None
        found = []
        for states, name in zip(self.layers(input_ids, attention_mask), DIRECTIONS, strict=True):
            here, there = (slice(None, -1), slice(1, None))[:: 1 if name == "forward" else -1]
            wanted = targets[:, there]
            if attention_mask is not None:
                wanted = wanted.masked_fill(attention_mask[:, here] == 0, IGNORED)
            y = drop(states[-1][:, here], self.config.dropout, self.training)
            found.append(biased_cross_entropy(y, head.weight, head.bias, wanted))
        return found[0], found[1]

    def layers(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return what each layer says, of the forward model and of the backward one: L + 1 of (B, T, C) each.

        Args:
            input_ids: (B, T) int64, or (B, T, W) of a model of characters.
            attention_mask: (B, T) int64, 0 on padding; None if there is none.

        Raises:
            ContextLengthError: T is larger than the context.
            UsageError: The ids are not of that shape, or there are none.
        """
        axes = 2 if self.config.input == "tokens" else 3
        if input_ids.dim() != axes or not input_ids.numel():
            wanted = "(B, T)" if axes == 2 else f"(B, T, {self.config.word_length})"
            raise UsageError(
                f"input_ids of an elmo of {self.config.input} are {wanted}, got {tuple(input_ids.shape)}"
            )
        check_length(input_ids.shape[1], self.config.context_length)
        x = self.tokens(input_ids)
        counting = None if attention_mask is None else self._counting(attention_mask)
        return self.forward_lm(x, None, counting)[0], self.backward_lm(x, None, counting)[0]

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the vectors of tokens in their context (B, T, 2 C), the layers mixed as the configuration says.

        Arguments and errors as of :meth:`layers`.
        """
        states = self.layers(input_ids, attention_mask)
        return torch.cat([mixed(each, self.config.shares) for each in states], dim=-1)

    def roles(self) -> dict[str, Role]:
        """Return what this model can be exported as: an encoder that takes one token per call in each direction.

        No graph has a loop; who calls it gives one direction the tokens from the last to the first (portlm.memory).
        """
        C, M = self.config.width, self.config.cells
        of_tokens = self.config.input == "tokens"
        read = "input_ids" if of_tokens else "character_ids"
        more: tuple[int, ...] = () if of_tokens else (self.config.word_length,)
        inputs = tuple(
            TensorSpec(f"{prefix}{name}", "int64", ("batch", 1, *each))
            for prefix in ("", BACKWARD)
            for name, each in ((read, more), ("attention_mask", ()))
        )
        state = tuple(
            StateSpec(
                f"past_{prefix}{name}.{layer}", f"present_{prefix}{name}.{layer}", "float32", ("batch", n),
                "zeros", "replace",
            )
            for prefix in ("", BACKWARD)
            for layer in range(self.config.n_layer)
            for name, n in (("hidden", C), ("cell", M))
        )  # fmt: skip
        outputs = tuple(
            TensorSpec(f"{prefix}{TOKENS}", "float32", ("batch", 1, C)) for prefix in ("", BACKWARD)
        )

        def one(*given: Tensor) -> tuple[Tensor, ...]:
            tokens, flat = given[:4], given[4:]
            said, kept, count = [], [], 2 * self.config.n_layer
            for n, direction in enumerate((self.forward_lm, self.backward_lm)):
                ids, mask = tokens[2 * n : 2 * n + 2]
                mine = flat[n * count : (n + 1) * count]
                past = list(zip(mine[::2], mine[1::2], strict=True))
                states, after = direction(self.tokens(ids), past, self._counting(mask))
                said.append(mixed(states, self.config.shares))
                kept += [part for state in after for part in state]
            return *said, *kept

        return {"encoder": Role(one, inputs, outputs, state)}

    def _counting(self, mask: Tensor) -> Counting:
        real, padding = embedding(mask, self.flags).split(1, dim=-1)
        return real, padding

    def _output(self) -> Linear:
        if self.head is None:
            raise UsageError("this elmo has no output layer, so it predicts nothing")
        return self.head

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw fresh weights from PyTorch's global generator, as the code released with the paper does.

        Matrices of the layers are uniform in ±√(6 / (n_in + n_out)), forget gates begin with a bias of 1.
        """
        for direction in (self.forward_lm, self.backward_lm):
            for name, p in direction.named_parameters():
                if not name.endswith("bias"):
                    nn.init.xavier_uniform_(p)
                    continue
                p.zero_().chunk(4)[1].fill_(1.0)
        if isinstance(self.tokens, CharacterCNN):
            self.tokens.draw()
        else:
            for p in self.tokens.parameters():
                p.uniform_(-1.0, 1.0)
        if self.head is None:
            return
        head = self.head
        head.weight.normal_(0.0, self.config.width**-0.5)
        assert head.bias is not None
        head.bias.zero_()


class LayerMix(nn.Module):
    """γ Σ s_j h_j with γ and w of its own, s = softmax(w): what a task learns on top of a model that stays as it is.

    Args:
        config: Of the model; its mix is where this one begins.
    """

    def __init__(self, config: ElmoConfig):
        super().__init__()
        self.config = config
        self.weights = nn.Parameter(torch.tensor(config.mix or (0.0,) * (config.n_layer + 1)))
        self.gamma = nn.Parameter(torch.tensor(config.gamma))

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """Mix L + 1 layers (B, T, C)."""
        return mixed(states, (self.gamma * torch.softmax(self.weights, 0)).unbind())

    def learned(self) -> ElmoConfig:
        """Return the configuration of a model that mixes its layers as was learned here."""
        return replace(self.config, mix=tuple(self.weights.tolist()), gamma=self.gamma.item())


def mixed(states: Sequence[Tensor], shares: Sequence[Tensor | float]) -> Tensor:
    """Return Σ share_j h_j of L + 1 layers (B, T, C)."""
    first, *others = (state * share for state, share in zip(states, shares, strict=True))
    total = first
    for other in others:
        total = total + other
    return total
