"""A vector for a word from its characters, so that no word is unknown.

Kim et al., "Character-Aware Neural Language Models", 2016 (arXiv:1508.06615), in the form of Jozefowicz et al.,
"Exploring the Limits of Language Modeling", 2016 (arXiv:1602.02410), which ELMo took over: convolutions of several
widths over the characters of a word, the largest value of each filter, highway layers (Srivastava et al., 2015), and a
projection.

B batch, T words, W characters of each, D width of a character, N filters of all widths, C width of a word.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from portlm.models.layers import Embedding, Linear


class Highway(nn.Module):
    """Part of a map's result, and the rest of its input: y = g x + (1 - g) relu(A x), where g = sigmoid(G x)."""

    def __init__(self, width: int):
        super().__init__()
        self.gate, self.map = Linear(width, width, bias=True), Linear(width, width, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., N) to the same."""
        kept = torch.sigmoid(self.gate(x))
        return kept * x + (1 - kept) * F.relu(self.map(x))


class CharacterCNN(nn.Module):
    """Words from their characters; no parameter is initialised before :meth:`draw`.

    Args:
        characters: How many there are, the control characters among them.
        character_width: D.
        filters: For each width in characters, how many.
        n_highway: Highway layers.
        width: C.
    """

    def __init__(
        self,
        characters: int,
        character_width: int,
        filters: Sequence[tuple[int, int]],
        n_highway: int,
        width: int,
    ):
        super().__init__()
        total = sum(count for _, count in filters)
        self.characters = Embedding(characters, character_width)
        self.convolutions = nn.ModuleList(
            [nn.Conv1d(character_width, count, size, device="meta") for size, count in filters]
        ).to_empty(device=self.characters.weight.device)
        self.highways = nn.ModuleList([Highway(total) for _ in range(n_highway)])
        self.projection = Linear(total, width, bias=True)

    def forward(self, ids: Tensor) -> Tensor:
        """Map characters (B, T, W), int64, to words (B, T, C)."""
        B, T, W = ids.shape
        x = self.characters(ids).view(B * T, W, -1).transpose(1, 2)  # (B T, D, W)
        y = torch.cat(
            [F.relu(convolution(x).amax(2)) for convolution in self.convolutions], dim=1
        )  # (B T, N)
        for highway in self.highways:
            y = highway(y)
        return self.projection(y).view(B, T, -1)

    @torch.no_grad()
    def draw(self) -> None:
        """Draw fresh weights as the code released with ELMo does; a highway begins by giving on most of its input."""
        self.characters.weight.uniform_(-1.0, 1.0)
        for module in self.convolutions:
            convolution = cast(nn.Conv1d, module)
            assert convolution.bias is not None
            convolution.weight.uniform_(-0.05, 0.05)
            convolution.bias.zero_()
        for module in self.highways:
            highway = cast(Highway, module)
            for part, bias in ((highway.gate, 2.0), (highway.map, 0.0)):
                assert part.bias is not None
                part.weight.normal_(0.0, part.weight.shape[1] ** -0.5)
                part.bias.fill_(bias)
        assert self.projection.bias is not None
        self.projection.weight.normal_(0.0, self.projection.weight.shape[1] ** -0.5)
        self.projection.bias.zero_()
