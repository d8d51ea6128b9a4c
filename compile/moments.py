"""Second moments of what goes into each matrix of a module while it reads token ids.

The module runs through the functions of its roles, on the references of portlm's ops: in those every linear map, one
inside a fused op too, is a call of torch.nn.functional.linear, which is where matrices and their inputs are seen. So
there is nothing here per op or per family. Inputs are not kept: what is kept of an input of width K are K x K float32.

B rows, T tokens, K inputs of a matrix.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from portlm.errors import PortlmError, UsageError
from portlm.models.modes import answering
from portlm.models.roles import Role
from portlm.ops.kernel_op import without_kernels

FROM_TOKENS = ("input_ids", "attention_mask", "position_ids", "positions", "logits_to_keep")


Place = tuple[
    str, int
]  # a role, and which of the inputs of its matrices, in the order in which they are used


@dataclass(frozen=True)
class Site:
    """What goes into some matrices.

    Attributes:
        places: where; one, unless a matrix is used several times.
        names: of the matrices' parameters.
        width: K.
    """

    places: tuple[Place, ...]
    names: tuple[str, ...]
    width: int


class _DoneError(Exception):
    """Everything that is wanted was seen: the rest need not be computed."""


class _Watch(TorchFunctionMode):
    """Calls `seen(place, name, x)` whenever a matrix is used."""

    def __init__(self, role: str, parameters: Mapping[Any, str], seen: Callable[[Place, str, Tensor], None]):
        super().__init__()
        self._role, self._parameters, self._seen = role, parameters, seen
        self._count, self._last = -1, torch.empty(0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at a call, and make it."""
        if func is F.linear:
            x, weight = _operands(*args, **(kwargs or {}))
            if name := self._parameters.get(identity(weight)):
                if x is not self._last:  # by which q, k and v are seen to have one input
                    self._count, self._last = self._count + 1, x
                self._seen((self._role, self._count), name, x)
        return func(*args, **(kwargs or {}))


def _operands(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What F.linear is called with, by place or by name."""
    return input, weight


def identity(tensor: Tensor) -> Any:
    """Return what two tensors share if they are the same numbers in memory."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def names_of(module: nn.Module) -> dict[Any, str]:
    """Return the name of each parameter by its identity, the first of those that are the same."""
    names: dict[Any, str] = {}
    for name, parameter in module.named_parameters():
        names.setdefault(identity(parameter), name)
    return names


def reading_roles(roles: Mapping[str, Role]) -> dict[str, Role]:
    """Return those roles that take nothing but what follows from token ids."""
    return {name: role for name, role in roles.items() if _reads_tokens(role)}


class Reader:
    """A module and the inputs of its matrices.

    Attributes:
        sites: in the order in which a text reaches them.

    Args:
        module: has its values, and is left as it is.
        roles: its functions by name. Those that take something that does not follow from tokens are not called.
    """

    def __init__(self, module: nn.Module, roles: Mapping[str, Role]):
        self._module = module
        self._device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self._roles = reading_roles(roles)
        found: dict[Place, dict[str, int]] = {}

        def note(place: Place, name: str, x: Tensor) -> None:
            found.setdefault(place, {})[name] = x.shape[-1]

        self._run(torch.zeros(1, 1, dtype=torch.int64), self._roles, note)
        self.sites = _joined(found)

    def moments(
        self, batches: Iterable[np.ndarray], sites: Collection[Site] | None = None
    ) -> dict[Site, np.ndarray]:
        """Return the mean of x x^T over all tokens, for each input.

        Args:
            batches: ids (B, T) int64.
            sites: of those wanted; what only comes after them is not computed. None for all.

        Returns:
            (K, K) float32 for each site.

        Raises:
            PortlmError: an input is not finite, or too large for its square.
        """
        sites = self.sites if sites is None else sites
        wanted = {place: site for site in sites for place in site.places}
        last = {role: max((n for r, n in wanted if r == role), default=-1) for role in self._roles}
        roles = {name: role for name, role in self._roles.items() if last[name] >= 0}
        sums = {site: torch.zeros(site.width, site.width, device=self._device) for site in sites}
        noted: set[Place] = set()
        tokens = 0

        def add(place: Place, name: str, x: Tensor) -> None:
            if place in wanted and place not in noted:
                noted.add(place)
                flat = x.reshape(-1, x.shape[-1])
                sums[wanted[place]].addmm_(flat.T, flat)
            if place[1] == last[place[0]]:
                raise _DoneError

        for ids in batches:
            noted.clear()
            self._run(torch.from_numpy(np.ascontiguousarray(ids)), roles, add)
            tokens += ids.size
        if not tokens:
            raise UsageError("there are no tokens to calibrate with")
        for site, total in sums.items():
            if not bool(torch.isfinite(total).all()):
                raise PortlmError(
                    f"what the text puts into {site.names[0]} is not finite, or too large to be squared: "
                    "look for weights that overflow float32"
                )
        return {site: total.div_(tokens).cpu().numpy() for site, total in sums.items()}

    def _run(
        self, ids: Tensor, roles: Mapping[str, Role], seen: Callable[[Place, str, Tensor], None]
    ) -> None:
        with answering(self._module), torch.no_grad(), without_kernels():
            for role, spec in roles.items():
                watch = _Watch(role, names_of(self._module), seen)
                try:
                    with watch:
                        spec.function(*arguments_for(spec, ids.to(self._device)))
                except _DoneError:
                    pass


def _joined(found: Mapping[Place, Mapping[str, int]]) -> tuple[Site, ...]:
    """One site for each place, and for all places that have a matrix in common."""
    sites: list[Site] = []
    for place, widths in found.items():
        same = [site for site in sites if widths.keys() & set(site.names)]
        places = [*(p for site in same for p in site.places), place]
        names = dict.fromkeys([*(name for site in same for name in site.names), *widths])
        sites = [site for site in sites if site not in same]
        sites.append(Site(tuple(places), tuple(names), next(iter(widths.values()))))
    return tuple(sites)


def _reads_tokens(role: Role) -> bool:
    names = {spec.name for spec in role.inputs}
    return "input_ids" in names <= set(FROM_TOKENS) and not any(s.initial == "given" for s in role.state)


def arguments_for(role: Role, ids: Tensor) -> Sequence[Tensor]:
    """What a role's function takes for the first tokens of B rows, without padding."""
    B, T = ids.shape
    places = torch.arange(T, device=ids.device)
    values = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": places.expand(B, T),
        "positions": places,
        "logits_to_keep": places,
    }
    sizes = {"batch": B, "past": 0}
    states = [
        torch.zeros(
            [sizes[d] if isinstance(d, str) else d for d in state.shape],
            dtype=getattr(torch, state.dtype),
            device=ids.device,
        )
        for state in role.state
    ]
    return [*(values[spec.name] for spec in role.inputs), *states]
