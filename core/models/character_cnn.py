"""A vector for a word from its characters, so that no word is unknown.

Kim et al., "Character-Aware Neural Language Models", 2016 (arXiv:1508.06615), in the form of Jozefowicz et al.,
"Exploring the Limits of Language Modeling", 2016 (arXiv:1602.02410), which ELMo took over: convolutions of several
widths over the characters of a word, the largest value of each filter, highway layers (Srivastava et al., 2015), and a
projection.

A convolution is a matrix product over windows of characters that lie side by side, so that graphs have it as any other
linear map.

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
        self.sizes = [size for size, _ in filters]
        self.convolutions = nn.ModuleList(
            [Linear(size * character_width, count, bias=True) for size, count in filters]
        )  # each (out, size D), the first character of a window first
        self.highways = nn.ModuleList([Highway(total) for _ in range(n_highway)])
        self.projection = Linear(total, width, bias=True)

    def forward(self, ids: Tensor) -> Tensor:
        """Map characters (B, T, W), int64, to words (B, T, C)."""
        B, T, W = ids.shape
        D = self.characters.weight.shape[1]
        places = self.characters(ids).view(B * T, W * D).split(D, dim=1)  # of each character (B T, D)
        found = []
        for size, convolution in zip(self.sizes, self.convolutions, strict=True):
            count = W - size + 1
            shifted = [
                torch.cat(places[first : first + count], dim=1).view(B * T, count, D) for first in range(size)
            ]
            y = convolution(torch.cat(shifted, dim=2) if size > 1 else shifted[0])  # (B T, count, filters)
            found.append(y.amax(1, keepdim=True))
        y = F.relu(torch.cat(found, dim=2)).view(B * T, -1)  # (B T, N)
        for highway in self.highways:
            y = highway(y)
        return self.projection(y).view(B, T, -1)

    @torch.no_grad()
    def draw(self) -> None:
        """Draw fresh weights as the code released with ELMo does; a highway begins by giving on most of its input."""
        self.characters.weight.uniform_(-1.0, 1.0)
        for module in self.convolutions:
            convolution = cast(Linear, module)
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
