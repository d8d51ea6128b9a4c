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
