"""The artifact's manifest: what a folder holds, what each role takes, returns and keeps, and what was measured of it.

An artifact is a checkpoint folder with graphs, compiled code and manifest.json beside it. The manifest lists the
size and sha256 of every file and carries a digest of itself, so that a damaged folder is noticed before anything
runs. It says who made nothing: a manifest that verifies is complete and unaltered, not trustworthy.

Its fields are the structs below, and the constraints in their annotations are what is checked. The format grows by
optional fields: one that this version does not know is ignored (the digest covers it all the same) and is gone once
this version writes the manifest again. An older format is converted on reading (`_FORMAT_1_TENSORS`). Format 3 is 2
with quantized weights or a cache of int8, and 4 is 2 or 3 with weights of 16 bits, so that a reader that does not know
them refuses the folder.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from portlm.errors import FormatError, StorageError
from portlm.field_errors import explain
from portlm.files import check_is_folder, check_name, read_json, safe_join, sha256_file, shown, write_atomic
from portlm.quantization import BYTE_CACHE, FIFTEEN_BITS, KeyValueCache, Quantization
from portlm.roles import (
    DTYPES,
    MAX_DIMENSION,
    Dtype,
    RoleName,
    StateSpec,
    TensorSpec,
    Text,
    contradiction,
)

__all__ = [
    "DTYPES",
    "FORMAT",
    "FORMAT_VERSION",
    "MANIFEST",
    "MAX_FILE_BYTES",
    "Compiled",
    "CompiledEntry",
    "FileEntry",
    "Manifest",
    "ModelSpec",
    "ParityRow",
    "Provenance",
    "RoleSpec",
    "StateSpec",
    "TensorSpec",
    "check_files",
    "check_source",
    "half_weights",
    "hash_files",
    "instead",
    "list_files",
    "present_files",
    "read_manifest",
    "refresh_files",
    "replace",
    "store_file",
    "write_manifest",
]  # fmt: skip

T = TypeVar("T")

MANIFEST = "manifest.json"
FORMAT, FORMAT_VERSION, QUANTIZED_VERSION, HALF_VERSION = "portlm-artifact", 2, 3, 4
HALVES = ("float16", "bfloat16")

MAX_FILES = 65_536
MAX_FILE_BYTES = 2**44  # 16 TiB; a larger number is damage, not a file
MAX_COUNT = 2**40  # parameters
MAX_VOCABULARY = 2**20
MAX_ENTRIES = 4096  # roles, states, compiled entries, parity rows

Table = Annotated[dict[Text, T], Meta(max_length=MAX_ENTRIES)]
Sequence = Annotated[tuple[T, ...], Meta(max_length=MAX_ENTRIES)]
Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
Measure = Annotated[float, Meta(ge=0, le=sys.float_info.max)]  # finite, zero or above
Number = (
    Annotated[int, Meta(ge=-(2**53), le=2**53)]
    | Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
)


class ModelSpec(Struct, frozen=True):
    """What an engine or a user needs to know of the model without opening its weights.

    `family` is "module" for a model that portlm has no family of.
    """

    family: Text
    parameters: Annotated[int, Meta(ge=1, le=MAX_COUNT)]
    vocab_size: Annotated[int, Meta(ge=1, le=MAX_VOCABULARY)]
    context_length: Annotated[int, Meta(ge=1, le=MAX_DIMENSION)]


class Provenance(Struct, frozen=True):
    """How a role's graphs came about: by which package versions and settings, traced with inputs of which shapes."""

    versions: Table[Text] = {}
    settings: Table[Text | bool | Number] = {}
    traced: Table[
        Annotated[tuple[Annotated[int, Meta(ge=0, le=MAX_DIMENSION)], ...], Meta(max_length=8)]
    ] = {}


class RoleSpec(Struct, frozen=True):
    """One function of the model: its graph in each of its profiles, and what every one of them takes and returns.

    Attributes:
        profiles: graph file by profile.
        weights: the file with the weights of all of them.
        inputs: of one call, beside the state.
        outputs: of one call, beside the state.
        state: what an engine carries from call to call.
        dtypes: of weights, by name; float32 for one that is not named.
        provenance: of the graphs.
    """

    profiles: Table[Text]
    weights: Text
    inputs: Sequence[TensorSpec]
    outputs: Sequence[TensorSpec]
    state: Sequence[StateSpec]
    dtypes: Annotated[dict[Text, Dtype], Meta(max_length=MAX_FILES)] = {}
    provenance: Provenance = Provenance()


class FileEntry(Struct, frozen=True):
    """Size and sha256 of one file."""

    size: Annotated[int, Meta(ge=0, le=MAX_FILE_BYTES)]
    sha256: Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class CompiledEntry(Struct, frozen=True):
    """Files that one engine made of a role's profile for one device and target."""

    engine: Text
    device: Text
    profile: Text
    target: Text
    files: Sequence[Text]
    versions: Table[Text]
    role: RoleName = "decoder"


class Compiled(NamedTuple):
    """What a compiler wrote into an artifact: its entry, and size and sha256 of the bytes that it wrote, by name."""

    entry: CompiledEntry
    files: dict[str, FileEntry]


class ParityRow(Struct, frozen=True):
    """What was measured of one engine on one machine, against eager PyTorch in float32.

    `max_logit_error` is the largest absolute difference of a logit, `logit_scale` the largest absolute logit that
    PyTorch gives (absent in older files), `kl` the mean divergence in nats, `top1` the share of positions with the
    same best token, `greedy_match` of `greedy_total` the tokens that greedy decoding agrees on before the first
    difference in any of the probe's prompts. `placement` counts nodes per device.
    """

    engine: Text
    device: Text
    profile: Text
    precision: Text
    max_logit_error: Measure
    kl: Measure
    top1: Measure
    greedy_match: Count
    greedy_total: Count
    placement: Table[Annotated[int, Meta(ge=0, le=MAX_DIMENSION)]]
    fallback: Sequence[Text]
    versions: Table[Text]
    date: Text
    role: RoleName = "decoder"
    logit_scale: Measure | None = None


class Manifest(Struct, frozen=True):
    """Everything manifest.json says, checked."""

    model: ModelSpec
    roles: Annotated[dict[RoleName, RoleSpec], Meta(max_length=MAX_ENTRIES)]
    files: Annotated[dict[Text, FileEntry], Meta(max_length=MAX_FILES)]
    compiled: Sequence[CompiledEntry] = ()
    quantization: Quantization | None = None
    parity: Sequence[ParityRow] = ()
    cache: KeyValueCache | None = None

    def precision(self, *, rounds: bool) -> str:
        """Return the precision of an engine that runs the graphs, see portlm.quantization.

        Args:
            rounds: it multiplies quantized weights with activations of 15 bits.
        """
        if rounds and self.quantization is not None:
            return FIFTEEN_BITS
        return "fp32" if self.cache is None else BYTE_CACHE


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check the manifest of an artifact. The files it lists are not read: see check_files.

    Raises:
        FormatError: there is none, it is damaged, or it says something that cannot be.
    """
    check_is_folder(Path(folder))
    path = Path(folder) / MANIFEST
    if not path.exists():
        raise FormatError(
            f"{path} does not exist: {instead(folder) or 'give an artifact, made by portlm export'}"
        )
    data = read_json(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise FormatError(f"{path}: not a {FORMAT} manifest; export the checkpoint again")
    version = data.get("format_version")
    if type(version) is not int or not 1 <= version <= HALF_VERSION:
        raise FormatError(
            f"{path}: format version {shown(version)}, this portlm reads 1 to {HALF_VERSION}: "
            "export again, or use the portlm that wrote it"
        )
    if data.get("sha256") != _digest(data):
        raise FormatError(
            f"{path}: altered or damaged, its digest does not match; export again or restore the file"
        )
    return _checked(path, _from_format_1(path, data) if version == 1 else data)


def instead(folder: str | Path) -> str:
    """Say what to give in place of a folder without the file that was looked for, or "" if nothing can be guessed."""
    root = Path(folder)
    if (root / "final" / "config.json").is_file():
        return f"this is a run folder, the trained model is in {root / 'final'}"
    if (root / "config.json").is_file() and not (root / MANIFEST).exists():
        return f"this is a checkpoint, run portlm export {root} OUT first and give OUT"
    return ""


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Write manifest.json atomically, after the checks of read_manifest.

    Raises:
        FormatError: the manifest contradicts itself.
        StorageError: the disk is full or refuses.
    """
    path = Path(folder) / MANIFEST
    try:
        fields = msgspec.to_builtins(manifest)
    except (TypeError, ValueError) as error:
        raise FormatError(f"{path}: the manifest holds what JSON has no word for: {error}") from error
    _checked(path, fields)
    version = QUANTIZED_VERSION if manifest.quantization or manifest.cache else FORMAT_VERSION
    if half_weights(manifest):
        version = HALF_VERSION
    data = {"format": FORMAT, "format_version": version, **fields}
    data["sha256"] = _digest(data)
    write_atomic(path, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def half_weights(manifest: Manifest) -> tuple[str, ...]:
    """Return the types of 16 bits that weights of an artifact have, none if all are wider or quantized."""
    found = {dtype for role in manifest.roles.values() for dtype in role.dtypes.values()}
    return tuple(dtype for dtype in HALVES if dtype in found)


def check_files(
    folder: str | Path, names: Iterable[str] | None = None, manifest: Manifest | None = None
) -> Manifest:
    """Compare files with the manifest; return the manifest. Nothing of an artifact is used before this.

    Args:
        folder: the artifact.
        names: relative names; None for all that are listed.
        manifest: of the artifact, read before; None reads it.

    Raises:
        FormatError: names the file, and whether it is not listed, missing, truncated or altered.
    """
    root = Path(folder)
    manifest = read_manifest(root) if manifest is None else manifest
    for name in manifest.files if names is None else names:
        if name not in manifest.files:
            raise FormatError(f"{root}: {name} is not in the manifest; export again")
        entry, path = manifest.files[name], safe_join(root, name)
        compiled = any(name in each.files for each in manifest.compiled)
        cure = f"restore the file or {'run portlm compile' if compiled else 'export'} again"
        if not path.exists():
            raise FormatError(f"{path}: missing; {cure}")
        size = path.stat().st_size
        if size < entry.size:
            raise FormatError(f"{path}: truncated, it ends at byte {size} of {entry.size}; {cure}")
        if size > entry.size or sha256_file(path) != entry.sha256:
            raise FormatError(f"{path}: altered since the manifest was written; {cure}")
    return manifest


def present_files(folder: str | Path, names: Iterable[str], manifest: Manifest) -> list[str]:
    """Return those names that the artifact has, after comparing them with the manifest.

    A file that is there and not listed is no part of the artifact, whoever put it there: it is refused, and not
    ignored, because whoever put it there believes that it counts.

    Raises:
        FormatError: names the file, and whether it is not listed, missing, truncated or altered.
    """
    found = [name for name in names if name in manifest.files or os.path.lexists(Path(folder, name))]
    check_files(folder, found, manifest)
    return found


def check_source(folder: str | Path, names: Iterable[str]) -> None:
    """Compare files of a folder that is taken as a checkpoint with its manifest, if it is an artifact.

    What the manifest does not list is for whoever put it there, such as a tokenizer that is to come into a new export.

    Raises:
        FormatError: the manifest is damaged, or a file that it lists is missing, truncated or altered.
    """
    path = Path(folder) / MANIFEST
    data = read_json(path) if path.exists() else None
    if isinstance(data, dict) and data.get("format") == FORMAT:
        manifest = read_manifest(folder)
        check_files(folder, [name for name in names if name in manifest.files], manifest)


def store_file(folder: str | Path, name: str, data: bytes) -> FileEntry:
    """Write a file of an artifact atomically; return size and sha256 of these bytes, whatever becomes of the file.

    Raises:
        FormatError: the name leads out of the folder.
        StorageError: the disk is full or refuses.
    """
    path = safe_join(Path(folder), name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{path.parent} cannot be made: {error.strerror}") from error
    write_atomic(path, data)
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())


def hash_files(folder: str | Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Size and sha256 of files of an artifact, by relative name."""
    entries = {}
    for name in names:
        path = safe_join(Path(folder), name)
        if not path.is_file():
            raise FormatError(f"{path}: missing")
        entries[name] = FileEntry(path.stat().st_size, sha256_file(path))
    return entries


def list_files(folder: str | Path) -> list[str]:
    """Relative names of every file below the folder except its manifest, sorted."""
    root = Path(folder)
    names = (
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if not path.is_dir() or path.is_symlink()
    )
    return sorted(name for name in names if name != MANIFEST)


def refresh_files(folder: str | Path, manifest: Manifest, names: Iterable[str] | None = None) -> Manifest:
    """The manifest with files (re)hashed: those named, which are added if new, or everything in the folder."""
    if names is None:
        return replace(manifest, files=hash_files(folder, list_files(folder)))
    return replace(manifest, files=dict(sorted({**manifest.files, **hash_files(folder, names)}.items())))


def _digest(data: Mapping[str, Any]) -> str:
    """Sha256 of the canonical JSON (sorted keys, no spaces, UTF-8) without the digest itself."""
    body = {key: value for key, value in data.items() if key != "sha256"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _checked(path: Path, data: Any) -> Manifest:
    """Convert JSON to a manifest. Wrong types, impossible numbers and contradictions are errors.

    Raises:
        FormatError: says the file, the field, what was expected and what is there.
    """
    try:
        manifest = msgspec.convert(data, Manifest)
    except msgspec.ValidationError as error:
        raise FormatError(f"{path}: {explain(data, Manifest, str(error))}") from error
    for text in _texts(msgspec.to_builtins(manifest)):
        if not text.isprintable():
            raise FormatError(f"{path}: the text {shown(text)} must be printable")
    for name in manifest.files:  # the names alone: most files are not looked at every time
        check_name(path.parent, name)
    named = {name for role in manifest.roles.values() for name in (*role.profiles.values(), role.weights)}
    named |= {name for entry in manifest.compiled for name in entry.files}
    for name in sorted(named - manifest.files.keys()):
        raise FormatError(f"{path}: {name[:80]!r} is used but not listed under files")
    for key, role in manifest.roles.items():
        if problem := contradiction(role.inputs, role.outputs, role.state) or _wrong_width(manifest, key):
            raise FormatError(f"{path}: roles[{key[:80]!r}]: {problem}")
    kept = any(state.dtype == "int8" for role in manifest.roles.values() for state in role.state)
    if kept != (manifest.cache is not None):
        said = "a cache of int8" if manifest.cache else "no cache of int8"
        raise FormatError(
            f"{path}: cache says that there is {said}, and the states of its roles say otherwise"
        )
    for i, row in enumerate(manifest.parity):
        if row.greedy_match > row.greedy_total:
            raise FormatError(
                f"{path}: parity[{i}].greedy_match must be at most greedy_total = {row.greedy_total}, "
                f"got {row.greedy_match}"
            )
    return manifest


def _wrong_width(manifest: Manifest, role: str) -> str:
    """Say how many logits a decoder gives for each token, if they are not one for each id, or ""."""
    for output in manifest.roles[role].outputs if role == "decoder" else ():
        width = output.shape[-1]
        if output.name == "logits" and width != manifest.model.vocab_size:
            return f"output 'logits' has {width} values for a vocabulary of {manifest.model.vocab_size}"
    return ""


def _texts(value: Any) -> set[str]:
    """Every string of plain data, keys included."""
    found: set[str] = set()
    rest = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, str):
            found.add(item)
        elif isinstance(item, dict):
            found.update(item)
            rest.extend(item.values())
        elif isinstance(item, list | tuple):
            rest.extend(item)
    return found


# Format 1 knew decoders alone, said inputs and outputs by name, and returned the logits of every token.
_FORMAT_1_TENSORS = {
    "input_ids": ("int64", ("batch", "sequence")),
    "attention_mask": ("int64", ("batch", "past + sequence")),
    "position_ids": ("int64", ("batch", "sequence")),
    "logits": ("float32", ("batch", "sequence", "vocab_size")),
}


def _from_format_1(path: Path, data: dict[str, Any]) -> dict[str, Any]:
    """A manifest of format 1 as one of format 2; what is wrong with it is left for the checks of format 2."""
    model, roles = data.get("model"), data.get("roles")
    vocab_size = model.get("vocab_size") if isinstance(model, dict) else None
    for key, role in roles.items() if isinstance(roles, dict) else ():
        for field in ("inputs", "outputs"):
            names = role.get(field) if isinstance(role, dict) else None
            if not isinstance(names, list):
                continue
            for i, name in enumerate(names):
                if not isinstance(name, str) or name not in _FORMAT_1_TENSORS:
                    known = ", ".join(_FORMAT_1_TENSORS)
                    where = f"roles[{shown(key)}].{field}[{i}]"
                    raise FormatError(f"{path}: {where} must be one of {known}, got {shown(name)}")
                dtype, shape = _FORMAT_1_TENSORS[name]
                sizes = [vocab_size if d == "vocab_size" else d for d in shape]
                names[i] = {"name": name, "dtype": dtype, "shape": sizes}
    return data
