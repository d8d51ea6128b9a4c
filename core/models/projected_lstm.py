"""An LSTM layer whose state is a projection of its cells, with bounds on both.

Sak, Senior and Beaufays, "Long Short-Term Memory Recurrent Neural Network Architectures for Large Scale Acoustic
Modeling", 2014; the bounds are those of the language models of Jozefowicz et al., "Exploring the Limits of Language
Modeling", 2016:

    i, f, g, o = W x + b + U h,  c' = clip(sigmoid(f) c + sigmoid(i) tanh(g)),  h' = clip(P (sigmoid(o) tanh(c')))

Gates in the order of torch.nn. It is written in operators that have a gradient and a form in graphs, for a whole text
and for one token alike: there is no kernel that goes through a text.

B batch, T time, C width of what is read, M cells, H units of the state.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from portlm.models.layers import Linear

State = tuple[Tensor, Tensor]  # the state (B, H), and the cells (B, M)
Counting = tuple[Tensor, Tensor]  # (B, T, 1) each: 1 and 0 for a token, 0 and 1 for padding


class ProjectedLSTM(nn.Module):
    """One layer in one direction.

    Args:
        width: C.
        cells: M.
        units: H.
        cell_clip: No cell is beyond it; 0 for no bound.
        projection_clip: The same of the state.
    """

    def __init__(self, width: int, cells: int, units: int, *, cell_clip: float, projection_clip: float):
        super().__init__()
        self.cell_clip, self.projection_clip = cell_clip, projection_clip
        self.input = Linear(width, 4 * cells, bias=True)
        self.recurrent = Linear(units, 4 * cells, bias=False)
        self.projection = Linear(cells, units, bias=False)

    def forward(
        self, x: Tensor, state: State, counting: Counting | None, *, reverse: bool
    ) -> tuple[Tensor, State]:
        """Read a text from a state on.

        Args:
            x: (B, T, C), T at least 1.
            state: Before the token that is read first.
            counting: What counts; padding leaves the state as it was. None if all does.
            reverse: Read the last token first.

        Returns:
            (B, T, H), the state after each token, and both parts of it after the token that is read last.
        """
        h, c = (part.unsqueeze(1) for part in state)  # (B, 1, H), (B, 1, M)
        gates = _tokens(self.input(x))
        flags = None if counting is None else list(zip(*map(_tokens, counting), strict=True))
        found: list[Tensor] = []
        for t in range(len(gates))[:: -1 if reverse else 1]:
            after = self._token(gates[t], h, c)
            if flags is None:
                h, c = after
            else:
                real, padding = flags[t]
                h, c = (real * new + padding * old for new, old in zip(after, (h, c), strict=True))
            found.append(h)
        y = found[0] if len(found) == 1 else torch.cat(found[::-1] if reverse else found, dim=1)
        return y, (h.squeeze(1), c.squeeze(1))

    def _token(self, projected: Tensor, h: Tensor, c: Tensor) -> State:
        """Read one token, (B, 1, ·) all; projected is W x + b."""
        i, f, g, o = (projected + self.recurrent(h)).chunk(4, dim=-1)
        c = _clipped(torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g), self.cell_clip)
        return _clipped(self.projection(torch.sigmoid(o) * torch.tanh(c)), self.projection_clip), c


def _tokens(x: Tensor) -> Sequence[Tensor]:
    """Return each token of (B, T, ·) as (B, 1, ·)."""
    return (x,) if x.shape[1] == 1 else x.split(1, dim=1)


def _clipped(x: Tensor, bound: float) -> Tensor:
    return x.clamp(-bound, bound) if bound else x
