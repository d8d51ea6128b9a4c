"""What a run carries from step to step besides its weights, as plain tensors: moments and random generators.

Everything here travels as safetensors and JSON, so a checkpoint from a stranger can be damaged but cannot run code.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from portlm.errors import FormatError
from portlm.ops.adamw import AdamW
from portlm.train.adagrad import AdaGrad
from portlm.train.muon import MuonWithAdamW
from portlm.train.nt_asgd import NTASGD

Optimizer = AdamW | MuonWithAdamW | AdaGrad | NTASGD

_CPU, _CUDA = "torch.cpu", "torch.cuda"


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of PyTorch's generators that training on ``device`` draws from, as uint8 vectors."""
    state = {_CPU: torch.get_rng_state()}
    if device.type == "cuda":
        state[_CUDA] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Put the generators back where :func:`random_state` found them.

    Raises:
        FormatError: A state is missing or no generator takes it.
    """
    wanted = random_state(device)
    if missing := wanted.keys() - state.keys():
        raise FormatError(
            f"the checkpoint has no random state {sorted(missing)[0]}: it was saved on another device"
        )
    try:
        torch.set_rng_state(state[_CPU])
        if _CUDA in wanted:
            torch.cuda.set_rng_state(state[_CUDA], device)
    except (RuntimeError, TypeError) as error:
        raise FormatError(f"the checkpoint's random state does not fit this PyTorch: {error}") from error


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the optimiser's memory: tensors named ``<parameter>/<key>``, and its plain numbers likewise.

    What belongs to no parameter is named ``/<key>``.
    Hyperparameters are not part of it: they follow from the configuration and the step.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for part in _parts(optimizer):
        numbers |= {f"/{key}": value for key, value in getattr(part, "memory", {}).items()}
        state = part.state_dict()["state"]
        for index, name in enumerate(_names(model, part)):
            for key, value in state.get(index, {}).items():
                target: dict[str, Any] = tensors if isinstance(value, Tensor) else numbers
                target[f"{name}/{key}"] = value
    return tensors, numbers


def set_optimizer_state(
    model: nn.Module,
    optimizer: Optimizer,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
) -> None:
    """Give a fresh optimiser the memory that :func:`optimizer_state` returned.

    Raises:
        FormatError: A tensor belongs to no parameter, has another shape than its parameter, or is missing.
    """
    parameters = dict(model.named_parameters())
    parts = _parts(optimizer)
    places = {
        name: (n, index) for n, part in enumerate(parts) for index, name in enumerate(_names(model, part))
    }
    states: list[dict[int, dict[str, Any]]] = [{} for _ in parts]
    recalls = [part for part in parts if hasattr(part, "recall")]
    memory: dict[str, Any] = {}
    for path, value in (*tensors.items(), *numbers.items()):
        name, _, key = path.rpartition("/")
        if not name and recalls:
            memory[key] = value
            continue
        if name not in places:
            raise FormatError(
                f"the checkpoint's optimiser remembers {path!r}, which is no parameter of this model"
            )
        if isinstance(value, Tensor) and value.numel() != 1 and value.shape != parameters[name].shape:
            raise FormatError(
                f"the checkpoint's optimiser remembers {path!r} with shape {tuple(value.shape)}, "
                f"but the parameter has {tuple(parameters[name].shape)}"
            )
        number, index = places[name]
        states[number].setdefault(index, {})[key] = value
    for part, state in zip(parts, states, strict=True):
        try:
            part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})
            if (recall := getattr(part, "recall", None)) is not None:
                recall(memory)
        except ValueError as error:
            raise FormatError(f"the checkpoint's optimiser cannot go on here: {error}") from error


def _parts(optimizer: Optimizer) -> tuple[torch.optim.Optimizer, ...]:
    return optimizer.parts if isinstance(optimizer, MuonWithAdamW) else (optimizer,)


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the parameters' names in the order in which the optimiser's state_dict numbers them."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
