"""Model families, one file each, and the checkpoint folder they share.

A checkpoint folder holds config.json, generation_config.json and model.safetensors exactly as Hugging Face's
transformers would write them, so it opens there as it is if there are such models. Names, orientations and keys are
translated by the family's own file; this one reads, checks and writes. The table of families is families.py.

Nothing here imports PyTorch until a model is asked for.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from portlm.errors import ConfigError, FormatError, StorageError, UsageError
from portlm.files import read_json, shown, write_atomic
from portlm.models.config_json import Reader
from portlm.models.families import DECODERS as DECODERS
from portlm.models.families import FAMILIES as FAMILIES
from portlm.models.families import Config as Config
from portlm.models.families import Family as Family
from portlm.models.families import Model as Model
from portlm.weights import TensorInfo, load_numpy, read_header, save_tensors

if TYPE_CHECKING:
    import torch

CONFIG, GENERATION_CONFIG, WEIGHTS = "config.json", "generation_config.json", "model.safetensors"
HALVES = ("F16", "BF16")  # number formats of 16 bits, in safetensors' spelling
FLOATS = ("F32", *HALVES)  # of a checkpoint
WHOLE = ("I32",)  # of its tables of whole numbers
IMPORTED = (*FLOATS, "F64")  # of what `portlm import` takes
_MAX_CONFIG_BYTES = 1 << 20


class SavesTokenizer(Protocol):
    """What :func:`save_model` needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """The number of ids it can produce."""

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, if there is one."""

    def save(self, folder: Path) -> Any:
        """Write tokenizer.json and what belongs to it."""


def preset(name: str) -> Config:
    """Return the configuration of a published model such as ``gpt2-medium`` or ``llama3-8b``.

    Raises:
        ConfigError: There is no such preset. The message lists them.
    """
    presets = {name: config for family in FAMILIES.values() for name, config in family.presets().items()}
    if name not in presets:
        raise ConfigError(f"there is no preset {shown(name)}: choose one of {', '.join(presets)}")
    return presets[name]


def config_from_hf(data: Mapping[str, Any] | Reader) -> Config:
    """Read the contents of a Hugging Face config.json, strictly.

    Raises:
        ConfigError: Another family, or a key that is missing, unknown, out of range or asks for another
            model.
    """
    read = Reader.of(data)
    family = read.raw("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ConfigError(f"model_type must be one of {', '.join(FAMILIES)}, got {shown(family)}")
    kind = FAMILIES[family].config_class()
    if FAMILIES[family].kind == "decoder":
        from portlm.models.heads import headed, heads_of

        kind = headed(kind) if heads_of(read) else kind
    return kind.from_hf(read)


def build(config: Config | Mapping[str, Any], device: "str | torch.device" = "cpu") -> Model:
    """Return a freshly initialised model.

    Args:
        config: A configuration, or the contents of a config.json.
        device: Where its parameters live; ``meta`` allocates nothing.
    """
    import torch

    if isinstance(config, Mapping):
        config = config_from_hf(config)
    with torch.device(device):
        model: Model = FAMILIES[config.family].model_class()(config)
    return model


def at_context(data: Mapping[str, Any], context: int) -> Mapping[str, Any]:
    """Return the contents of a config.json of which so many positions are used, for a family that has a choice.

    Raises:
        UsageError: What the family computes does not depend on it.
        ConfigError: There are not so many positions.
    """
    family = data.get("model_type")
    known = FAMILIES.get(family) if isinstance(family, str) else None
    kind: Any = None if known is None else known.config_class()
    if not hasattr(kind, "at_context"):
        raise UsageError(
            f"a context is chosen where rotary positions depend on it (longrope), and not of {shown(family)}: leave "
            "--context out"
        )
    changed: Mapping[str, Any] = kind.at_context(data, context)
    return changed


def load_config(
    folder: str | os.PathLike[str], notes: list[str] | None = None, context: int | None = None
) -> Config:
    """Read config.json of a checkpoint folder.

    Args:
        folder: Where it lies.
        notes: Takes a sentence for each value that the configuration does not keep.
        context: How many of its positions are used, where that decides what is computed.

    Raises:
        UsageError: A context is chosen where it decides nothing.
        FormatError: It is missing, no JSON, or not a model portlm computes.
    """
    path = Path(folder) / CONFIG
    data = read_json(path, max_bytes=_MAX_CONFIG_BYTES)
    if not isinstance(data, dict):
        raise FormatError(f"{path} must hold a JSON object")
    try:
        read = Reader(data if context is None else at_context(data, context))
        config = config_from_hf(read)
    except ConfigError as error:
        raise FormatError(f"{path}: {error}") from error
    if notes is not None:
        notes += read.notes
    return config


def load_model(folder: str | os.PathLike[str], device: "str | torch.device" = "cpu") -> Model:
    """Read a checkpoint folder. Weights of 16 bits are widened, which is exact.

    Everything is compared with config.json before memory is allocated.

    Returns:
        The model in float32 on ``device``, in evaluation mode.

    Raises:
        FormatError: A file is missing or damaged, or a tensor is missing, unexpected, of another shape, no float
            of 16 or 32 bits, or no table that the family can use. The message names it.
    """
    import torch

    config, path = load_config(folder), Path(folder) / WEIGHTS
    check_tensors(path, read_header(path), expected_shapes(config))
    model: Model = FAMILIES[config.family].model_class()(config, init=False)
    mapped = load_numpy(path)  # so that memory never holds the model twice
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(np.array(stored_parameter(model, name, mapped))))
        for name, table in whole_tables(model):
            table.copy_(torch.from_numpy(np.array(mapped[model.hf_name(name)[0]])))
    check_values(path, model)
    return model.to(device).eval()


def whole_tables(model: Model) -> "Iterator[tuple[str, torch.Tensor]]":
    """Yield every table of whole numbers that belongs to a model: its persistent buffers of int32, with their names.

    They are not trained and never rounded. A checkpoint holds them as they are.
    """
    saved = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in saved and not buffer.is_floating_point():
            yield name, buffer


def check_values(path: Path, model: Model) -> None:
    """Ask a family whose tensors must fit each other whether those of a file do.

    Args:
        path: Named in the error.
        model: Filled. Its method ``problem()``, if it has one, says what is wrong with its values, or "".

    Raises:
        FormatError: They do not.
    """
    problem = getattr(model, "problem", None)
    if problem is not None and (found := problem()):
        raise FormatError(f"{path}: {found}")


def save_model(folder: str | os.PathLike[str], model: Model, tokenizer: SavesTokenizer | None = None) -> None:
    """Write a checkpoint folder. transformers opens it if it has such models. Each file is replaced atomically.

    Args:
        folder: Created if it does not exist.
        model: Its weights are written in float32.
        tokenizer: Written beside it. Its end of text is recorded where the configuration names none.

    Raises:
        ConfigError: The tokenizer has more tokens than the model.
        StorageError: The disk is full or refuses the write.
    """
    folder, config = Path(folder), _with_end(model.config, tokenizer)
    make_folder(folder)
    save_tensors(folder / WEIGHTS, hf_tensors(model), metadata={"format": "pt"})
    _save_texts(folder, config, tokenizer)


def save_config(folder: Path, config: Config, tokenizer: SavesTokenizer | None = None) -> None:
    """Write a checkpoint folder without its weights; arguments and errors as for `save_model`."""
    _save_texts(folder, _with_end(config, tokenizer), tokenizer)


def _with_end(config: Config, tokenizer: SavesTokenizer | None) -> Config:
    """The configuration, with the tokenizer's end of text where it names none."""
    if tokenizer is None:
        return config
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model's vocabulary holds "
            f"{config.vocab_size}: they do not belong together"
        )
    if not config.eos_token_ids and tokenizer.eos_id is not None:
        return replace(config, eos_token_ids=(tokenizer.eos_id,))
    return config


def _save_texts(folder: Path, config: Config, tokenizer: SavesTokenizer | None) -> None:
    write_config(folder, config)
    if tokenizer is not None:
        tokenizer.save(folder)


def write_config(folder: Path, config: Config) -> None:
    """Write config.json and generation_config.json."""
    data = config.to_hf()
    write_json(folder / CONFIG, data)
    keys = ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id")
    ids = {key: data[key] for key in keys if data.get(key) is not None}
    write_json(folder / GENERATION_CONFIG, {"_from_model_config": True, **ids})


def write_json(path: Path, data: Any) -> None:
    """Write JSON the way Hugging Face does: two spaces, sorted keys, a final newline."""
    write_atomic(path, json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def hf_tensors(model: Model) -> "dict[str, torch.Tensor]":
    """Return every parameter in float32 and every table of whole numbers on the CPU, as the files have them."""
    import torch

    tensors = {}
    for name, parameter in model.named_parameters():
        names, axis, transposed = _places(model, name)
        whole = parameter.detach().to("cpu", torch.float32)
        for hf_name, tensor in zip(names, whole.chunk(len(names), axis), strict=True):
            tensors[hf_name] = tensor.t() if transposed else tensor
    for name, table in whole_tables(model):
        tensors[model.hf_name(name)[0]] = table.to("cpu", torch.int32)
    return tensors


def stored_parameter(model: Any, name: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return a parameter in its own orientation: a view of the one tensor that it is in the files, or several joined.

    Args:
        model: whose it is.
        name: of it there.
        arrays: the tensors of the files.
    """
    names, axis, transposed = _places(model, name)
    parts = [arrays[hf_name].T if transposed else arrays[hf_name] for hf_name in names]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)


def _places(model: Any, name: str) -> tuple[tuple[str, ...], int, bool]:
    """The tensors that a parameter is in files, the axis along which they lie in it, and whether each is transposed."""
    hf_name, transposed = model.hf_name(name)
    split = model.hf_split(name) if hasattr(model, "hf_split") else None
    return (*(split or ((hf_name,), 0)), transposed)


class Shapes(dict[str, tuple[int, ...]]):
    """The shape of every tensor that model.safetensors must hold, by name.

    Attributes:
        whole: Names of those that hold whole numbers.
    """

    whole: frozenset[str] = frozenset()


def expected_shapes(config: Config) -> Shapes:
    """Return the shape of every tensor that model.safetensors must hold, without allocating any."""
    import torch

    with torch.device("meta"):
        model = FAMILIES[config.family].model_class()(config, init=False)
    shapes = Shapes()
    for name, parameter in model.named_parameters():
        names, axis, transposed = _places(model, name)
        shape = list(parameter.shape)
        if len(names) > 1:
            shape[axis] //= len(names)
        shapes.update(dict.fromkeys(names, tuple(shape[::-1] if transposed else shape)))
    tables = {model.hf_name(name)[0]: tuple(table.shape) for name, table in whole_tables(model)}
    shapes.update(tables)
    shapes.whole = frozenset(tables)
    return shapes


def check_tensors(
    path: Path,
    header: Mapping[str, TensorInfo],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: tuple[str, ...] = FLOATS,
) -> None:
    """Raise FormatError unless a file holds exactly the expected tensors.

    Args:
        path: Named in the error.
        header: What the file holds, by name.
        shapes: What it should hold, by name.
        dtypes: Accepted number formats of floats, in safetensors' spelling. Tables of whole numbers are I32.
    """
    tables = shapes.whole if isinstance(shapes, Shapes) else ()
    missing = [name for name in shapes if name not in header]
    if missing:
        raise FormatError(
            f"{path}: tensor {missing[0]} of shape {shapes[missing[0]]} is missing"
            f"{_and_others(missing)}: {CONFIG} asks for it"
        )
    extra = [name for name in header if name not in shapes]
    if extra:
        raise FormatError(
            f"{path}: tensor {shown(extra[0])} of shape {tuple(header[extra[0]].shape)} is unexpected"
            f"{_and_others(extra)}: {CONFIG} describes a model without it"
        )
    for name, shape in shapes.items():
        info = header[name]
        if tuple(info.shape) != shape:
            raise FormatError(
                f"{path}: tensor {name} has shape {tuple(info.shape)}, but {CONFIG} asks for {shape}"
            )
        allowed = WHOLE if name in tables else dtypes
        if info.dtype not in allowed:
            hint = (
                "portlm import converts it"
                if info.dtype in IMPORTED and name not in tables
                else "its weights are no plain numbers"
                if name not in tables
                else "it is a table of whole numbers"
            )
            raise FormatError(
                f"{path}: tensor {name} is {info.dtype}, but must be {' or '.join(allowed)}: {hint}"
            )


def _and_others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def make_folder(folder: Path) -> None:
    """Create a folder and its parents.

    Raises:
        StorageError: The file system refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder} cannot be created: {error.strerror}") from error
