"""What models share that no other program has: their parameters have no names but their own."""

from typing import Any

from torch import nn


class OwnNames(nn.Module):
    """A model whose files are portlm's alone."""

    def num_parameters(self) -> int:
        """Return the number of parameters, a shared one counted once."""
        return sum(p.numel() for p in self.parameters())

    @staticmethod
    def hf_name(name: str) -> tuple[str, bool]:
        """Return a tensor's name in the files, its own, and that it is not stored transposed there."""
        return name, False

    @staticmethod
    def hf_alias(name: str) -> str | None:
        """Return the usual name of a tensor in a foreign file: there is no other."""
        return name

    @staticmethod
    def hf_tied(config: Any) -> dict[str, str]:
        """Return {name: the tensor it must equal} for what some files store twice: nothing."""
        return {}
