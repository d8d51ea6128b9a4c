"""The model's own code on what an artifact's quantized weights mean: the answer that every engine has to give.

Where each weight lies is said by the plans of the artifact's graphs (portlm.plan), under the names of checkpoints.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from portlm.artifact import Manifest, check_files
from portlm.errors import FormatError
from portlm.files import safe_join, shown
from portlm.models import CONFIG, FAMILIES, load_config
from portlm.ops.quantized import check_weight, dequantized
from portlm.plan import read_plan
from portlm.runtimes.torch_operators import RefusedError
from portlm.runtimes.torch_plan import map_weights


def load_dequantized(folder: Path, manifest: Manifest, plans: Iterable[Path]) -> Any:
    """Return the model of an artifact with quantized weights, in float32 and in evaluation mode.

    Args:
        folder: the artifact.
        manifest: of it.
        plans: one for each role.

    Raises:
        FormatError: a file is missing or damaged, or its weights are not those that config.json asks for.
    """
    check_files(folder, [CONFIG], manifest)
    config = load_config(folder)
    assert manifest.quantization is not None
    bits, stored = manifest.quantization.bits, _stored(folder, manifest, plans)
    model: Any = FAMILIES[config.family].model_class()(config, init=False)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            name, _ = model.hf_name(path)
            tensor = stored.get(name)
            if (weight := stored.get(f"{name}.q")) is not None:
                scale, zero = stored.get(f"{name}.scale"), stored.get(f"{name}.zero")
                try:
                    if scale is None:
                        raise ValueError("its scales are missing")
                    check_weight(name, weight, scale, zero, bits)
                except ValueError as error:
                    raise FormatError(f"{folder}: {name}: {error}; export again") from error
                tensor = dequantized(weight, scale, zero, bits)
            if tensor is None or tensor.shape != parameter.shape:
                found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
                raise FormatError(
                    f"{folder}: {name} is {found}, and {CONFIG} asks for {tuple(parameter.shape)}; export again"
                )
            parameter.copy_(tensor)
    return model.eval()


def _stored(folder: Path, manifest: Manifest, plans: Iterable[Path]) -> dict[str, Tensor]:
    """Every weight of the artifact, as it lies in the file."""
    found: dict[str, Tensor] = {}
    for path in plans:
        plan = read_plan(path)
        role = manifest.roles.get(plan.role)
        if role is None or plan.weights_file != role.weights:
            raise FormatError(
                f"{path}: made of another export than this artifact, {shown(plan.role)}; compile again"
            )
        check_files(folder, [role.weights], manifest)
        try:
            found |= map_weights(plan, safe_join(folder, role.weights))
        except RefusedError as error:
            raise FormatError(f"{path}: {error}; compile again") from error
    return found
