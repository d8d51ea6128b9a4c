"""Checkpoints from and to GGUF files, which llama.cpp reads.

What the file says of the model goes through the family's own reading of config.json, so a model that portlm would
compute otherwise is refused by name, as in hub.py. Quantized numbers become float32; plain ones stay what they are.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from portlm.chat import TEMPLATE, ChatTemplate
from portlm.errors import ConfigError, FormatError, UsageError
from portlm.files import shown, write_atomic
from portlm.gguf_architectures import Turn
from portlm.gguf_file import GgufFile
from portlm.gguf_models import (
    ROTARY_TENSORS,
    architecture_of,
    gguf_name,
    gguf_settings,
    hf_config,
    hf_names,
    rotary_scaling,
    rotary_tensors,
)
from portlm.gguf_tokenizer import read_tokenizer, tokenizer_entries
from portlm.gguf_writer import write_gguf
from portlm.hub import Transfer, check_files, count_parameters, new_result
from portlm.hub_files import TOKENIZER
from portlm.kept_scales import BITS, save_scales, scales_in
from portlm.models import (
    WEIGHTS,
    at_context,
    check_tensors,
    config_from_hf,
    expected_shapes,
    load_config,
    write_config,
)
from portlm.weights import TensorInfo, load_numpy, read_header, save_tensors

if TYPE_CHECKING:
    import torch

SUFFIX = ".gguf"
_ATTENTION_FACTOR = "rope.scaling.attn_factor"  # of LongRoPE
_KEPT = {"F32": "F32", "F16": "F16", "BF16": "BF16"}  # all others become float32
_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}  # general.file_type


def import_gguf(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    context: int | None = None,
    keep_integers: bool = False,
) -> Transfer:
    """Turn a GGUF file into a portlm checkpoint.

    Args:
        src: The file, of an architecture that portlm has (:data:`portlm.gguf_architectures.ARCHITECTURES`).
        out: The folder to create. It appears when everything is in it.
        context: How many of its positions are used, where that decides what is computed (longrope).
        keep_integers: Keep the scales of matrices in Q4_0 and Q8_0 beside the weights, so that an export of int4 or
            int8 has the file's own numbers (portlm.kept_scales).

    Raises:
        FormatError: The file is missing, damaged, or describes a model that portlm does not compute.
        UsageError: ``out`` exists and holds something, or the package gguf is missing.
        StorageError: The disk is full or refuses the write.
    """
    src, out, notes = Path(src), Path(out), list[str]()
    file = GgufFile.open(src)
    config = _config(file, notes, context)
    tensors_of_model = {name: tensor for name, tensor in file.tensors.items() if name not in ROTARY_TENSORS}
    names = hf_names(tensors_of_model, config.family, src)
    tensors = _Tensors(file, names, config)
    shapes = expected_shapes(config)
    check_tensors(src, tensors.infos, shapes)
    if quantized := sorted({t.kind for t in file.tensors.values()} - _KEPT.keys()):
        notes.append(f"weights in {', '.join(quantized)} were widened to float32")
    with new_result(out) as folder:
        save_tensors(folder / WEIGHTS, tensors, metadata={"format": "pt"})
        if keep_integers:
            _keep_scales(folder, tensors.scales(), notes)
        write_config(folder, config)
        _write_tokenizer(file, folder, config.vocab_size, notes)
        _write_template(file, folder, notes)
    return Transfer(out, config.family, count_parameters(shapes), tuple(notes))


def _config(file: GgufFile, notes: list[str], context: int | None) -> Any:
    """Return the configuration that the metadata stands for, with the tokens that begin and end a text."""
    data = hf_config(file.entries, file.tensors, file.path)
    factors = {name: file.numbers(name) for name in ROTARY_TENSORS if name in file.tensors}
    try:
        size = float(file.entries.get(f"{file.entries['general.architecture']}.{_ATTENTION_FACTOR}", 1.0))
        if (scaling := rotary_scaling(factors, data, size)) is not None:
            if "rope_scaling" in data:
                raise ValueError(f"{next(iter(factors))} stretches positions, and so does rope.scaling.type")
            data["rope_scaling"] = scaling
    except ValueError as error:
        raise FormatError(f"{file.path}: {error}") from error
    ids = {
        name: file.entries.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding")
    }
    for name, index in ids.items():
        if index is not None and (type(index) is not int or not 0 <= index < data["vocab_size"]):
            notes.append(
                f"tokenizer.ggml.{name}_token_id is {shown(index)}, which the model lacks, and was left out"
            )
            ids[name] = None
    ends = list(dict.fromkeys(index for index in (ids["eos"], ids["eot"]) if index is not None))
    data |= {"bos_token_id": ids["bos"], "pad_token_id": ids["padding"]}
    data["eos_token_id"] = ends if len(ends) > 1 else next(iter(ends), None)
    try:
        return config_from_hf(data if context is None else at_context(data, context))
    except ConfigError as error:
        raise FormatError(
            f"{file.path}: what its metadata says, in the words of config.json: {error}"
        ) from error


class _Tensors(Mapping[str, "np.ndarray | torch.Tensor"]):
    """The tensors under the names of a checkpoint and in its order of rows, each read when it is asked for."""

    def __init__(self, file: GgufFile, names: Mapping[str, tuple[str, Turn | None]], config: Any):
        self._file, self._config = file, config
        self._places = {name: (place, turn) for place, (name, turn) in names.items()}
        self.infos = {name: self._info(place, turn) for name, (place, turn) in self._places.items()}

    def _info(self, place: str, turn: Turn | None) -> TensorInfo:
        """Return what model.safetensors will say of a tensor."""
        tensor = self._file.tensors[place]
        shape = tensor.shape
        if turn is not None:
            try:
                shape = turn.back(np.broadcast_to(np.uint8(0), shape), self._config).shape
            except ValueError as error:
                raise FormatError(
                    f"{self._file.path}: the tensor {shown(place)} has the shape {list(shape)}"
                ) from error
        dtype = "F32" if turn is not None and turn.computes else _KEPT.get(tensor.kind, "F32")
        return TensorInfo(dtype, tuple(shape), 0, math.prod(shape) * (4 if dtype == "F32" else 2))

    def __getitem__(self, name: str) -> np.ndarray | torch.Tensor:
        place, turn = self._places[name]
        tensor = self._file.tensors[place]
        if self.infos[name].dtype != "BF16":
            values = self._file.numbers(place)
            if turn is not None and turn.computes:
                values = values.astype(np.float32)
            return values if turn is None else np.ascontiguousarray(turn.back(values, self._config))
        import torch

        halves = np.frombuffer(self._file.raw(place), "<i2").reshape(tensor.shape)
        turned = halves if turn is None else turn.back(halves, self._config)
        return torch.from_numpy(np.array(turned)).view(torch.bfloat16)

    def scales(self) -> dict[str, tuple[str, np.ndarray]]:
        """Return of each matrix that has such blocks their kind and their scales (N, G), in the order of its rows.

        Raises:
            FormatError: A scale is not finite.
        """
        found = {}
        for name, (place, turn) in self._places.items():
            tensor = self._file.tensors[place]
            if tensor.kind not in BITS or len(tensor.shape) != 2:
                continue
            try:
                scales = scales_in(self._file.raw(place), tensor.kind, tensor.shape)
            except FormatError as error:
                raise FormatError(f"{self._file.path}: in the tensor {shown(place)} {error}") from error
            if turn is not None and not turn.transposes:  # rows move with their scales
                scales = turn.back(scales, self._config)
            found[name] = tensor.kind, np.ascontiguousarray(scales)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _keep_scales(folder: Path, scales: Mapping[str, tuple[str, np.ndarray]], notes: list[str]) -> None:
    """Write the scales beside the weights, if there are any."""
    if not scales:
        raise UsageError(f"the file has no matrix in {' or '.join(BITS)}: leave --keep-integers out")
    kinds = {name: kind for name, (kind, _) in scales.items()}
    save_scales(folder, {name: scale for name, (_, scale) in scales.items()}, kinds)
    exact = "int4 or int8" if set(kinds.values()) == {"Q4_0"} else "int8"
    notes.append(
        f"the scales of {len(scales)} matrices were kept: export --quantize {exact} has the file's own numbers"
    )


def _write_tokenizer(file: GgufFile, folder: Path, vocab_size: int, notes: list[str]) -> None:
    """Write tokenizer.json if portlm can use what the file says."""
    try:
        tokenizer = read_tokenizer(file.entries, file.path)
        tokenizer.within(vocab_size)
    except FormatError as error:
        notes.append(f"the tokenizer was left out, so the model takes token ids only (--ids): {error}")
        return
    tokenizer.save(folder)


def _write_template(file: GgufFile, folder: Path, notes: list[str]) -> None:
    """Write the chat template, if there is one that can be read."""
    source = file.entries.get("tokenizer.chat_template")
    if source is None:
        return
    try:
        if not isinstance(source, str):
            raise FormatError("it is no text")
        ChatTemplate(source)
    except FormatError as error:
        notes.append(f"the chat template was left out: {error}")
        return
    write_atomic(folder / TEMPLATE, source)


def export_gguf(
    checkpoint: str | os.PathLike[str], out: str | os.PathLike[str], *, tokenizer: bool = True
) -> Transfer:
    """Write a GGUF file that llama.cpp opens.

    Matrices keep their number format, vectors are float32, as llama.cpp wants them.

    Args:
        checkpoint: A portlm checkpoint or artifact folder.
        out: The file to create. It appears when everything is in it.
        tokenizer: Write the tokenizer, too; without it llama.cpp takes token ids only.

    Raises:
        FormatError: A file of the checkpoint is missing or damaged.
        UsageError: ``out`` exists, or llama.cpp does not know the family.
        StorageError: The disk is full or refuses the write.
    """
    checkpoint, out, notes = Path(checkpoint), Path(out), list[str]()
    if out.exists():
        raise UsageError(f"{out} exists already and is left alone: choose another name or remove it")
    check_files(checkpoint)
    config: Any = load_config(checkpoint, notes)
    architecture = architecture_of(config.family).name
    shapes, header = expected_shapes(config), read_header(checkpoint / WEIGHTS)
    check_tensors(checkpoint / WEIGHTS, header, shapes)
    words = _tokenizer_entries(checkpoint, config.vocab_size, notes) if tokenizer else None
    places = {gguf_name(name, config.family)[0]: name for name in header}
    mapped = load_numpy(checkpoint / WEIGHTS, bfloat16=np.dtype("<u2"))

    def kind_of(name: str) -> str:
        return header[name].dtype if len(header[name].shape) > 1 else "F32"

    def turned(name: str) -> np.ndarray:
        turn, values = gguf_name(name, config.family)[1], mapped[name]
        if kind_of(name) == "F32":  # a vector of 16 bits is widened
            bits = header[name].dtype == "BF16"
            values = (values.astype("<u4") << 16).view("<f4") if bits else values.astype("<f4", copy=False)
        return values if turn is None else turn.there(values, config)

    factors = rotary_tensors(config)

    def content(target: str) -> bytes:
        if target in factors:
            return factors[target].astype("<f4").tobytes()
        return turned(places[target]).tobytes()

    kinds = {kind_of(name) for name in header}
    entries: dict[str, Any] = {
        "general.architecture": architecture,
        "general.name": checkpoint.resolve().name,
        "general.file_type": _FILE_TYPES[next((kind for kind in ("BF16", "F16") if kind in kinds), "F32")],
    }
    entries |= {f"{architecture}.{key}": value for key, value in gguf_settings(config).items()}
    entries |= _token_ids(config.to_hf()) | (words or {"tokenizer.ggml.model": "none"})
    if words is not None and (template := _template_of(checkpoint)) is not None:
        entries["tokenizer.chat_template"] = template
    tensors = {target: (kind_of(name), turned(name).shape) for target, name in places.items()}
    _note_rotation(config, factors, notes)
    tensors |= {name: ("F32", values.shape) for name, values in factors.items()}
    write_gguf(out, entries, tensors, content)
    return Transfer(out, config.family, count_parameters(shapes), tuple(notes))


def _note_rotation(config: Any, factors: Mapping[str, np.ndarray], notes: list[str]) -> None:
    """Note what becomes of positions that are stretched by tensors."""
    if not factors:
        return
    scaling, said = config.rope_scaling, config.to_hf()
    if scaling.kind == "longrope":
        here = "long" if scaling.is_long(config.context_length) else "short"
        notes.append(
            f"positions: {here} factors here; llama.cpp takes the long ones if it is opened with a context of more "
            f"than {scaling.original_max_position_embeddings} tokens, and the short ones otherwise"
        )
        return
    try:
        same = rotary_scaling(factors, said, 1.0) == scaling.to_hf()
    except ValueError:
        same = False
    if not same:
        notes.append("positions are stretched in a way that portlm does not read back from the file")


def _token_ids(said: Mapping[str, Any]) -> dict[str, Any]:
    """Return what config.json says of the tokens that begin and end a text."""
    ends = said["eos_token_id"]
    ends = ends if isinstance(ends, list) else [ends]
    names = ("bos", said["bos_token_id"]), ("eos", ends[0]), ("eot", ends[1] if len(ends) > 1 else None)
    every = (*names, ("padding", said["pad_token_id"]))
    return {f"tokenizer.ggml.{name}_token_id": index for name, index in every if index is not None}


def _tokenizer_entries(checkpoint: Path, vocab_size: int, notes: list[str]) -> dict[str, Any] | None:
    """Return what GGUF says of the checkpoint's tokenizer, or None with a note."""
    from portlm.tokenizer import Tokenizer

    if not (checkpoint / TOKENIZER).exists():
        notes.append("the checkpoint has no tokenizer, so the file takes token ids only")
        return None
    try:
        return tokenizer_entries(Tokenizer.load(checkpoint).within(vocab_size), vocab_size)
    except FormatError as error:
        notes.append(f"the tokenizer was left out, so the file takes token ids only: {error}")
        return None


def _template_of(checkpoint: Path) -> str | None:
    """Return the checkpoint's chat template, if there is one."""
    try:
        return ChatTemplate.load(checkpoint).source
    except FormatError:
        return None
