"""The folder of one training run: where everything lies, who may write, and what a resume must agree with.

::

    config.toml      the resolved settings: `portlm pretrain --config config.toml` repeats the run
    tokenizer.json   what turns text into ids
    data/            token shards
    metrics.jsonl    one line per event
    loss.svg .png    the loss curve
    checkpoints/     step-N/ folders to resume from
    final/           the trained model
"""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from portlm import settings
from portlm.errors import ConfigError, FormatError, StorageError, UsageError
from portlm.files import write_atomic
from portlm.train.checkpoint import (
    Checkpoint,
    check_checkpoint,
    list_checkpoints,
    newest_checkpoint,
    remove_leftovers,
    remove_stale_files,
    renamed_checkpoints,
)
from portlm.train.config import RunConfig


class RunFolder:
    """Names of the parts of a run."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.toml"
        self.data = self.path / "data"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.final = self.path / "final"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and keep every other process from training in it.

        The lock belongs to the process and ends with it, also by kill -9.

        Raises:
            UsageError: Another process trains here.
            StorageError: The folder cannot be created.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StorageError(f"cannot create the run folder {self.path}: {error.strerror}") from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(
                    f"another process is training in {self.path}: wait, or choose another --out"
                ) from (error)
            except OSError as error:  # a file system without locks: no reason to refuse
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    raise
            for folder in (self.path, self.checkpoints):
                remove_leftovers(folder)
            for folder in (self.path, self.checkpoints, self.data, self.data / "train", self.data / "val"):
                if folder.is_dir():
                    remove_stale_files(folder)
            yield
        finally:
            os.close(descriptor)

    def write_config(self, config: RunConfig) -> None:
        """Keep the resolved settings."""
        write_atomic(self.config, settings.to_toml(config))

    def owns(self, found: Checkpoint) -> bool:
        """Say whether a checkpoint is one of this run."""
        return found.path.resolve().parent == self.checkpoints.resolve()

    def start_point(self, resume: str, warn: Callable[[str], None]) -> Checkpoint | None:
        """Return the checkpoint to continue from, or None for a fresh start.

        Args:
            resume: ``none``, ``auto`` (the newest intact checkpoint of this run, if any), or the path of a
                checkpoint or of another run.
            warn: Told about every checkpoint that is damaged.

        Raises:
            UsageError: ``none``, although the folder holds a run; a path, although it holds another run; or ``auto``,
                although every checkpoint was renamed.
            FormatError: No intact checkpoint where there should be one.
        """
        own, renamed = list_checkpoints(self.checkpoints), renamed_checkpoints(self.checkpoints)
        if resume == "none":
            if own or renamed or self.final.exists():
                raise UsageError(
                    f"{self.path} holds a run already: continue it with --resume auto, or choose another --out"
                )
            return None
        if resume == "auto":
            if renamed and not own:
                raise UsageError(
                    f"{self.checkpoints} has no step-N, but a checkpoint under another name: continue it with "
                    f"--resume {renamed[-1]}, or choose another --out"
                )
            return newest_checkpoint(self.checkpoints, warn)
        found = _find(Path(resume), warn)
        if own and not self.owns(found):
            raise UsageError(f"{self.path} holds another run already: choose another --out")
        return found


@dataclass(frozen=True)
class SavedRun:
    """All of a run but its tensors, as it stands in a checkpoint's manifest.

    Attributes:
        step: Optimiser steps taken.
        config: The resolved settings.
        kind: Of the objective.
        objective: What the objective remembers besides tensors.
        optimizer: What the optimiser remembers besides tensors.
        evaluation: The latest, None before the first.
        evaluated_step: The step it belongs to.
        loss_sum: Over the steps since the last log line.
        loss_count: How many those are.
        grad_norm: Of the last step.
        seconds: Training time until the last log line.
        seconds_since_log: And since then.
        threads: CPU threads; another number may round differently.
        versions: Of portlm and PyTorch, for whoever has to explain a difference.
    """

    step: int
    config: dict[str, Any]
    kind: str
    objective: dict[str, Any]
    optimizer: dict[str, Any]
    evaluation: dict[str, float] | None
    evaluated_step: int
    loss_sum: float
    loss_count: int
    grad_norm: float
    seconds: float
    seconds_since_log: float
    threads: int
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return what goes into the manifest."""
        state: dict[str, Any] = msgspec.to_builtins(self)
        return state

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> "SavedRun":
        """Read it back.

        Raises:
            FormatError: The checkpoint is not of a training run, or of another version of portlm.
        """
        state = checkpoint.state
        if state.get("kind") == "pretrain":  # when there was one objective, and its state lay among the rest
            own = {key: state.get(key) for key in ("sampler", "data")}
            state = {**state, "kind": "causal", "objective": own}
        try:
            return msgspec.convert(state, cls, strict=True)
        except msgspec.ValidationError as error:
            raise FormatError(f"{checkpoint.path} cannot be resumed as a training run: {error}") from error


def check_same_run(saved: SavedRun, asked: RunConfig, note: Callable[[str], None]) -> None:
    """Refuse settings that would make a resumed run a different one, and report those that merely change.

    Raises:
        ConfigError: A setting that decides the model or the data differs, or the run is already past its end.
    """
    if saved.step > asked.steps:
        raise ConfigError(f"the run has taken {saved.step} steps already, more than steps = {asked.steps}")
    before = settings.load(type(asked), preset=saved.config)
    for key, (old, new) in settings.differences(before, asked).items():
        if key.startswith(asked.FIXED) and key not in asked.FREE:
            raise ConfigError(
                f"{key} is {old!r} in the checkpoint and {new!r} now: leave it out to resume, or start anew "
                "with another --out"
            )
        note(f"resuming with {key} = {new!r} instead of {old!r}")


def _find(path: Path, warn: Callable[[str], None]) -> Checkpoint:
    for root in (path / "checkpoints", path):
        if list_checkpoints(root) and (found := newest_checkpoint(root, warn)) is not None:
            return found
    if not path.is_dir():
        raise FormatError(f"{path} is no folder: give a checkpoint (step-N) or a run to resume")
    return check_checkpoint(path)
