"""A module with what its quantized weights mean in the place of its own, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from onnx import numpy_helper
from torch import nn

from portlm.artifact import Manifest
from portlm.compile.check import check_model
from portlm.compile.module_weights import renaming
from portlm.compile.quantize import Quantized, Scheme, dequantize, unpack, unpack_zeros


@contextmanager
def dequantized(module: nn.Module, folder: Path, manifest: Manifest) -> Iterator[None]:
    """Give a module what the weights of an artifact that was made of it mean; its own come back at the end.

    Args:
        module: declares its roles.
        folder: the artifact.
        manifest: of it. Nothing is changed if its weights are float32.
    """
    weights = _meanings(folder, manifest)
    rename = renaming(module)
    own = {}
    for path, parameter in (*module.named_parameters(), *module.named_buffers()):
        if (weight := weights.get(rename(path))) is not None:
            own[path] = parameter, parameter.data
            parameter.data = torch.from_numpy(weight).to(parameter.device)
    try:
        yield
    finally:
        for parameter, data in own.values():
            parameter.data = data


def _meanings(folder: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """The matrices that an artifact has in small numbers, float32 (N, K), by the name of the parameter."""
    found: dict[str, np.ndarray] = {}
    said = manifest.quantization
    if said is None:
        return found
    scheme = Scheme(said.bits, said.group, said.symmetric)
    for role in manifest.roles.values():
        graph = folder / next(iter(role.profiles.values()))
        arrays = {
            tensor.name: numpy_helper.to_array(tensor, str(graph.parent))
            for tensor in check_model(graph).graph.initializer
        }
        for name in (name.removesuffix(".q") for name in arrays if name.endswith(".q")):
            scale, zero = arrays[f"{name}.scale"], arrays.get(f"{name}.zero")
            zeros = None if zero is None else unpack_zeros(zero, scale.shape[1], scheme)
            q = unpack(arrays[f"{name}.q"], scheme)
            found[name] = dequantize(Quantized(q, scale, zeros), scheme)
    return found
