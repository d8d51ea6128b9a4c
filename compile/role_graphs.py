"""The graphs of a module's roles, and their files: captured from the model's own code, written, and looked at again."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

from portlm.artifact import FileEntry, hash_files
from portlm.compile.check import check_model
from portlm.compile.graph import WeightFile
from portlm.compile.mapped import MappedFile
from portlm.compile.quantize import Quantizer
from portlm.errors import FormatError
from portlm.ops.spec import FAR
from portlm.roles import file_stem

if TYPE_CHECKING:
    from torch import nn

    from portlm.compile.module_weights import Weights
    from portlm.models.roles import Role


def roles_to_export(module: "nn.Module") -> "Mapping[str, Role]":
    """Return the roles of a module.

    Raises:
        FormatError: it declares none.
    """
    from portlm.models.roles import roles_of

    roles = roles_of(module)
    if not roles:
        raise FormatError(
            f"{type(module).__name__} declares no roles: give it a method roles(), as portlm.models.roles describes"
        )
    return roles


Graphs = dict[str, tuple[WeightFile, dict[str, onnx.ModelProto]]]
"""Role -> the file of its weights, not yet written, and its graph in each profile."""


def capture(
    module: "nn.Module",
    roles: "Mapping[str, Role]",
    profiles: Sequence[str],
    context_length: int,
    quantizer: Quantizer | None = None,
    halves: "Callable[[Weights], Mapping[str, np.ndarray]] | None" = None,
    cache: str | None = None,
) -> Graphs:
    """Return the graphs of a module.

    Args:
        module: the model.
        roles: its functions by name.
        profiles: names from forms.PROFILES.
        context_length: positions are below it.
        quantizer: chooses the numbers of matrices and token tables; None leaves them as they are.
        halves: finds weights of 16 bits, see keep_halves; None leaves all that are not quantized float32.
        cache: what keys and values are kept in; None keeps float32.

    Raises:
        FormatError: the model computes what a graph cannot say, or a weight is not finite.
        UsageError: the quantizer's group does not divide the inputs of a matrix, or there is nothing to keep in 8 bits.
    """
    from portlm.compile.capture import build_graph
    from portlm.compile.module_weights import Weights
    from portlm.compile.quantized_cache import check_recordings
    from portlm.compile.quantized_graph import keep_halves, quantize_weights
    from portlm.compile.trace import record

    recordings = {name: record(module, name, role) for name, role in roles.items()}
    if cache is not None:
        check_recordings(roles, recordings)
    weights = Weights(module, recordings.values())
    small = None if quantizer is None else quantize_weights(roles, recordings, weights, quantizer)
    if halves is not None:
        small = keep_halves(roles, recordings, weights, halves(weights))
    graphs: Graphs = {}
    for name, role in roles.items():
        file = WeightFile(weight_file(name))
        options = {"name": name, "family": family_of(module)}
        graphs[name] = (
            file,
            {
                profile: build_graph(
                    role,
                    recordings[name],
                    weights,
                    file,
                    profile=profile,
                    context_length=context_length,
                    small=small,
                    byte_cache=cache is not None,
                    **options,
                )
                for profile in profiles
            },
        )
    return graphs


def write_graphs(graphs: Graphs, folder: Path, source: MappedFile | None = None) -> dict[str, FileEntry]:
    """Write <role>.<profile>.onnx for each role and profile, and each role's weight file; check what was written.

    Args:
        graphs: of a module.
        folder: is made.
        source: see WeightFile.write.

    Returns:
        Size and sha256 of the files, by name.

    Raises:
        FormatError: a weight holds NaN or infinity.
    """
    folder.mkdir()
    files: dict[str, FileEntry] = {}
    for name, (file, models) in graphs.items():
        for profile, model in models.items():
            path = folder / graph_file(name, profile)
            path.write_bytes(model.SerializeToString(deterministic=True))
        files[weight_file(name)] = FileEntry(
            sha256=file.write(folder / weight_file(name), source), size=file.size
        )
        for profile in models:
            check_model(folder / graph_file(name, profile))
        files |= hash_files(folder, [graph_file(name, profile) for profile in models])
    return files


def graph_file(role: str, profile: str) -> str:
    """The name of a role's graph: "head:topic" becomes head-topic.<profile>.onnx."""
    return f"{file_stem(role)}.{profile}.onnx"


def weight_file(role: str) -> str:
    """The name of the file with a role's weights."""
    return f"{file_stem(role)}.onnx.data"


def family_of(module: "nn.Module") -> str:
    """Return the family of a module, "module" if it is of none."""
    return str(getattr(getattr(module, "config", None), "family", "module"))


def context_length_of(module: "nn.Module") -> int:
    """Return how many positions a module has.

    Raises:
        FormatError: it does not say so, or what it says cannot be.
    """
    config = getattr(module, "config", None)
    for name in ("context_length", "max_position_embeddings", "n_positions"):
        value = getattr(config, name, None) or getattr(module, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            break
    else:
        raise FormatError(
            f"{type(module).__name__} does not say how many positions it has: give it a context_length"
        )
    if not 1 <= value < FAR:
        raise FormatError(f"context_length must be an integer from 1 to {int(FAR) - 1}, got {value}")
    return value
