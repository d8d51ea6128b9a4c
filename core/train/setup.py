"""From settings to the objects that train: device and optimiser."""

import torch

from portlm.errors import ConfigError, EngineUnavailableError
from portlm.ops.adamw import AdamW
from portlm.train.config import OptimizerSettings
from portlm.train.state import decay_groups


def make_optimizer(model: torch.nn.Module, options: OptimizerSettings) -> AdamW:
    """Return AdamW over a model's parameters, as the settings say."""
    return AdamW(
        decay_groups(model, options.weight_decay),
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        max_grad_norm=options.clip or None,
    )


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
