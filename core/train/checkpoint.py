"""Checkpoints that survive kill -9, a full disk and a flipped bit.

A save fills ``step-N.tmp-<pid>/``, waits until every file is on the disk, writes ``checkpoint.json`` (size
and sha256 of each file, the run's state) last, waits again, renames the folder to ``step-N/``, waits for the
parent folder, and points ``latest`` at it. Only then are old checkpoints removed, and at least two stay. So
the newest complete checkpoint is on the disk at every moment, whatever happens to the process or the power.

Reading trusts nothing but the manifest: a resume takes the newest folder whose manifest and files verify,
says on the way which ones do not, and never deletes those. A renamed folder is of the step that its manifest names.
``latest`` is for people.

The folder is itself a model checkpoint (``config.json``, ``model.safetensors``, ``tokenizer.json``); what
else it holds is the caller's business, so every kind of training can use this file. It needs no PyTorch.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portlm.errors import FormatError, StorageError, UsageError
from portlm.files import read_json, safe_join, sha256_file
from portlm.folders import FILE_OPS, FileOps, Fill, new_folder, remove_leftovers, remove_stale_files

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "MANIFEST",
    "Checkpoint",
    "FileOps",
    "check_checkpoint",
    "is_checkpoint",
    "list_checkpoints",
    "newest_checkpoint",
    "remove_leftovers",
    "remove_stale_files",
    "renamed_checkpoints",
    "replace_folder",
    "save_checkpoint",
    "set_aside_newer",
]  # fmt: skip

FORMAT = "portlm-checkpoint"
FORMAT_VERSION = 1
MANIFEST = "checkpoint.json"
_OLD_MANIFEST = "manifest.json"  # its name when it could be taken for that of an artifact; still read

# Folders and journals take space besides the files themselves.
_SPACE_FACTOR = 1.1
_STEP_FOLDER = re.compile(r"step-(\d{1,18})")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint whose every file has been verified."""

    path: Path
    step: int
    state: dict[str, Any]


def save_checkpoint(
    root: Path,
    step: int,
    fill: Fill,
    *,
    state: dict[str, Any],
    estimate: int,
    keep: int = 2,
    ops: FileOps = FILE_OPS,
) -> Path:
    """Write ``root/step-<step>`` and return its path.

    Args:
        root: Folder of all checkpoints of a run; created when missing.
        step: Steps taken so far; the newest checkpoint is the one with the highest number.
        fill: Writes the files into the folder it is given.
        state: Goes into the manifest: whatever JSON the caller needs to resume.
        estimate: Bytes that ``fill`` will write, roughly.
        keep: Checkpoints to keep, this one included; at least 2.
        ops: The file operations; tests replace them.

    Raises:
        StorageError: The disk is full or refuses. Earlier checkpoints are untouched.
        UsageError: This step is saved already, or ``keep`` is below 2.
    """
    if keep < 2:
        raise UsageError(
            f"keep must be at least 2, got {keep}: with one checkpoint, a damaged one ends the run"
        )
    target = root / f"step-{step}"
    with _storage_errors(f"save the checkpoint {target}", estimate, root, ops):
        root.mkdir(parents=True, exist_ok=True)
        if target.exists():
            if _step_of(target, step) == step:
                raise UsageError(f"{target} exists already: resume from it, or choose another folder")
            ops.rename(
                target, _unused_name(target)
            )  # of another step, and in the way since somebody renamed it
        remove_leftovers(root, ops)
        _require_space(root, target, estimate, ops)

        def seal(temporary: Path) -> None:
            manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, "step": step, "state": state}
            manifest["files"] = _seal(temporary, ops)
            manifest["sha256"] = _digest(manifest)
            data = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
            ops.write_file(temporary / MANIFEST, data)

        with new_folder(target, ops, seal) as temporary:
            ops.fill(temporary, fill)
        ops.replace_file(root / "latest", f"{target.name}\n".encode())
        _prune(root, keep, ops)
    return target


def replace_folder(target: Path, fill: Fill, *, estimate: int, ops: FileOps = FILE_OPS) -> Path:
    """Write a folder as a whole, taking the place of an older one of that name; return its path.

    The old folder stays until the new one is complete on the disk; files of the same name keep their mode.

    Raises:
        StorageError: The disk is full or refuses. An older folder is untouched.
    """
    with _storage_errors(f"write {target}", estimate, target.parent, ops):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent, ops)
        _require_space(target.parent, target, estimate, ops)
        with new_folder(target, ops) as temporary:
            ops.fill(temporary, fill)
    return target


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of every checkpoint under ``root``, damaged or not, oldest first.

    The step is that of the manifest, or of the folder's name where the manifest cannot be read.
    """
    if not root.is_dir():
        return []
    matches = ((_STEP_FOLDER.fullmatch(entry.name), entry) for entry in root.iterdir())
    return sorted(
        (_step_of(entry, int(match[1])), entry) for match, entry in matches if match and entry.is_dir()
    )


def renamed_checkpoints(root: Path) -> list[Path]:
    """Return every checkpoint under ``root`` whose name is not ``step-N``: no resume finds it by itself."""
    entries = sorted(root.iterdir()) if root.is_dir() else []
    return [
        e
        for e in entries
        if not _STEP_FOLDER.fullmatch(e.name) and ".tmp-" not in e.name and is_checkpoint(e)
    ]


def is_checkpoint(folder: Path) -> bool:
    """Say whether a folder's manifest is that of a checkpoint; nothing else of it is checked."""
    try:
        manifest = read_json(_manifest_path(folder))
    except FormatError:
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def check_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's manifest and compare every file with it.

    Raises:
        FormatError: A file is missing, truncated or altered, or the manifest is; the message names it.
    """
    manifest = _check_sizes(folder)
    for name, expected in manifest["files"].items():
        path = safe_join(folder, name)
        if sha256_file(path) != expected["sha256"]:
            raise FormatError(f"{path} was altered: its sha256 is not the manifest's")
    return Checkpoint(folder, manifest["step"], manifest["state"])


def newest_checkpoint(root: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest checkpoint that verifies, or None when there is none at all.

    Every damaged one on the way is reported through ``warn`` and left alone.

    Raises:
        FormatError: Checkpoints exist, but none of them is intact.
    """
    found = list_checkpoints(root)
    for _, folder in reversed(found):
        try:
            return check_checkpoint(folder)
        except FormatError as error:
            warn(f"{folder} is damaged and not used: {error}")
    if found:
        raise FormatError(
            f"none of the {len(found)} checkpoints in {root} is intact: start again in another folder"
        )
    return None


def set_aside_newer(root: Path, step: int, warn: Callable[[str], None], ops: FileOps = FILE_OPS) -> None:
    """Rename every checkpoint after ``step``, so that a run resumed from ``step`` may save there again.

    Nothing is deleted: ``step-200`` becomes ``step-200.aside``, out of the way of pruning for ever.

    Raises:
        StorageError: The disk refuses.
    """
    with _storage_errors(f"rename in {root}", 0, root, ops):
        for number, folder in list_checkpoints(root):
            if number > step:
                aside = _unused_name(folder)
                ops.rename(folder, aside)
                warn(f"{folder} is newer than the step resumed from: kept as {aside.name}")


@contextlib.contextmanager
def _storage_errors(action: str, need: int, where: Path, ops: FileOps) -> Iterator[None]:
    """Turn what the operating system refuses into one line that says what, where and what to do."""
    try:
        yield
    except StorageError as error:
        raise StorageError(f"cannot {action}: {error}; earlier checkpoints are intact") from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        free = ""
        if full:
            with contextlib.suppress(OSError, StorageError):
                free = f" ({need} bytes needed, {ops.free_bytes(where)} free)"
        advice = "free some space" if full else "check the disk and its permissions"
        raise StorageError(
            f"cannot {action}: {error.strerror or error}{free}; "
            f"earlier checkpoints are intact, {advice} and resume"
        ) from error


def _require_space(where: Path, target: Path, estimate: int, ops: FileOps) -> None:
    free, need = ops.free_bytes(where), int(estimate * _SPACE_FACTOR)
    if free < need:
        raise StorageError(f"{target} needs {need} bytes, {free} are free: free some space and resume")


def _seal(folder: Path, ops: FileOps) -> dict[str, dict[str, Any]]:
    """Return size and sha256 of every file below ``folder``, each safely on the disk."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            ops.sync_folder(path)
        else:
            files[path.relative_to(folder).as_posix()] = ops.seal_file(path)
    return files


def _digest(manifest: dict[str, Any]) -> str:
    """Return the sha256 of a manifest's canonical JSON, so that a bit flipped in it is noticed as well."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _manifest_path(folder: Path) -> Path:
    old = folder / _OLD_MANIFEST
    return old if old.exists() and not (folder / MANIFEST).exists() else folder / MANIFEST


def _step_of(folder: Path, otherwise: int) -> int:
    """Return the step that a manifest names; nothing of the files it lists is checked."""
    try:
        step: int = _read_manifest(folder)["step"]
    except FormatError:
        return otherwise
    return step


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check a manifest by itself."""
    path = _manifest_path(folder)
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise FormatError(f"{path} is no checkpoint manifest")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"{path} has format version {manifest.get('format_version')!r}, this portlm reads 1"
        )
    if manifest.get("sha256") != _digest(manifest):
        raise FormatError(f"{path} was altered: its sha256 does not fit its contents")
    step, state, files = manifest.get("step"), manifest.get("state"), manifest.get("files")
    if type(step) is not int or step < 0 or not isinstance(state, dict) or not isinstance(files, dict):
        raise FormatError(f"{path} lacks a step, a state or a list of files")
    for name, entry in files.items():
        if not isinstance(entry, dict) or type(entry.get("size")) is not int:
            raise FormatError(f"{path}: the entry of {name!r} has no size")
        if not isinstance(entry.get("sha256"), str) or not _SHA256.fullmatch(entry["sha256"]):
            raise FormatError(f"{path}: the entry of {name!r} has no sha256")
    return manifest


def _check_sizes(folder: Path) -> dict[str, Any]:
    """Read a manifest, and check the sizes (not yet the contents) of the files it lists."""
    manifest = _read_manifest(folder)
    for name, entry in manifest["files"].items():
        file = safe_join(folder, name)
        try:
            size = file.stat().st_size
        except OSError as error:
            raise FormatError(f"cannot read {file}: {error.strerror}") from error
        if size != entry["size"]:
            raise FormatError(f"{file} has {size} bytes, the manifest says {entry['size']}")
    return manifest


def _prune(root: Path, keep: int, ops: FileOps) -> None:
    """Remove old checkpoints once ``keep`` newer ones look complete."""
    complete = 0
    for _, folder in reversed(list_checkpoints(root)):
        if complete >= keep:
            # Renamed first: a kill half way through the deletion must not leave a damaged step-N.
            doomed = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
            ops.rename(folder, doomed)
            ops.remove_folder(doomed)
            continue
        with contextlib.suppress(FormatError):
            _check_sizes(folder)
            complete += 1


def _unused_name(folder: Path) -> Path:
    count = 1
    while (aside := folder.with_name(f"{folder.name}.aside{'' if count == 1 else f'-{count}'}")).exists():
        count += 1
    return aside
