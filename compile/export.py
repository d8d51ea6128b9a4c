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
from functools import partial
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
from portlm.compile.export_checks import (
    carried,
    check_cache,
    check_profiles,
    check_target,
    check_unquantized,
    stored_bytes,
)
from portlm.compile.forms import OPSET
from portlm.compile.halves import (
    AUTO,
    FLOAT32,
    KINDS,
    Keep,
    check_weights,
    is_rounded,
    of_checkpoint,
    of_rounded,
    round_checkpoint,
    rounding,
)
from portlm.compile.isolated import graph_of, weights_of
from portlm.compile.kept import kept_group, kept_numbers
from portlm.compile.mapped import MappedFile
from portlm.compile.quantize import Prepare, Quantizer, RoundToNearest, Scheme, scheme_of
from portlm.compile.role_graphs import (
    Graphs,
    capture,
    context_length_of,
    family_of,
    graph_file,
    roles_to_export,
    weight_file,
    write_graphs,
)
from portlm.compile.tables import table_limits, with_limits
from portlm.errors import FormatError, StorageError, UsageError
from portlm.files import check_is_folder, check_space, free_bytes, read_json
from portlm.folders import FILE_OPS, new_folder
from portlm.hub_files import (
    TOKENIZER,
    TOKENIZER_CONFIG,
    TOKENIZER_EXTRAS,
    cards,
    check_folder,
    usable_tokenizer,
)
from portlm.models import (
    CONFIG,
    FAMILIES,
    HALVES,
    WEIGHTS,
    check_tensors,
    check_values,
    expected_shapes,
    load_config,
    stored_parameter,
    whole_tables,
)
from portlm.ops.spec import DOMAIN_VERSION
from portlm.pictures import PREPROCESSORS
from portlm.quantization import KeyValueCache, Quantization
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
    *PREPROCESSORS,
)


def export(
    checkpoint: str | Path,
    out: str | Path,
    profiles: Sequence[str] = ("portable", "fused"),
    *,
    weights: str = AUTO,
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
        weights: of matrices and token tables in the graphs: "auto" as the checkpoint has them, or its graphs if it is
            an artifact; "float32" widened, which changes no number; "bfloat16" or "float16" rounded to it, see
            compile/halves.py.
        quantize: "int8" or "int4" for matrices and the token table in so many bits, see compile/quantize.py. The
            artifact then holds no model.safetensors.
        group: how many weights share a scale: 32, 64 or 128, which must divide the inputs of every matrix. A checkpoint
            that kept the scales of its numbers (portlm.kept_scales) is cut as they are, into the same numbers.
        asymmetric: each group has a zero point, too.
        calibrate: a text file that is like what the model will read: weights are then rounded so that what they give on
            its first nine tenths changes least, see compile/calibrate.py.
        cache: "int8" to keep keys and values in 8 bits, see compile/quantized_cache.py, or "float32"; None as the
            checkpoint has them if it is an artifact, and float32 otherwise.

    Returns:
        The artifact folder. A tokenizer that the model cannot be used with is left out, with a warning.

    Raises:
        FormatError: the checkpoint is damaged or not of a known family, or a weight is too large for float16.
        UsageError: `out` holds something that is not an artifact, a profile is unknown, the group does not divide, the
            weights are quantized already or cannot be both rounded and quantized, or the text is too short.
        StorageError: the disk is full or refuses. What was there before is untouched.
    """
    source, target = Path(checkpoint), Path(out)
    check_profiles(profiles)
    check_weights(weights, quantize)
    check_cache(cache)
    group = kept_group(source, quantize, group, asymmetric or calibrate is not None)
    scheme = scheme_of(quantize, group, asymmetric)
    check_target(source, target)
    check_is_folder(source)
    if not (source / CONFIG).exists() and (hint := instead(source)):
        raise FormatError(f"{source / CONFIG} does not exist: {hint}")
    check_folder(source)
    check_unquantized(source)
    copied = [name for name in COPIED if (source / name).is_file()] + cards(source)
    check_source(source, copied)
    weights, cache = carried(source, weights, cache)
    read_json(source / CONFIG)  # what is no checkpoint is refused before anything is written
    generation_config.read(source)  # and what no session would load
    header = read_header(source / WEIGHTS)
    rounds = weights in KINDS and not is_rounded(source / WEIGHTS, weights)
    tokenizer = Tokenizer.load(source) if calibrate is not None and (source / TOKENIZER).is_file() else None
    prepare = _preparation(scheme, calibrate, tokenizer, load_config(source).vocab_size, cache)
    if calibrate is None:
        prepare = kept_numbers(source, scheme) or prepare
    if scheme is not None:
        copied.remove(WEIGHTS)
    size = sum((source / name).stat().st_size for name in copied)
    size += sum(
        stored_bytes(
            info.shape, scheme, 16 if rounds or (info.dtype in HALVES and weights != FLOAT32) else 32
        )
        for info in header.values()
    )

    notes: list[str] = []

    def bring(workshop: Path) -> None:
        without: tuple[str, ...] = ()
        if TOKENIZER in copied and not usable_tokenizer(source, load_config(source).vocab_size, notes):
            without = (TOKENIZER, TOKENIZER_CONFIG, *TOKENIZER_EXTRAS)
        for name in copied:
            if name not in without:
                if rounds and name == WEIGHTS:
                    round_checkpoint(source / name, workshop / name, weights)
                else:
                    shutil.copyfile(source / name, workshop / name)

    def load(workshop: Path) -> "tuple[nn.Module, MappedFile | None]":
        return open_mapped(workshop if rounds else source, widened=keep is None)

    keep = of_checkpoint if scheme is None and weights != FLOAT32 else None
    made = _make(load, target, profiles, size, bring, prepare, keep, cache, beside=not rounds)
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
    weights: str = AUTO,
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
        weights: as for `export`; "auto" is "float32".
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
    check_weights(weights, quantize)
    check_cache(cache)
    cache = None if cache == FLOAT32 else cache
    scheme = scheme_of(quantize, group, asymmetric)
    check_target(None, target)
    with rounding(module, weights):
        if not roles_of(module):
            from portlm.compile.canonical_decoder import decoder_of

            decoder = decoder_of(module, example=example)
            decoder.warn(type(module).__name__)
            module = decoder
        if tokenizer is not None and tokenizer.vocab_size > (
            ids := _vocab_size(module, roles_to_export(module))
        ):
            raise UsageError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, but the model {ids}: give the tokenizer that it was "
                f"trained with, or tokenizer.within({ids}) if only control tokens are too many"
            )
        vocab_size = _vocab_size(module, roles_to_export(module))
        prepare = _preparation(scheme, calibrate, tokenizer, vocab_size, cache)
        size = sum(stored_bytes(p.shape, scheme) for p in module.parameters())
        if scheme is None:
            size += sum(p.numel() * p.element_size() for p in module.parameters())
        config = getattr(module, "config", None)

        def bring(workshop: Path) -> None:
            if config is not None and hasattr(config, "to_hf"):
                from portlm.models import save_config, save_model

                if scheme is None:
                    save_model(workshop, module, tokenizer)  # type: ignore[arg-type]
                    if weights in KINDS:
                        round_checkpoint(workshop / WEIGHTS, workshop / WEIGHTS, weights)
                else:  # the weights are those of the graphs
                    save_config(workshop, config, tokenizer)
            elif tokenizer is not None:
                tokenizer.save(workshop)

        keep = partial(of_rounded, weights) if weights in KINDS else None
        return _make(lambda workshop: (module, None), target, profiles, size, bring, prepare, keep, cache)


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
        raise UsageError(
            "calibrate says by which text to quantize: say int8 or int4 as well, or a cache of int8, whose cost is "
            "then measured"
        )
    text = read(calibrate, tokenizer, vocab_size)
    if scheme is None:
        return None  # nothing is chosen, and what the cache costs is measured later
    return lambda module: calibrated(module, roles_to_export(module), text, context_length_of(module), scheme)


def open_mapped(folder: str | Path, widened: bool = True) -> "tuple[nn.Module, MappedFile]":
    """Return the model of a checkpoint folder, its parameters views of the mapped file.

    Half precision is widened, which needs memory. Everything is compared with config.json before.

    Args:
        folder: of the checkpoint.
        widened: False leaves matrices of half precision without values, for who takes those from the file.

    Returns:
        The model and the file.

    Raises:
        FormatError: a file is missing or damaged, or a tensor is missing, unexpected, of another shape or dtype.
    """
    import torch

    folder = Path(folder)
    config, path = load_config(folder), folder / WEIGHTS
    check_tensors(path, read_header(path), expected_shapes(config))
    mapped = MappedFile(path)
    # The parameters' first memory is never touched, and so costs none.
    model: Any = FAMILIES[config.family].model_class()(config, init=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch would warn that the file cannot be written to: nobody does
        for name, parameter in model.named_parameters():
            array = stored_parameter(model, name, mapped.arrays)
            if not widened and array.itemsize == 2 and array.ndim == 2:
                continue
            parameter.data = torch.from_numpy(array.astype(np.float32, copy=False))
        for name, table in whole_tables(model):
            table.data = torch.from_numpy(mapped.arrays[model.hf_name(name)[0]])
    check_values(path, model)
    return model.eval(), mapped


def _make(
    load: "Callable[[Path], tuple[nn.Module, MappedFile | None]]",
    target: Path,
    profiles: Sequence[str],
    size: int,
    bring: Callable[[Path], None],
    prepare: Prepare | None,
    keep: Keep | None,
    cache: str | None,
    *,
    beside: bool = False,
) -> Path:
    """Capture a module's roles and put the artifact in its place.

    Args:
        load: returns the model, and the file that its weights are in, if there is one; it is given the folder that
            `bring` has filled, unless that works beside it.
        target: the artifact folder.
        profiles: which graphs to write.
        size: bytes of what is written, graphs aside.
        bring: writes the files beside the graphs into a folder.
        prepare: makes the quantizer of the weights; None leaves them as they are.
        keep: finds weights of 16 bits; None leaves all float32 that are not quantized.
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
                module, weights = load(workshop)
            quantizer = None if prepare is None else prepare(module)
            with _no_collections():
                roles, context = roles_to_export(module), context_length_of(module)
                halves = None if keep is None else partial(keep, module, weights)
                graphs = capture(module, roles, profiles, context, quantizer, halves, cache)
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
            dtypes={
                name: str(span.array.dtype)
                for name, span in file.spans.items()
                if span.array.dtype != np.float32
            },
            provenance=Provenance(versions, settings, traced_shapes(role)),
        )
    parameters = sum(p.numel() for p in module.parameters())
    model = ModelSpec(family_of(module), parameters, _vocab_size(module, roles), context)
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
