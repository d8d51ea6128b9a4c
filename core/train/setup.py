"""From settings to the objects that train: device, model configuration, optimiser."""

from typing import TYPE_CHECKING, Any

import torch

from portlm import models
from portlm.errors import ConfigError, EngineUnavailableError
from portlm.ops.adamw import AdamW
from portlm.tokenizer import Tokenizer
from portlm.train.config import ModelSettings, OptimizerSettings
from portlm.train.state import decay_groups

if TYPE_CHECKING:
    from portlm.models import Config


def make_optimizer(model: torch.nn.Module, options: OptimizerSettings) -> AdamW:
    """Return AdamW over a model's parameters, as the settings say."""
    return AdamW(
        decay_groups(model, options.weight_decay),
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        max_grad_norm=options.clip or None,
    )


def model_config(shape: ModelSettings, tokenizer: Tokenizer) -> "Config":
    """Return the family's configuration for the asked shape and the tokenizer's vocabulary."""
    options: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "context_length": shape.context_length,
        "n_layer": shape.n_layer,
        "n_head": shape.n_head,
        "width": shape.width,
        "eos_token_ids": () if tokenizer.eos_id is None else (tokenizer.eos_id,),
    }
    if shape.family == "gpt2":
        options["dropout"] = shape.dropout
    else:
        options["n_kv_head"] = shape.n_kv_head or shape.n_head
        # LLaMA's own rule: three matrices of 8/3 C hold as much as two of 4 C; a multiple of 32 suits kernels.
        options["hidden"] = shape.hidden or -(-8 * shape.width // 3 // 32) * 32
        options["rope_theta"], options["tie_embeddings"] = shape.rope_theta, shape.tie_embeddings
    built: Config = models.FAMILIES[shape.family].config_class()(**options)
    return built


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
