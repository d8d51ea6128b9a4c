"""Keeping freed memory: large blocks come back without page faults."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch
from portlm.train.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(1 << 24)  # 64 MiB, 16384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
fresh = faults()
works = keep_freed_memory()
for _ in range(4):  # the first few blocks of a kind leave splinters between them, and are not reused
    faults()
print(works, fresh, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt belongs to glibc on Linux")
def test_large_tensors_stop_faulting_once_freed_memory_is_kept():
    """In a process of its own, because the setting cannot be taken back."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    works, fresh, kept = done.stdout.split()
    if works == "False":
        pytest.skip("this C library has no mallopt")
    # The kernel may hand out huge pages: then there are few faults either way, but never more.
    assert int(kept) <= max(int(fresh) // 10, 16)


def test_other_systems_are_left_alone(monkeypatch):
    from portlm.train.allocator import keep_freed_memory

    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False


def test_the_command_keeps_freed_memory_and_the_function_leaves_the_process_alone(
    text, tmp_path, monkeypatch
):
    """malloc's setting is for the whole process and cannot be taken back: only a process of ours may have it."""
    pytest.importorskip("torch")
    from click.testing import CliRunner
    from tiny_runs import pretrain, tiny

    from portlm.commands.pretrain import command
    from portlm.train import allocator
    from portlm.train.loop import Trainer

    happened = []
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: happened.append("kept"))
    step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self: (happened.append("step"), step(self))[1])
    pretrain(tiny(text, steps=2), tmp_path / "function", quiet=True)
    assert happened == ["step", "step"]
    happened.clear()
    config = tmp_path / "function" / "config.toml"
    arguments = ["--config", str(config), "--out", str(tmp_path / "command"), "-q"]
    assert CliRunner().invoke(command, arguments, catch_exceptions=False).exit_code == 0
    assert happened == ["kept", "step", "step"]
