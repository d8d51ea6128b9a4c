"""How much a model's predictions change with the rows of its token tables.

A row of a table that is looked up goes into the model as it is, so its own error d counts, and not that of a product.
To second order, what the predictions p lose in nats by d at one token is (Amari, "Natural gradient works efficiently in
learning", 1998)

    KL = d F d^T / 2,    F = E[g g^T],  g the gradient of log p(y) for y drawn from p,

with all tokens that follow in p. As a head, the same row changes one logit by d x, with x the head's input, and costs
p(row) d E[x x^T] d^T / 2 where the row is unlikely. A row is looked up as often as it is predicted, so that the sum
F + E[x x^T] says for every row of a tied table how its errors weigh: H of compile/gptq.py.

K width, T tokens.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from portlm.compile.moments import arguments_for, identity, names_of, reading_roles
from portlm.errors import PortlmError
from portlm.models.modes import answering
from portlm.models.roles import Role
from portlm.ops.kernel_op import without_kernels


class _Lookups(TorchFunctionMode):
    """Makes the rows that are looked up at given ids leaves of the gradient.

    Attributes:
        found: names of tables and rows (..., K).
    """

    def __init__(self, names: Mapping[Any, str], ids: Tensor):
        super().__init__()
        self._names, self._ids = names, ids
        self.found: list[tuple[str, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at a call, and make it."""
        result = func(*args, **(kwargs or {}))
        if func is F.embedding:
            ids, table = _operands(*args, **(kwargs or {}))
            name = self._names.get(identity(table))
            if name and ids.data_ptr() == self._ids.data_ptr() and ids.shape == self._ids.shape:
                leaf = result.detach().requires_grad_()
                self.found.append((name, leaf))
                result = leaf.clone()  # which a model may write into, and not into a leaf
        return result


def _operands(input: Tensor, weight: Tensor, *others: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """What F.embedding is called with, by place or by name."""
    return input, weight


def sensitivities(
    module: nn.Module, roles: Mapping[str, Role], batches: Iterable[np.ndarray]
) -> dict[str, np.ndarray]:
    """Return F for each table that is looked up at token ids, by the name of its parameter.

    What is drawn follows from the text alone. A model whose roles give no logits, or no gradients, has none.

    Args:
        module: has its values, and is left as it is.
        roles: its functions by name.
        batches: ids (B, T) int64. Memory is that of a training step on one of them.

    Returns:
        (K, K) float32.

    Raises:
        PortlmError: a gradient is not finite.
    """
    sums: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    tokens = 0
    for ids in batches:
        tokens += ids.size
        given = torch.from_numpy(np.ascontiguousarray(ids)).to(device)
        for role in reading_roles(roles).values():
            if role.outputs[0].name != "logits":
                continue
            for name, gradient in _gradients(module, role, given, generator):
                flat = gradient.reshape(-1, gradient.shape[-1])
                total = sums.setdefault(name, torch.zeros(flat.shape[1], flat.shape[1], device=device))
                total.addmm_(flat.T, flat)
    for name, total in sums.items():
        if not bool(torch.isfinite(total).all()):
            raise PortlmError(
                f"the gradient at the rows of {name} is not finite: look for weights that overflow float32"
            )
    return {name: total.div_(tokens).cpu().numpy() for name, total in sums.items()}


def _gradients(
    module: nn.Module, role: Role, ids: Tensor, generator: torch.Generator
) -> list[tuple[str, Tensor]]:
    """The gradient at the rows of each lookup, of the log-likelihood of tokens that the model draws itself."""
    lookups = _Lookups(names_of(module), ids)
    with answering(module), torch.enable_grad(), without_kernels():
        with lookups:
            logits = role.function(*arguments_for(role, ids))[0]
        if not lookups.found or not logits.requires_grad:
            return []
        likelihood = logits.flatten(0, -2).log_softmax(-1)
        p = likelihood.detach().exp().cpu()
        if not bool(torch.isfinite(p).all()):
            raise PortlmError(
                "the model's logits on the text are not numbers: look for weights that overflow float32"
            )
        drawn = torch.multinomial(p, 1, generator=generator).to(ids.device)
        names = [name for name, _ in lookups.found]
        rows = [row for _, row in lookups.found]
        gradients = torch.autograd.grad(likelihood.gather(1, drawn).sum(), rows, allow_unused=True)
    return [(name, g) for name, g in zip(names, gradients, strict=True) if g is not None]
