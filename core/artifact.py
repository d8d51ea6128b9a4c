"""The artifact's manifest: what a folder holds, what a decoder keeps between steps, and what was measured of it.

An artifact is a checkpoint folder with graphs, compiled code and manifest.json beside it. The manifest lists the
size and sha256 of every file and carries a digest of itself, so that a damaged folder is noticed before anything
runs. It says who made nothing: a manifest that verifies is complete and unaltered, not trustworthy.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from portlm.errors import FormatError
from portlm.files import read_json, safe_join, sha256_file, write_atomic

T = TypeVar("T")

MANIFEST = "manifest.json"
FORMAT, FORMAT_VERSION = "portlm-artifact", 1

MAX_FILES = 65_536
MAX_FILE_BYTES = 2**44  # 16 TiB; a larger number is damage, not a file
MAX_COUNT = 2**40  # parameters
MAX_DIMENSION = 2**31
MAX_LAYERS = 1024
MAX_VOCABULARY = 2**20
MAX_ENTRIES = 4096  # roles, states, compiled entries, parity rows
MAX_TEXT = 1024  # characters of any string

DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8")
INITIALS = ("empty", "zeros")
UPDATES = ("append", "replace", "constant")


@dataclass(frozen=True)
class ModelSpec:
    """The sizes of the model that an engine or a user needs without opening its weights."""

    family: str
    parameters: int
    vocab_size: int
    context_length: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int


@dataclass(frozen=True)
class StateSpec:
    """One tensor carried from step to step.

    `shape` mixes sizes and the symbols "batch" and "past"; `initial` says how it begins ("empty": past is 0);
    `update` how the graph's `output` becomes the next step's `name`: "append" (it is the old value, grown),
    "replace" or "constant".
    """

    name: str
    output: str
    dtype: str
    shape: tuple[int | str, ...]
    initial: str
    update: str


@dataclass(frozen=True)
class RoleSpec:
    """One graph of the model, in each of its profiles: inputs and outputs beside the state, by name."""

    profiles: dict[str, str]
    weights: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    state: tuple[StateSpec, ...]


@dataclass(frozen=True)
class FileEntry:
    """Size and sha256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class CompiledEntry:
    """Files that one engine made of a profile for one device and target."""

    engine: str
    device: str
    profile: str
    target: str
    files: tuple[str, ...]
    versions: dict[str, str]


@dataclass(frozen=True)
class ParityRow:
    """What was measured of one engine on one machine, against eager PyTorch in float32.

    `max_logit_error` is the largest absolute difference of a logit, `kl` the mean divergence in nats, `top1` the
    share of positions with the same best token, `greedy_match` of `greedy_total` the tokens that greedy decoding
    agrees on before the first difference in any of the probe's prompts. `placement` counts nodes per device.
    """

    engine: str
    device: str
    profile: str
    precision: str
    max_logit_error: float
    kl: float
    top1: float
    greedy_match: int
    greedy_total: int
    placement: dict[str, int]
    fallback: tuple[str, ...]
    versions: dict[str, str]
    date: str


@dataclass(frozen=True)
class Manifest:
    """Everything manifest.json says, checked."""

    model: ModelSpec
    roles: dict[str, RoleSpec]
    files: dict[str, FileEntry]
    compiled: tuple[CompiledEntry, ...] = ()
    quantization: dict[str, str | int] | None = None
    parity: tuple[ParityRow, ...] = ()


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check the manifest of an artifact. The files it lists are not read: see verify_files.

    Raises:
        FormatError: there is none, it is damaged, or it says something that cannot be.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        raise FormatError(
            f"{path} does not exist: {instead(folder) or 'give an artifact, made by portlm export'}"
        )
    data = read_json(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise FormatError(f"{path}: not a {FORMAT} manifest; export the checkpoint again")
    if type(data.get("format_version")) is not int or data["format_version"] != FORMAT_VERSION:
        raise FormatError(
            f"{path}: format version {data.get('format_version')!r}, this portlm reads {FORMAT_VERSION}: "
            "export again, or use the portlm that wrote it"
        )
    if data.get("sha256") != _digest(data):
        raise FormatError(
            f"{path}: altered or damaged, its digest does not match; export again or restore the file"
        )
    manifest = _Parser(path).manifest(data)
    for name in manifest.files:
        safe_join(Path(folder), name)
    return manifest


def instead(folder: str | Path) -> str:
    """Say what to give in place of a folder without the file that was looked for, or "" if nothing can be guessed."""
    root = Path(folder)
    if not root.is_dir():
        return "there is no such folder"
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
    data: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION, **_plain(asdict(manifest))}
    data["sha256"] = _digest(data)
    _Parser(path).manifest(data)
    write_atomic(path, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def verify_files(folder: str | Path, names: Iterable[str] | None = None) -> Manifest:
    """Compare files with the manifest, all of them or those named; return the manifest.

    Raises:
        FormatError: names the file, and whether it is missing, truncated or altered.
    """
    root = Path(folder)
    manifest = read_manifest(root)
    for name in manifest.files if names is None else names:
        if name not in manifest.files:
            raise FormatError(f"{root}: {name} is not in the manifest; export again")
        entry, path = manifest.files[name], safe_join(root, name)
        if not path.exists():
            raise FormatError(f"{path}: missing; export again or restore the file")
        size = path.stat().st_size
        if size < entry.size:
            raise FormatError(f"{path}: truncated, it ends at byte {size} of {entry.size}; restore the file")
        if size > entry.size or sha256_file(path) != entry.sha256:
            raise FormatError(
                f"{path}: altered since the manifest was written; restore the file or export again"
            )
    return manifest


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


def _plain(value: Any) -> Any:
    """Dataclass dictionaries with lists for tuples, as JSON has them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _digest(data: Mapping[str, Any]) -> str:
    """Sha256 of the canonical JSON (sorted keys, no spaces, UTF-8) without the digest itself."""
    body = {key: value for key, value in data.items() if key != "sha256"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class _Parser:
    """Checks parsed JSON field by field. Unknown and missing keys, wrong types and impossible numbers are errors."""

    def __init__(self, path: Path):
        self.path = path

    def fail(self, where: str, wanted: str, value: object) -> FormatError:
        shown = repr(value)
        return FormatError(
            f"{self.path}: {where} must be {wanted}, got {shown[:80]}{'...' * (len(shown) > 80)}"
        )

    def manifest(self, data: Any) -> Manifest:
        keys = (
            "format",
            "format_version",
            "model",
            "roles",
            "files",
            "compiled",
            "quantization",
            "parity",
            "sha256",
        )
        fields = self.record(data, "manifest", keys)
        files = self.table(fields["files"], "files", self.file, MAX_FILES)
        for name in files:
            safe_join(self.path.parent, name)
        manifest = Manifest(
            model=self.model(fields["model"], "model"),
            roles=self.table(fields["roles"], "roles", self.role),
            files=files,
            compiled=self.sequence(fields["compiled"], "compiled", self.compiled),
            quantization=self.quantization(fields["quantization"]),
            parity=self.sequence(fields["parity"], "parity", self.parity_row),
        )
        self.references(manifest)
        return manifest

    def references(self, manifest: Manifest) -> None:
        """Every file that a role or a compiled entry names is listed with its hash."""
        named = {name for role in manifest.roles.values() for name in (*role.profiles.values(), role.weights)}
        named |= {name for entry in manifest.compiled for name in entry.files}
        for name in sorted(named - manifest.files.keys()):
            raise FormatError(f"{self.path}: {name[:80]!r} is used but not listed under files")

    def model(self, value: Any, where: str) -> ModelSpec:
        f = self.record(value, where, tuple(ModelSpec.__dataclass_fields__))
        spec = ModelSpec(
            family=self.text(f["family"], f"{where}.family"),
            parameters=self.whole(f["parameters"], f"{where}.parameters", 1, MAX_COUNT),
            vocab_size=self.whole(f["vocab_size"], f"{where}.vocab_size", 1, MAX_VOCABULARY),
            context_length=self.whole(f["context_length"], f"{where}.context_length", 1, MAX_DIMENSION),
            n_layer=self.whole(f["n_layer"], f"{where}.n_layer", 1, MAX_LAYERS),
            n_head=self.whole(f["n_head"], f"{where}.n_head", 1, MAX_DIMENSION),
            n_kv_head=self.whole(f["n_kv_head"], f"{where}.n_kv_head", 1, MAX_DIMENSION),
            head_dim=self.whole(f["head_dim"], f"{where}.head_dim", 1, MAX_DIMENSION),
        )
        if spec.n_head % spec.n_kv_head:
            raise self.fail(f"{where}.n_kv_head", f"a divisor of n_head = {spec.n_head}", spec.n_kv_head)
        return spec

    def role(self, value: Any, where: str) -> RoleSpec:
        f = self.record(value, where, tuple(RoleSpec.__dataclass_fields__))
        return RoleSpec(
            profiles=self.table(f["profiles"], f"{where}.profiles", self.text),
            weights=self.text(f["weights"], f"{where}.weights"),
            inputs=self.sequence(f["inputs"], f"{where}.inputs", self.text),
            outputs=self.sequence(f["outputs"], f"{where}.outputs", self.text),
            state=self.sequence(f["state"], f"{where}.state", self.state),
        )

    def state(self, value: Any, where: str) -> StateSpec:
        f = self.record(value, where, tuple(StateSpec.__dataclass_fields__))
        return StateSpec(
            name=self.text(f["name"], f"{where}.name"),
            output=self.text(f["output"], f"{where}.output"),
            dtype=self.one_of(f["dtype"], f"{where}.dtype", DTYPES),
            shape=self.sequence(f["shape"], f"{where}.shape", self.dimension, 8),
            initial=self.one_of(f["initial"], f"{where}.initial", INITIALS),
            update=self.one_of(f["update"], f"{where}.update", UPDATES),
        )

    def file(self, value: Any, where: str) -> FileEntry:
        f = self.record(value, where, ("size", "sha256"))
        size = self.whole(f["size"], f"{where}.size", 0, MAX_FILE_BYTES)
        return FileEntry(size, self.sha256(f["sha256"], f"{where}.sha256"))

    def compiled(self, value: Any, where: str) -> CompiledEntry:
        f = self.record(value, where, tuple(CompiledEntry.__dataclass_fields__))
        return CompiledEntry(
            engine=self.text(f["engine"], f"{where}.engine"),
            device=self.text(f["device"], f"{where}.device"),
            profile=self.text(f["profile"], f"{where}.profile"),
            target=self.text(f["target"], f"{where}.target"),
            files=self.sequence(f["files"], f"{where}.files", self.text),
            versions=self.table(f["versions"], f"{where}.versions", self.text),
        )

    def parity_row(self, value: Any, where: str) -> ParityRow:
        f = self.record(value, where, tuple(ParityRow.__dataclass_fields__))
        row = ParityRow(
            engine=self.text(f["engine"], f"{where}.engine"),
            device=self.text(f["device"], f"{where}.device"),
            profile=self.text(f["profile"], f"{where}.profile"),
            precision=self.text(f["precision"], f"{where}.precision"),
            max_logit_error=self.number(f["max_logit_error"], f"{where}.max_logit_error"),
            kl=self.number(f["kl"], f"{where}.kl"),
            top1=self.number(f["top1"], f"{where}.top1"),
            greedy_match=self.whole(f["greedy_match"], f"{where}.greedy_match", 0, MAX_COUNT),
            greedy_total=self.whole(f["greedy_total"], f"{where}.greedy_total", 0, MAX_COUNT),
            placement=self.table(f["placement"], f"{where}.placement", self.node_count),
            fallback=self.sequence(f["fallback"], f"{where}.fallback", self.text),
            versions=self.table(f["versions"], f"{where}.versions", self.text),
            date=self.text(f["date"], f"{where}.date"),
        )
        if row.greedy_match > row.greedy_total:
            raise self.fail(
                f"{where}.greedy_match", f"at most greedy_total = {row.greedy_total}", row.greedy_match
            )
        return row

    def quantization(self, value: Any) -> dict[str, str | int] | None:
        return None if value is None else self.table(value, "quantization", self.setting)

    def record(self, value: Any, where: str, keys: tuple[str, ...]) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.fail(where, "an object", value)
        for key in sorted(set(keys) ^ value.keys()):
            raise FormatError(
                f"{self.path}: {where} {'lacks' if key in keys else 'has an unknown'} key {key[:80]!r}"
            )
        return value

    def table(
        self, value: Any, where: str, item: Callable[[Any, str], T], limit: int = MAX_ENTRIES
    ) -> dict[str, T]:
        if not isinstance(value, dict) or len(value) > limit:
            raise self.fail(where, f"an object of at most {limit} entries", value)
        return {self.text(key, f"{where} key"): item(v, f"{where}[{key[:80]!r}]") for key, v in value.items()}

    def sequence(
        self, value: Any, where: str, item: Callable[[Any, str], T], limit: int = MAX_ENTRIES
    ) -> tuple[T, ...]:
        if not isinstance(value, list) or len(value) > limit:
            raise self.fail(where, f"a list of at most {limit} entries", value)
        return tuple(item(v, f"{where}[{i}]") for i, v in enumerate(value))

    def text(self, value: Any, where: str) -> str:
        if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT or not value.isprintable():
            raise self.fail(where, f"a printable string of 1 to {MAX_TEXT} characters", value)
        return value

    def whole(self, value: Any, where: str, low: int, high: int) -> int:
        if type(value) is not int or not low <= value <= high:
            raise self.fail(where, f"a whole number from {low} to {high}", value)
        return value

    def number(self, value: Any, where: str) -> float:
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise self.fail(where, "a finite number, zero or above", value)
        return float(value)

    def node_count(self, value: Any, where: str) -> int:
        return self.whole(value, where, 0, MAX_DIMENSION)

    def dimension(self, value: Any, where: str) -> int | str:
        return (
            self.text(value, where) if isinstance(value, str) else self.whole(value, where, 1, MAX_DIMENSION)
        )

    def setting(self, value: Any, where: str) -> str | int:
        return (
            self.text(value, where) if isinstance(value, str) else self.whole(value, where, 0, MAX_DIMENSION)
        )

    def one_of(self, value: Any, where: str, options: tuple[str, ...]) -> str:
        if not isinstance(value, str) or value not in options:
            raise self.fail(where, f"one of {', '.join(options)}", value)
        return value

    def sha256(self, value: Any, where: str) -> str:
        if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
            raise self.fail(where, "64 lower-case hexadecimal digits", value)
        return value
