"""From settings to the objects that train: device, schedule and optimiser."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from portlm.errors import ConfigError, EngineUnavailableError
from portlm.ops.adamw import AdamW
from portlm.train.adagrad import AdaGrad
from portlm.train.config import OptimizerSettings, RunConfig
from portlm.train.muon import Muon, MuonWithAdamW, hidden_groups
from portlm.train.nt_asgd import NTASGD
from portlm.train.schedule import InverseSqrt, SlantedTriangle, WarmupCosine, WarmupLinear

Scale = Callable[[Tensor], float]


def make_schedule(config: RunConfig) -> Callable[[int], float]:
    """Return the learning rate as a function of the step, counted from 0, as the settings say."""
    options, peak = config.schedule, config.optimizer.lr
    if options.shape == "slanted":
        warmup = options.warmup
        cut = int(warmup) if warmup >= 1 else int(warmup * config.steps)  # rounded down, as in the paper
        return SlantedTriangle(peak, options.ratio, cut, config.steps)
    if options.shape == "inverse-sqrt":
        return InverseSqrt(peak, max(config.warmup_steps, 1))
    shape = WarmupCosine if options.shape == "cosine" else WarmupLinear
    return shape(peak, options.min_lr, config.warmup_steps, config.steps)


def alike(parameter: Tensor) -> float:
    """Let every parameter learn at the same rate."""
    return 1.0


def make_optimizer(
    model: torch.nn.Module, options: OptimizerSettings, scale: Scale = alike
) -> AdamW | MuonWithAdamW | AdaGrad | NTASGD:
    """Return the optimiser of all parameters of a model that are trained, as the settings say.

    Args:
        model: Parameters that take no gradient are left out.
        options: Its settings.
        scale: What the learning rate of a parameter is multiplied with; each group says it as ``scale``.

    Raises:
        ConfigError: Muon is asked for, and the model has no matrices for it.
    """
    clip, parameters = options.clip or None, [p for p in model.parameters() if p.requires_grad]
    if options.name == "adamw":
        return _adamw(parameters, options, clip, scale)
    if options.name == "adagrad":
        groups = by_scale(decay_groups(parameters, options.weight_decay), scale)
        return AdaGrad(groups, lr=options.lr, eps=options.eps, max_grad_norm=clip)
    if options.name == "nt-asgd":
        groups = by_scale(decay_groups(parameters, options.weight_decay), scale)
        return NTASGD(groups, lr=options.lr, patience=options.patience, max_grad_norm=clip)
    hidden = hidden_groups(model)
    if not hidden:
        raise ConfigError(
            "optimizer.name muon is for the linear layers inside a model's blocks, and this model has none: "
            "train it with adamw"
        )
    taken = {parameter for group in hidden for parameter in group["params"]}
    muon = Muon(by_scale(hidden, scale), options.lr, options.momentum, options.weight_decay)
    return MuonWithAdamW(muon, _adamw([p for p in parameters if p not in taken], options, None, scale), clip)


def _adamw(
    parameters: Sequence[Tensor], options: OptimizerSettings, clip: float | None, scale: Scale
) -> AdamW:
    groups = by_scale(decay_groups(parameters, options.weight_decay), scale)
    betas = (options.beta1, options.beta2)
    return AdamW(groups, lr=options.lr, betas=betas, eps=options.eps, max_grad_norm=clip)


def decay_groups(parameters: Sequence[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Return two parameter groups: matrices, which decay, and vectors (biases, gains), which do not."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def by_scale(groups: Sequence[dict[str, Any]], scale: Scale) -> list[dict[str, Any]]:
    """Return the same parameter groups, each divided into those whose parameters have one scale, in their order."""
    found = []
    for group in groups:
        parts: dict[float, list[Tensor]] = {}
        for p in group["params"]:
            parts.setdefault(scale(p), []).append(p)
        found += [{**group, "params": params, "scale": factor} for factor, params in parts.items()]
    return found


def training_device(name: str) -> torch.device:
    """Return the device with this name.

    Raises:
        ConfigError: It is no device that can train.
        EngineUnavailableError: This machine does not have it.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is no device: write cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} cannot train: write cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EngineUnavailableError(
            "this machine or this PyTorch has no CUDA device: train with device = cpu"
        )
    return device
