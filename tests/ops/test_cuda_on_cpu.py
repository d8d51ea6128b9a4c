"""The emulation that the CUDA kernels are tested with: it runs them right, and sees what a device would not forgive."""

import ctypes
import subprocess
import sys

import cuda_on_cpu
import numpy as np
import pytest

FAULTS = (
    "none", "no_barrier", "divided_barrier", "ended_thread", "behind_memory", "unwritten_memory", "unwritten_array",
    "part_of_a_warp", "misaligned", "copied", "late_copy", "misaligned_copy",
)  # fmt: skip


def reverse(library, n, fault="none"):
    """n numbers behind the kernel that turns them around, and what the emulation says of a fault."""
    library.cuda_on_cpu_reverse.restype = ctypes.c_char_p
    x = np.arange(n, dtype=np.float32)
    said = library.cuda_on_cpu_reverse(x.ctypes.data_as(ctypes.c_void_p), n, FAULTS.index(fault))
    return x.tolist(), (said or b"").decode()


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("n", [1, 32, 70, 1024])
def test_a_right_kernel_gives_its_result_in_any_order(emulator, n, order):
    emulator.order(order)
    assert reverse(emulator.library, n) == (list(map(float, reversed(range(n)))), "")


def test_a_missing_barrier_shows_as_a_result_that_depends_on_the_order(emulator):
    found = []
    for order in (0, 1):
        emulator.order(order)
        found.append(reverse(emulator.library, 64, "no_barrier")[0])
    assert not np.array_equal(*found)


@pytest.mark.parametrize("fault", ["unwritten_memory", "unwritten_array"])
def test_shared_memory_that_nobody_wrote_is_no_number(emulator, fault):
    """Of a size that the launch says, or the kernel; and not what a block before left there."""
    emulator.order(0)
    assert np.isfinite(reverse(emulator.library, 64)[0]).all()
    assert np.isnan(reverse(emulator.library, 64, fault)[0]).any()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "divided_barrier",
            "threads of a block wait in vain: thread (0, 0) waits for its block in faults.cpp:",
        ),
        ("ended_thread", "thread (0, 0) has ended"),
        ("behind_memory", "a block wrote behind the shared memory"),
        ("part_of_a_warp", "only whole warps exchange values here"),
    ],
)
def test_what_would_hang_or_spoil_other_memory_is_an_error(emulator, fault, message):
    emulator.order(0)
    assert message in reverse(emulator.library, 40, fault)[1]
    assert reverse(emulator.library, 40) == (
        list(map(float, reversed(range(40)))),
        "",
    )  # and the next launch is well


def test_a_copy_has_arrived_when_its_thread_has_waited_and_no_sooner(emulator):
    emulator.order(0)
    assert reverse(emulator.library, 64, "copied") == (list(map(float, reversed(range(64)))), "")
    late, _ = reverse(emulator.library, 64, "late_copy")
    assert np.isnan(late[:-1]).all()  # the last one is not a copy
    assert "not aligned to 16 bytes" in reverse(emulator.library, 64, "misaligned_copy")[1]


def test_a_warp_multiplies_matrices_that_its_lanes_hold(emulator):
    """Whole numbers, so that bfloat16 rounds nothing."""
    emulator.order(1)
    random = np.random.default_rng(0)
    a, b, c = (random.integers(-9, 9, shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
    expected = c + a @ b
    multiply = emulator.library.cuda_on_cpu_multiply
    multiply.restype = ctypes.c_char_p
    assert multiply(*(m.ctypes.data_as(ctypes.c_void_p) for m in (a, b, c))) is None
    assert np.array_equal(c, expected)


def test_an_access_that_is_not_aligned_ends_the_process(emulator):
    """As it ends the context of a device."""
    program = (
        "import sys, ctypes, numpy as np; library = ctypes.CDLL(sys.argv[1]); x = np.zeros(64, np.float32)\n"
        "library.cuda_on_cpu_reverse(x.ctypes.data_as(ctypes.c_void_p), 4, int(sys.argv[2]))"
    )
    call = [sys.executable, "-c", program, emulator.library._name]
    good, bad = (
        subprocess.run([*call, str(FAULTS.index(name))], capture_output=True, text=True, check=False)
        for name in ("none", "misaligned")
    )
    assert good.returncode == 0, good.stderr
    assert bad.returncode != 0
    assert "misaligned address" in bad.stderr


def test_a_launch_that_no_device_takes_is_refused_as_there(emulator):
    assert "cudaLaunchKernelEx" in reverse(emulator.library, 1025)[1]
    assert "invalid configuration argument" in reverse(emulator.library, 0)[1]


def test_every_kernel_is_found_with_its_parameters():
    found = cuda_on_cpu.signatures()
    assert {"swiglu_fwd", "cross_entropy", "adamw_step"} <= found.keys()
    assert found["swiglu_fwd"] == [ctypes.c_void_p] * 3 + [ctypes.c_int64, ctypes.c_bool, ctypes.c_void_p]
