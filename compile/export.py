"""From a checkpoint folder, or a module in memory, to an artifact folder: graphs, their weights and the manifest.

The graphs are captured from the model's own code (compile/trace.py, compile/capture.py), so there is no second
description of a model to fall behind. Equal bytes come from equal checkpoints.
"""

import gc
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from portlm import __version__, generation_config
from portlm.artifact import (
    FileEntry,
    Manifest,
    ModelSpec,
    Provenance,
    RoleSpec,
    check_source,
    hash_files,
    instead,
    list_files,
    write_manifest,
)
from portlm.compile.calibrate import calibrated, read
from portlm.compile.check import check_model
from portlm.compile.export_checks import (
    check_cache,
    check_profiles,
    check_target,
    check_unquantized,
    stored_bytes,
)
from portlm.compile.forms import OPSET
from portlm.compile.graph import WeightFile
from portlm.compile.isolated import graph_of, weights_of
from portlm.compile.mapped import MappedFile
from portlm.compile.quantize import Prepare, Quantizer, RoundToNearest, Scheme, scheme_of
from portlm.compile.tables import table_limits, with_limits
from portlm.errors import FormatError, StorageError, UsageError
from portlm.files import check_space, free_bytes, read_json
from portlm.folders import FILE_OPS, new_folder
from portlm.hub_files import (
    TOKENIZER,
    TOKENIZER_CONFIG,
    TOKENIZER_EXTRAS,
    cards,
    check_folder,
    usable_tokenizer,
)
from portlm.models import CONFIG, FAMILIES, WEIGHTS, check_tensors, expected_shapes, load_config
from portlm.ops.spec import DOMAIN_VERSION, FAR
from portlm.quantization import KeyValueCache, Quantization
from portlm.roles import file_stem
from portlm.seen_graphs import record_written
from portlm.tokenizer import Tokenizer
from portlm.weights import read_header

if TYPE_CHECKING:
    from torch import nn

    from portlm.models.roles import Role

COPIED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def export(
    checkpoint: str | Path,
    out: str | Path,
    profiles: Sequence[str] = ("portable", "fused"),
    *,
    quantize: str | None = None,
    group: int | None = None,
    asymmetric: bool = False,
    calibrate: str | Path | None = None,
    cache: str | None = None,
) -> Path:
    """Export a checkpoint to an artifact folder, which appears complete or not at all.

    Args:
        checkpoint: folder with config.json and model.safetensors.
        out: the artifact folder. An artifact that is already there is replaced, anything else is refused.
        profiles: which graphs to write.
        quantize: "int8" or "int4" for matrices and the token table in so many bits, see compile/quantize.py. The
            artifact then holds no model.safetensors.
        group: how many weights share a scale: 32, 64 or 128, which must divide the inputs of every matrix.
        asymmetric: each group has a zero point, too.
        calibrate: a text file that is like what the model will read: weights are then rounded so that what they give on
            its first nine tenths changes least, see compile/calibrate.py.
        cache: "int8" to keep keys and values in 8 bits, see compile/quantized_cache.py; None keeps float32.

    Returns:
        The artifact folder. A tokenizer that the model cannot be used with is left out, with a warning.

    Raises:
        FormatError: the checkpoint is damaged or not of a known family.
        UsageError: `out` holds something that is not an artifact, a profile is unknown, the group does not divide, the
            weights are quantized already, or the text is too short.
        StorageError: the disk is full or refuses. What was there before is untouched.
    """
    source, target = Path(checkpoint), Path(out)
    check_profiles(profiles)
    check_cache(cache)
    scheme = scheme_of(quantize, group, asymmetric)
    check_target(source, target)
    if not (source / CONFIG).exists() and (hint := instead(source)):
        raise FormatError(f"{source / CONFIG} does not exist: {hint}")
    check_folder(source)
    check_unquantized(source)
    copied = [name for name in COPIED if (source / name).is_file()] + cards(source)
    check_source(source, copied)
    read_json(source / CONFIG)  # what is no checkpoint is refused before anything is written
    generation_config.read(source)  # and what no session would load
    weights = read_header(source / WEIGHTS)
    tokenizer = Tokenizer.load(source) if calibrate is not None and (source / TOKENIZER).is_file() else None
    prepare = _preparation(scheme, calibrate, tokenizer, load_config(source).vocab_size, cache)
    if scheme is not None:
        copied.remove(WEIGHTS)
    size = sum((source / name).stat().st_size for name in copied)
    size += sum(stored_bytes(info.shape, scheme) for info in weights.values())

    notes: list[str] = []

    def bring(workshop: Path) -> None:
        without: tuple[str, ...] = ()
        if TOKENIZER in copied and not usable_tokenizer(source, load_config(source).vocab_size, notes):
            without = (TOKENIZER, TOKENIZER_CONFIG, *TOKENIZER_EXTRAS)
        for name in copied:
            if name not in without:
                shutil.copyfile(source / name, workshop / name)

    made = _make(lambda: open_mapped(source), target, profiles, size, bring, prepare, cache, beside=True)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return made


def export_module(
    module: "nn.Module",
    folder: str | Path,
    *,
    tokenizer: Any = None,
    example: Any = None,
    profiles: Sequence[str] = ("portable", "fused"),
    quantize: str | None = None,
    group: int | None = None,
    asymmetric: bool = False,
    calibrate: str | Path | None = None,
    cache: str | None = None,
) -> Path:
    """Export a model that is in memory to an artifact folder, which appears complete or not at all.

    Args:
        module: declares its roles in `roles()`, see portlm.models.roles, or maps input_ids (B, T) int64 to logits
            (B, T, V) in plain PyTorch, see compile/canonical.py. It is put back as it was.
        folder: the artifact folder. An artifact that is already there is replaced, anything else is refused.
        tokenizer: has `save(folder)`; None leaves the artifact without one.
        example: input_ids (B, T) int64, for a module without roles.
        profiles: which graphs to write.
        quantize: as for `export`.
        group: as for `export`.
        asymmetric: as for `export`.
        calibrate: as for `export`; the tokenizer reads it.
        cache: as for `export`.

    Returns:
        The artifact folder.

    Raises:
        FormatError: the module computes what a graph cannot say. The message names the operator, the module and the
            line.
        UsageError: `folder` holds something that is not an artifact, a profile is unknown, or a module without roles
            cannot be exported; the message names the operator, the module and the line.
        StorageError: the disk is full or refuses. What was there before is untouched.
    """
    from portlm.models.roles import roles_of

    target = Path(folder)
    check_profiles(profiles)
    check_cache(cache)
    scheme = scheme_of(quantize, group, asymmetric)
    check_target(None, target)
    if not roles_of(module):
        from portlm.compile.canonical_decoder import decoder_of

        decoder = decoder_of(module, example=example)
        decoder.warn(type(module).__name__)
        module = decoder
    if tokenizer is not None and tokenizer.vocab_size > (ids := _vocab_size(module, roles_to_export(module))):
        raise UsageError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model {ids}: give the tokenizer that it was "
            f"trained with, or tokenizer.within({ids}) if only control tokens are too many"
        )
    prepare = _preparation(scheme, calibrate, tokenizer, _vocab_size(module, roles_to_export(module)), cache)
    size = sum(stored_bytes(p.shape, scheme) for p in module.parameters())
    if scheme is None:
        size += sum(p.numel() * p.element_size() for p in module.parameters())
    config = getattr(module, "config", None)

    def bring(workshop: Path) -> None:
        if config is not None and hasattr(config, "to_hf"):
            from portlm.models import save_config, save_model

            if scheme is None:
                save_model(workshop, module, tokenizer)  # type: ignore[arg-type]
            else:  # the weights are those of the graphs
                save_config(workshop, config, tokenizer)
        elif tokenizer is not None:
            tokenizer.save(workshop)

    return _make(lambda: (module, None), target, profiles, size, bring, prepare, cache)


def _preparation(
    scheme: Scheme | None, calibrate: str | Path | None, tokenizer: Any, vocab_size: int, cache: str | None
) -> Prepare | None:
    """Return what makes the quantizer of a module: None without a scheme.

    Raises:
        UsageError: there is a text and no scheme, or nothing that could read it, or it is too short.
        FormatError: the text is missing or damaged.
    """
    if calibrate is None:
        return None if scheme is None else RoundToNearest.prepare(scheme)
    if scheme is None and cache is None:
        raise UsageError("calibrate says by which text to quantize: say int8 or int4 as well")
    text = read(calibrate, tokenizer, vocab_size)
    if scheme is None:
        return None  # nothing is chosen, and what the cache costs is measured later
    return lambda module: calibrated(module, roles_to_export(module), text, _context_length(module), scheme)


def open_mapped(folder: str | Path) -> "tuple[nn.Module, MappedFile]":
    """Return the model of a checkpoint folder, its parameters views of the mapped file.

    Half precision is widened, which needs memory. Everything is compared with config.json before.

    Returns:
        The model and the file.

    Raises:
        FormatError: a file is missing or damaged, or a tensor is missing, unexpected, of another shape or dtype.
    """
    import torch

    folder = Path(folder)
    config, path = load_config(folder), folder / WEIGHTS
    check_tensors(path, read_header(path), expected_shapes(config), dtypes=("F32", "F16"))
    mapped = MappedFile(path)
    # The parameters' first memory is never touched, and so costs none.
    model: Any = FAMILIES[config.family].model_class()(config, init=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch would warn that the file cannot be written to: nobody does
        for name, parameter in model.named_parameters():
            hf_name, transposed = model.hf_name(name)
            tensor = torch.from_numpy(mapped.arrays[hf_name].astype(np.float32, copy=False))
            parameter.data = tensor.t() if transposed else tensor
    return model.eval(), mapped


def _make(
    load: "Callable[[], tuple[nn.Module, MappedFile | None]]",
    target: Path,
    profiles: Sequence[str],
    size: int,
    bring: Callable[[Path], None],
    prepare: Prepare | None,
    cache: str | None,
    *,
    beside: bool = False,
) -> Path:
    """Capture a module's roles and put the artifact in its place.

    Args:
        load: returns the model, and the file that its weights are in, if there is one.
        target: the artifact folder.
        profiles: which graphs to write.
        size: bytes of what is written, graphs aside.
        bring: writes the files beside the graphs into a folder.
        prepare: makes the quantizer of the weights; None leaves them float32.
        cache: what keys and values are kept in; None keeps float32.
        beside: `bring` copies files and does not look at the module: the disk and the hash then work while PyTorch is
            loaded and the module captured, for neither needs Python's lock.
    """
    size += size // 10
    check_space(target.parent, size)
    try:
        with new_folder(target) as workshop, ThreadPoolExecutor(1) as aside:
            brought = aside.submit(_bring_and_hash, bring, workshop)
            if not beside:  # while a module is captured, its parameters have no values
                brought.result()
            with _no_collections():
                module, weights = load()
            quantizer = None if prepare is None else prepare(module)
            with _no_collections():
                roles, context = roles_to_export(module), _context_length(module)
                graphs = capture(module, roles, profiles, context, quantizer, cache)
            written = write_graphs(graphs, workshop / "onnx", weights)
            files = brought.result() | {f"onnx/{name}": entry for name, entry in written.items()}
            manifest = _describe(
                module, roles, graphs, dict(sorted(files.items())), context, quantizer, cache
            )
            write_manifest(workshop, manifest)
    except OSError as error:
        room = f"{size} bytes are needed and {free_bytes(target.parent)} are free"
        raise StorageError(f"{target} cannot be written: {error.strerror or error}; {room}") from error
    for graph in weights_of(manifest):
        record_written(graph_of(manifest, graph))
    return target


@contextmanager
def _no_collections() -> Iterator[None]:
    """Pause the search for cycles: loading PyTorch makes a million objects that stay, and is an eighth faster."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _bring_and_hash(bring: Callable[[Path], None], folder: Path) -> dict[str, FileEntry]:
    bring(folder)
    names = list_files(folder)
    for name in names:  # the disk writes while the hash is computed
        FILE_OPS.seal_file(folder / name, hashed=False)
    return hash_files(folder, names)


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
    cache: str | None = None,
) -> Graphs:
    """Return the graphs of a module.

    Args:
        module: the model.
        roles: its functions by name.
        profiles: names from forms.PROFILES.
        context_length: positions are below it.
        quantizer: chooses the numbers of matrices and token tables; None leaves them float32.
        cache: what keys and values are kept in; None keeps float32.

    Raises:
        FormatError: the model computes what a graph cannot say, or a weight is not finite.
        UsageError: the quantizer's group does not divide the inputs of a matrix, or there is nothing to keep in 8 bits.
    """
    from portlm.compile.capture import build_graph
    from portlm.compile.module_weights import Weights
    from portlm.compile.quantized_cache import check_recordings
    from portlm.compile.quantized_graph import quantize_weights
    from portlm.compile.trace import record

    recordings = {name: record(module, name, role) for name, role in roles.items()}
    if cache is not None:
        check_recordings(roles, recordings)
    weights = Weights(module, recordings.values())
    quantized = None if quantizer is None else quantize_weights(roles, recordings, weights, quantizer)
    graphs: Graphs = {}
    for name, role in roles.items():
        file = WeightFile(weight_file(name))
        options = {"name": name, "family": _family(module)}
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
                    quantized=quantized,
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


def _family(module: "nn.Module") -> str:
    return str(getattr(getattr(module, "config", None), "family", "module"))


def _context_length(module: "nn.Module") -> int:
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


def _describe(
    module: "nn.Module",
    roles: "Mapping[str, Role]",
    graphs: Graphs,
    files: dict[str, FileEntry],
    context: int,
    quantizer: Quantizer | None,
    cache: str | None,
) -> Manifest:
    import torch

    from portlm.compile.quantized_cache import kept_states
    from portlm.compile.trace import traced_shapes

    versions = {
        "portlm": __version__,
        "torch": str(torch.__version__),
        "onnx": onnx.__version__,
        "numpy": np.__version__,
    }
    settings: dict[str, str | bool | int | float] = {"opset": OPSET, "domain_version": DOMAIN_VERSION}
    described = {}
    for name, role in roles.items():
        file, models = graphs[name]
        limits = [table_limits(model.graph) for model in models.values()]
        state = tuple(kept for item in role.state for kept in (kept_states(item) if cache else (item,)))
        described[name] = RoleSpec(
            profiles={profile: f"onnx/{graph_file(name, profile)}" for profile in models},
            weights=f"onnx/{weight_file(name)}",
            inputs=with_limits(role.inputs, limits),
            outputs=role.outputs,
            state=with_limits(state, limits),
            dtypes={name: "uint8" for name, span in file.spans.items() if span.array.dtype == np.uint8},
            provenance=Provenance(versions, settings, traced_shapes(role)),
        )
    parameters = sum(p.numel() for p in module.parameters())
    model = ModelSpec(_family(module), parameters, _vocab_size(module, roles), context)
    quantization = None
    if quantizer is not None:
        scheme = quantizer.scheme
        quantization = Quantization(scheme.bits, scheme.group, scheme.symmetric, quantizer.method)
    kept = None if cache is None else KeyValueCache(cache)
    return Manifest(model=model, roles=described, files=files, quantization=quantization, cache=kept)


def _vocab_size(module: "nn.Module", roles: "Mapping[str, Role]") -> int:
    """How many ids the model takes, from its configuration, or from the logits of its decoder."""
    value = getattr(getattr(module, "config", None), "vocab_size", None)
    if value is None and "decoder" in roles:
        value = roles["decoder"].outputs[0].shape[-1]
    if not isinstance(value, int):
        raise FormatError(
            f"{type(module).__name__} does not say how many ids it takes: give it a config.vocab_size"
        )
    return value
