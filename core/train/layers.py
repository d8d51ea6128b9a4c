"""Which layers of a model learn, and how fast: what fine-tuning asks beside a learning rate for all.

Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", 2018 (arXiv:1801.06146): lower layers
hold what is general and are changed less. A layer learns at the rate of the one above it, divided by 2.6
("discriminative fine-tuning"), and begins to learn an epoch after it ("gradual unfreezing").

Groups are counted from below: 0 for what is in front of the blocks, one for each block (with the norm behind the last),
and one for what is on top: heads, a pooler, an output matrix of its own.
"""

from torch import Tensor, nn

from portlm.errors import ConfigError
from portlm.train.config import LayerSettings

__all__ = ["Layers", "layer_groups"]

_ON_TOP = ("heads", "pooler")


def layer_groups(model: nn.Module) -> list[list[nn.Parameter]]:
    """Return the parameters of a model in groups, the lowest first.

    Raises:
        ConfigError: The model has no blocks in one list, so that nothing says what lies above what.
    """
    parts = dict(model.named_children())
    lists = [name for name, part in parts.items() if isinstance(part, nn.ModuleList) and len(part)]
    if len(lists) != 1:
        raise ConfigError(
            "layers.freeze, layers.decay and layers.unfreeze are for a model with one stack of blocks, and this one "
            f"has {len(lists)}: leave them out"
        )
    blocks = parts[lists[0]]
    assert isinstance(blocks, nn.ModuleList)
    top = {*_ON_TOP, getattr(getattr(model, "PARTS", None), "head", "head")}
    groups: list[list[nn.Parameter]] = [[] for _ in range(len(blocks) + 2)]
    behind, seen = False, set[nn.Parameter]()
    for name, part in parts.items():
        if part is blocks:
            behind = True
            for place, block in enumerate(blocks, 1):
                _take(groups[place], block, seen)
        elif part is not None:
            _take(groups[-1 if name in top else len(blocks) if behind else 0], part, seen)
    groups[0] += [p for p in model.parameters() if p not in seen]
    return groups


def _take(group: list[nn.Parameter], part: nn.Module, seen: set[nn.Parameter]) -> None:
    new = [p for p in part.parameters() if p not in seen]
    seen.update(new)
    group += new


class Layers:
    """The layers of a model that is trained with some settings.

    Args:
        model: What is trained. With ``freeze`` its lower groups take no gradient from now on.
        settings: Which learn.

    Raises:
        ConfigError: The model's layers are in no order, or there is nothing on top of them.
    """

    def __init__(self, model: nn.Module, settings: LayerSettings):
        self.settings = settings
        groups = layer_groups(model) if settings != LayerSettings() else [list(model.parameters())]
        self._groups = [group for group in groups if group]
        if settings.freeze == "backbone":
            if not groups[-1]:
                raise ConfigError(
                    "layers.freeze = backbone trains what is on top of the blocks, and this model has nothing there: "
                    "use an objective with a head"
                )
            for group in self._groups[:-1]:
                for p in group:
                    p.requires_grad_(False)

    def scale(self, parameter: Tensor) -> float:
        """Return what the learning rate of a parameter is multiplied with: 1 in the topmost group."""
        if self.settings.decay == 1:
            return 1.0
        depth = next(i for i, group in enumerate(self._groups) if any(p is parameter for p in group))
        return float(self.settings.decay ** (depth - len(self._groups) + 1))

    def set_learning(self, step: int) -> None:
        """Let the groups learn that do so at a step, counted from 0: the topmost at first, then one more at a time."""
        if not self.settings.unfreeze:
            return
        count = 1 + step // self.settings.unfreeze
        for height, group in enumerate(reversed(self._groups)):
            for p in group:
                p.requires_grad_(height < count)
