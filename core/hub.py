"""Checkpoints from and to Hugging Face's folders.

A portlm checkpoint uses the same names, keys and orientations, so importing is mostly checking: one file of
weights instead of several, none of them wider than float32, nothing that is no parameter, and a config.json in which
every key was understood. Pickles (pytorch_model.bin) are never opened: reading one runs whatever it contains.
"""

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from portlm import generation_config
from portlm.artifact import check_source
from portlm.errors import FormatError, StorageError, UsageError
from portlm.files import (
    atomic_file,
    check_is_folder,
    open_regular,
    parse_json,
    read_bytes,
    read_json,
    shown,
    write_atomic,
)
from portlm.folders import new_folder
from portlm.hub_files import (
    INDEX,
    MAX_TEXT_BYTES,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TOKENIZER_EXTRAS,
    Places,
    cards,
    check_folder,
    check_names,
    stored,
    unwrapped,
    usable_tokenizer,
)
from portlm.models import (
    CONFIG,
    FAMILIES,
    GENERATION_CONFIG,
    IMPORTED,
    WEIGHTS,
    check_tensors,
    expected_shapes,
    load_config,
    write_config,
    write_json,
)
from portlm.pictures import PREPROCESSOR, PREPROCESSORS, Preprocessing
from portlm.weights import read_header, save_tensors

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Transfer:
    """What an import or export produced.

    Attributes:
        folder: The new folder.
        family: Its key in :data:`portlm.models.FAMILIES`.
        parameters: How many, a shared matrix counted once.
        notes: What was changed or left out on the way, a sentence each.
    """

    folder: Path
    family: str
    parameters: int
    notes: tuple[str, ...]


def import_hf(
    src: str | os.PathLike[str], out: str | os.PathLike[str], context: int | None = None
) -> Transfer:
    """Turn a Hugging Face folder into a portlm checkpoint. Weights of 16 bits stay so, to be widened as they are used.

    Args:
        src: A folder with config.json and either model.safetensors or shards with their index, and usually
            tokenizer.json, tokenizer_config.json and generation_config.json.
        out: The folder to create. It appears when everything is in it.
        context: How many of its positions are used, where that decides what is computed (longrope).

    Raises:
        FormatError: A file is missing, damaged, a pickle, or describes a model portlm does not compute.
        UsageError: ``out`` exists and holds something.
        StorageError: The disk is full or refuses the write.
    """
    src, out, notes = Path(src), Path(out), list[str]()
    check_files(src)
    config = _with_stored_heads(src, load_config(src, notes, context), notes)
    shapes = expected_shapes(config)
    tensors = _parameters(src, config, shapes, notes)
    _check_tensors(src, tensors, shapes, notes)
    with new_result(out) as folder:
        save_tensors(folder / WEIGHTS, tensors, metadata={"format": "pt"})
        write_config(folder, config)
        _copy_generation_config(src, folder, notes)
        _copy_tokenizer(src, folder, config.vocab_size, notes)
        _copy_preprocessing(src, folder, config)
        _copy_cards(src, folder, notes)
    return Transfer(out, config.family, count_parameters(shapes), tuple(notes))


def export_hf(checkpoint: str | os.PathLike[str], out: str | os.PathLike[str]) -> Transfer:
    """Write a folder that transformers' AutoModelForCausalLM and AutoTokenizer open without remote code.

    Args:
        checkpoint: A portlm checkpoint or artifact folder.
        out: The folder to create. It appears when everything is in it. The weights are the same bytes.

    Raises:
        FormatError: A file of the checkpoint is missing or damaged, or transformers has no such model.
        UsageError: ``out`` exists and holds something.
        StorageError: The disk is full or refuses the write.
    """
    checkpoint, out, notes = Path(checkpoint), Path(out), list[str]()
    check_files(checkpoint)
    config = load_config(checkpoint, notes)
    if not FAMILIES[config.family].foreign:
        raise FormatError(
            f"{checkpoint}: transformers has no models of the family {config.family} to open it as"
        )
    shapes = expected_shapes(config)
    header = read_header(checkpoint / WEIGHTS)
    check_tensors(checkpoint / WEIGHTS, header, shapes)
    with new_result(out) as folder:
        size = max((info.end for info in header.values()), default=0)
        with open_regular(checkpoint / WEIGHTS) as source, atomic_file(folder / WEIGHTS, need=size) as target:
            shutil.copyfileobj(source, target, 1 << 22)
        write_config(folder, config)
        _copy_generation_config(checkpoint, folder, notes)
        _copy_tokenizer(checkpoint, folder, config.vocab_size, notes)
        _copy_preprocessing(checkpoint, folder, config)
        _copy_cards(checkpoint, folder, notes)
    return Transfer(out, config.family, count_parameters(shapes), tuple(notes))


def check_files(folder: Path) -> None:
    """Look at where the files of a folder lie, and at what is in them if it is an artifact, whose manifest says it."""
    check_is_folder(folder)
    check_folder(folder)
    texts = (GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, *TOKENIZER_EXTRAS, *PREPROCESSORS)
    check_source(folder, (CONFIG, WEIGHTS, *texts, *cards(folder)))


class _Tensors(Mapping[str, "np.ndarray | torch.Tensor"]):
    """Tensors of one or several files, each read when it is asked for, so one at a time; float64 becomes float32."""

    def __init__(self, places: Places):
        self._places = places
        self.infos = {name: info for name, (_, info) in places.items()}

    def __getitem__(self, name: str) -> "np.ndarray | torch.Tensor":
        path, info = self._places[name]
        raw = self.content(name)
        match info.dtype:
            case "F32":
                values = np.frombuffer(raw, "<f4")
            case "F16":
                values = np.frombuffer(raw, "<f2")
            case "F64":
                values = _rounded(np.frombuffer(raw, "<f8"), f"{path}: tensor {shown(name)}")
            case "I32":
                values = np.frombuffer(raw, "<i4")
            case "BF16":  # of which numpy has no type
                import torch

                return torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).view(info.shape)
            case _:
                raise FormatError(f"{path}: tensor {shown(name)} is {info.dtype}, not a float")
        return values.reshape(info.shape)

    def content(self, name: str) -> bytes:
        """Return the bytes of a tensor as they are in its file."""
        path, info = self._places[name]
        with open_regular(path) as file:
            file.seek(info.start)
            raw = file.read(info.nbytes)
        if len(raw) != info.nbytes:
            raise FormatError(f"{path} was truncated while it was read: import it again")
        return raw

    def same(self, one: str, other: str) -> bool:
        """Say whether two tensors are equal to the last bit."""
        a, b = self.infos[one], self.infos[other]
        return (a.dtype, a.shape) == (b.dtype, b.shape) and self.content(one) == self.content(other)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def without(self, name: str) -> "_Tensors":
        """Return the same tensors but one."""
        return _Tensors({other: place for other, place in self._places.items() if other != name})


def _rounded(values: np.ndarray, where: str) -> np.ndarray:
    """Return float64 values in float32."""
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float32)
    if np.isinf(rounded).sum() > np.isinf(values).sum():
        raise FormatError(f"{where} holds a number that is too large for float32, in which portlm computes")
    return rounded


def _with_stored_heads(src: Path, config: Any, notes: list[str]) -> Any:
    """The configuration, with heads that config.json does not name and the weights hold, where a family has such."""
    model = FAMILIES[config.family].model_class()
    if not hasattr(model, "hf_stored"):
        return config
    names = {model.hf_alias(unwrapped(name)) for name in stored(src)}
    found = model.hf_stored(config, names)
    if found != config:
        added = ", ".join(head for head in found.heads if head not in config.heads)
        notes.append(
            f"{CONFIG} names {config.architecture}, and the weights hold {added} as well, which was kept"
        )
    return found


def _parameters(src: Path, config: Any, shapes: Mapping[str, Any], notes: list[str]) -> _Tensors:
    """Find the parameters in a folder's weight files, under the names a checkpoint uses."""
    model, where = FAMILIES[config.family].model_class(), _weights_of(src)
    originals = _apart(model, config, stored(src))
    tied: dict[str, str] = model.hf_tied(config)
    names = {original: unwrapped(original) for original in originals}
    usual = {original: model.hf_alias(name) for original, name in names.items()}
    others = sorted(original for original, name in usual.items() if _is_spare(model, name, {*shapes, *tied}))
    if others:
        notes.append(
            f"{shown(others[0])}{f' and {len(others) - 1} more' if len(others) > 1 else ''}: left out, they belong to "
            f"{getattr(model, 'SPARE_PARTS', 'heads')} that {_architecture(config)} in {CONFIG} does not have"
        )
        usual |= dict.fromkeys(others)
    asked = (
        name for original, name in names.items() if usual[original] not in shapes and original not in others
    )
    check_names(where, asked, lambda: sorted(shapes.keys() - usual.values() - set(tied.values())))
    if any(original != name for original, name in names.items()):
        notes.append(
            "the names of tensors held what torch.compile or parallel training adds, which was taken off"
        )
    places: Places = {}
    for original, place in originals.items():
        name = usual[original]
        if name in places:
            raise FormatError(
                f"{place[0]}: {shown(original)} and another tensor both stand for {shown(name)}"
            )
        if name is not None:
            places[name] = place
    if dropped := len(originals) - len(places) - len(others):
        notes.append(f"{dropped} tensors that hold no parameters (masks, rotary frequencies) were left out")
    for copy, name in tied.items():
        if copy in places and name not in places:
            places[name] = places.pop(copy)
            notes.append(
                f"{copy} was stored and stands for {name} as well: {CONFIG} says that they are one matrix"
            )
    tensors = _Tensors(places)
    for copy, name in tied.items():
        if copy in tensors and name in tensors:
            if not tensors.same(copy, name):
                raise FormatError(
                    f"{src}: {copy} differs from {name}, but {CONFIG} says that they are one matrix"
                )
            tensors = tensors.without(copy)
            notes.append(f"{copy} repeats {name} and was left out")
    return tensors


def _apart(model: Any, config: Any, places: Places) -> Places:
    """The tensors of a folder, in place of each that holds several of a family's the parts that those are of it."""
    if not hasattr(model, "hf_apart"):
        return places
    found: Places = {}
    for name, (path, info) in places.items():
        parts = model.hf_apart(config, unwrapped(name), info.shape)
        if parts is None:
            found[name] = path, info
            continue
        width = info.nbytes // max(1, math.prod(info.shape[:-1]))  # bytes of a row
        for part, first, rows in parts:
            start = info.start + first * width
            found[part] = (
                path,
                replace(info, shape=(rows, info.shape[-1]), start=start, end=start + rows * width),
            )
    return found


def _architecture(config: Any) -> str:
    """The name of transformers' class: the one in config.json, or the only one that a family has."""
    return str(getattr(config, "architecture", None) or config.ARCHITECTURE)


def _is_spare(model: Any, name: str | None, wanted: set[str]) -> bool:
    """Whether a tensor belongs to a part that other models of its family have, and this one has not."""
    spare = getattr(model, "hf_spare", None)
    return name is not None and spare is not None and name not in wanted and spare(name)


def _weights_of(src: Path) -> Path:
    return src / (WEIGHTS if (src / WEIGHTS).exists() else INDEX)


def _check_tensors(src: Path, tensors: _Tensors, shapes: Mapping[str, Any], notes: list[str]) -> None:
    """Compare the tensors with config.json, and note what becomes of their number formats."""
    check_tensors(_weights_of(src), tensors.infos, shapes, dtypes=IMPORTED)
    formats = {info.dtype for info in tensors.infos.values()}
    if halves := sorted(formats & {"F16", "BF16"}):
        notes.append(
            f"weights are {' and '.join(halves)} and stay so; engines compute with them in float32, which holds every "
            "value exactly"
        )
    if "F64" in formats:
        notes.append("weights were F64 and were rounded to float32, in which portlm computes")


def _copy_generation_config(src: Path, folder: Path, notes: list[str]) -> None:
    """Replace the minimal generation_config.json in ``folder`` by what the source says about sampling."""
    path, said = generation_config.find(src)
    notes += said.notes(path.name)
    if path.name == GENERATION_CONFIG:
        write_json(folder / GENERATION_CONFIG, said.kept)
    elif said.options:
        written = read_json(folder / GENERATION_CONFIG)
        assert isinstance(written, dict)
        write_json(folder / GENERATION_CONFIG, {**written, **said.kept})


def _copy_tokenizer(src: Path, folder: Path, vocab_size: int, notes: list[str]) -> None:
    """Copy the tokenizer's files if portlm can use them, without what would ask transformers to run code."""
    from portlm.tokenizer import MAX_FILE_BYTES, class_of_model

    if not usable_tokenizer(src, vocab_size, notes):
        return
    settings: Any = {}
    if (src / TOKENIZER_CONFIG).exists():
        settings = read_json(src / TOKENIZER_CONFIG, max_bytes=MAX_TEXT_BYTES)
        if not isinstance(settings, dict):
            raise FormatError(f"{src / TOKENIZER_CONFIG} must hold a JSON object")
    if settings.pop("auto_map", None) is not None:
        notes.append(f"{TOKENIZER_CONFIG}: auto_map left out, portlm never runs code from a model folder")
    if settings.get("tokenizer_class") is None:
        settings["tokenizer_class"] = class_of_model(src / CONFIG)
    write_atomic(folder / TOKENIZER, read_bytes(src / TOKENIZER, MAX_FILE_BYTES))
    write_json(folder / TOKENIZER_CONFIG, settings)
    for name in TOKENIZER_EXTRAS:
        if (src / name).exists():
            raw = read_bytes(src / name, MAX_TEXT_BYTES)
            if name.endswith(".json"):
                parse_json(raw, str(src / name))
            write_atomic(folder / name, raw)


def _copy_preprocessing(src: Path, folder: Path, config: Any) -> None:
    """Write what is done to pictures, of a family that is shown some."""
    if FAMILIES[config.family].kind == "picture":
        said = Preprocessing.read(src, config.vision.image_size)
        write_json(folder / PREPROCESSOR, said.to_hf())


def _copy_cards(src: Path, folder: Path, notes: list[str]) -> None:
    """Copy model card and licence files: whoever passes the weights on has to pass those on as well."""
    for name in cards(src):
        try:
            write_atomic(folder / name, read_bytes(src / name, MAX_TEXT_BYTES))
        except FormatError as error:
            notes.append(f"{name} was left out: {error}")


@contextmanager
def new_result(out: Path) -> Iterator[Path]:
    """Give a folder that becomes ``out``, which must not hold anything, when the block has ended well."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists already and is left alone: choose another name or remove it")
    try:
        with new_folder(out.absolute()) as folder:
            yield folder
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error.strerror}") from error


def count_parameters(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return how many numbers tensors of these shapes hold."""
    return sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())
