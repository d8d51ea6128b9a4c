"""Runs that take milliseconds a step, and the ways to end them: what the tests of training share."""

import functools
import hashlib

import pytest

from portlm import settings
from portlm.train.checkpoint import list_checkpoints
from portlm.train.config import PretrainConfig
from portlm.train.loop import Trainer
from portlm.train.metrics import comparable, read_metrics
from portlm.train.pretrain import pretrain as pretrain_and_plot

TEXT = "".join(f"{i} bottles of beer on the wall, {i} bottles of beer. Äpfel!\n" for i in range(99, 0, -1))

# A picture takes longer than these runs.
pretrain = functools.partial(pretrain_and_plot, plot=False)


def tiny(text, *overrides, **values):
    """Return settings for a model that takes a few milliseconds per step."""
    values = {
        "steps": 12, "log_interval": 3, "model.n_layer": 1, "model.n_head": 2, "model.width": 16,
        "model.context_length": 16, "data.batch_size": 4, "evaluation.interval": 6, "evaluation.max_tokens": 128,
        "evaluation.sample_tokens": 20, "checkpoint.interval": 4, "data.texts": [str(text)], "threads": 1,
    } | {key.replace("__", "."): value for key, value in values.items()}  # fmt: skip
    return settings.load(PretrainConfig, overrides=[*values.items(), *overrides])


def digest(folder):
    """Return the sha256 of everything that a bit-exact resume must reproduce."""
    names = ("model.safetensors", "optimizer.safetensors", "rng.safetensors")
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def told(run):
    """Return the lines of metrics of a run without what the clock says in them."""
    return comparable(read_metrics(run / "metrics.jsonl"))


def newest(run):
    return list_checkpoints(run / "checkpoints")[-1][1]


def stop_at(monkeypatch, step, action):
    """Do something right after the step with this number."""
    original = Trainer.train_step

    def train_step(self):
        original(self)
        if self.step == step:
            action()

    monkeypatch.setattr(Trainer, "train_step", train_step)


class CrashError(Exception):
    """Stands for whatever kills a process between two saves."""


def crash(monkeypatch, config, run, step, resume="none"):
    def raise_it():
        raise CrashError

    with monkeypatch.context() as patch:
        stop_at(patch, step, raise_it)
        with pytest.raises(CrashError):
            pretrain(config, run, resume=resume, quiet=True)
