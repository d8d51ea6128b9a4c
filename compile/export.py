"""From a checkpoint folder to an artifact folder: the graphs in each profile, their weights and the manifest.

No PyTorch model is traced: each family writes its decoder directly (compile/families/), so the graph is as small
as the model and equal bytes come from equal checkpoints.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from portlm import __version__
from portlm.artifact import (
    Manifest,
    ModelSpec,
    Provenance,
    RoleSpec,
    StateSpec,
    TensorSpec,
    hash_files,
    instead,
    list_files,
    read_manifest,
    write_manifest,
)
from portlm.compile.check import check_model
from portlm.compile.families import CacheShape, Decoder, check_tensors, decoder_of
from portlm.compile.forms import DOMAIN_VERSION, PROFILES
from portlm.compile.graph import OPSET, GraphBuilder, WeightFile
from portlm.errors import FormatError, StorageError, UsageError
from portlm.files import check_space, free_bytes, read_json
from portlm.folders import new_folder
from portlm.weights import load_numpy

WEIGHTS = "decoder.onnx.data"
TOTAL = "past + sequence"  # TVM's importer reads this as the sum it is, and can then prove that shapes agree

INPUTS = (
    TensorSpec("input_ids", "int64", ("batch", "sequence")),
    TensorSpec("attention_mask", "int64", ("batch", TOTAL)),
    TensorSpec("position_ids", "int64", ("batch", "sequence")),
)

COPIED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def export(checkpoint: str | Path, out: str | Path, profiles: Sequence[str] = ("portable", "fused")) -> Path:
    """Export a checkpoint to an artifact folder, which appears complete or not at all.

    Args:
        checkpoint: folder with config.json and model.safetensors.
        out: the artifact folder. An artifact that is already there is replaced, anything else is refused.
        profiles: which graphs to write.

    Returns:
        The artifact folder.

    Raises:
        FormatError: the checkpoint is damaged or not of a known family.
        UsageError: `out` holds something that is not an artifact, or a profile is unknown.
        StorageError: the disk is full or refuses. What was there before is untouched.
    """
    source, target = Path(checkpoint), Path(out)
    if not profiles or set(profiles) - PROFILES.keys():
        raise UsageError(f"profiles must be among {', '.join(PROFILES)}, got {', '.join(profiles) or 'none'}")
    _check_target(source, target)
    config_file, weight_file = source / "config.json", source / "model.safetensors"
    if not config_file.exists() and (hint := instead(source)):
        raise FormatError(f"{config_file} does not exist: {hint}")
    config = read_json(config_file)
    if not isinstance(config, dict):
        raise FormatError(f"{config_file}: must hold an object")
    decoder = decoder_of(config, config_file)
    tensors = check_tensors(decoder, load_numpy(weight_file), weight_file)

    copied = [name for name in COPIED if (source / name).is_file()]
    size = sum((source / name).stat().st_size for name in copied) + sum(t.nbytes for t in tensors.values())
    size += size // 10
    check_space(target.parent, size)

    try:
        with new_folder(target) as folder:
            for name in copied:
                shutil.copyfile(source / name, folder / name)
            (folder / "onnx").mkdir()
            write_graphs(decoder, decoder.weights(tensors), folder / "onnx", profiles)
            parameters = sum(tensor.size for tensor in tensors.values())
            write_manifest(folder, _describe(decoder, parameters, profiles, folder))
    except OSError as error:
        room = f"{size} bytes are needed and {free_bytes(target.parent)} are free"
        raise StorageError(f"{target} cannot be written: {error.strerror or error}; {room}") from error
    return target


def write_graphs(decoder: Decoder, weights: dict[str, Any], folder: Path, profiles: Sequence[str]) -> None:
    """Write decoder.<profile>.onnx for each profile, and the weight file they share; check what was written.

    Args:
        decoder: describes the model.
        weights: its parameters in graph orientation.
        folder: an existing folder.
        profiles: names from forms.PROFILES.
    """
    file = WeightFile(WEIGHTS)
    for profile in profiles:
        model = build_graph(decoder, weights, profile, file)
        (folder / f"decoder.{profile}.onnx").write_bytes(model.SerializeToString(deterministic=True))
    file.write(folder / WEIGHTS)
    for profile in profiles:
        check_model(folder / f"decoder.{profile}.onnx")


def build_graph(decoder: Decoder, weights: dict[str, Any], profile: str, file: WeightFile) -> onnx.ModelProto:
    """The decoder of one profile as a ModelProto whose initializers point into the weight file."""
    forms = PROFILES[profile]
    g = GraphBuilder("decoder", weights, file, forms.domains)
    for spec in INPUTS:
        g.input(spec.name, spec.dtype, spec.shape)
    states = state_specs(decoder.cache)
    for state in states:
        g.input(state.name, state.dtype, state.shape)
    decoder.emit(forms(g))
    for spec in output_specs(decoder.cache):
        g.output(spec.name, spec.dtype, spec.shape)
    for state in states:
        g.output(state.output, state.dtype, [TOTAL if d == "past" else d for d in state.shape])
    return g.model({"portlm.profile": profile, "portlm.family": decoder.family})


def output_specs(cache: CacheShape) -> tuple[TensorSpec, ...]:
    """What a decoder returns beside its cache."""
    return (TensorSpec("logits", "float32", ("batch", "sequence", cache.vocab_size)),)


def state_specs(cache: CacheShape) -> tuple[StateSpec, ...]:
    """The key/value cache, layer by layer, under the names of onnxruntime-genai."""
    shape = ("batch", cache.n_kv_head, "past", cache.head_dim)
    return tuple(
        StateSpec(
            f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}", "float32", shape, "empty", "append"
        )
        for layer in range(cache.n_layer)
        for kind in ("key", "value")
    )


def _describe(decoder: Decoder, parameters: int, profiles: Sequence[str], folder: Path) -> Manifest:
    cache = decoder.cache
    role = RoleSpec(
        profiles={profile: f"onnx/decoder.{profile}.onnx" for profile in profiles},
        weights=f"onnx/{WEIGHTS}",
        inputs=INPUTS,
        outputs=output_specs(cache),
        state=state_specs(cache),
        provenance=Provenance(
            versions={"portlm": __version__, "onnx": onnx.__version__, "numpy": np.__version__},
            settings={"opset": OPSET, "domain_version": DOMAIN_VERSION},
        ),
    )
    model = ModelSpec(decoder.family, parameters, cache.vocab_size, cache.context_length)
    return Manifest(model=model, roles={"decoder": role}, files=hash_files(folder, list_files(folder)))


def _check_target(source: Path, target: Path) -> None:
    if target.resolve() == source.resolve() or target.resolve() in source.resolve().parents:
        raise UsageError(f"{target} holds the checkpoint itself: choose another output folder")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target} exists and is not a folder: choose another output folder")
    if target.is_dir() and any(target.iterdir()):
        try:
            read_manifest(target)
        except FormatError as error:
            raise UsageError(
                f"{target} is not empty and not an artifact: choose another output folder, or empty this one"
            ) from error
